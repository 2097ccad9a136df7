"""Any files side by side, on inputs that are made from what the files declare."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rarefy.deployment.executorch_session import ExecuTorchSession
from rarefy.deployment.measure import MAX_SECONDS, side_by_side
from rarefy.deployment.opening import check_form, form_of
from rarefy.deployment.program_file import read_program
from rarefy.deployment.runtimes import load_onnx, runtime_named
from rarefy.errors import FormatError, InputError, first_line
from rarefy.types import Inputs, Measurement

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Declared:
    """What a file says of its inputs.

    Attributes:
        sizes: those of each input, by name; one that is left open has a name.
        dtypes: by name; None for what is no tensor of numbers.
        by_name: whether inputs are given by name, and not in their order.
    """

    sizes: Mapping[str, Sequence[int | str]]
    dtypes: Mapping[str, torch.dtype | None]
    by_name: bool = True


@dataclass(frozen=True)
class Made:
    """Inputs of one file.

    Attributes:
        tensors: by name.
        notes: which sizes the file leaves open, and what they were set to.
        by_name: whether they are given by name, and not in their order.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    by_name: bool = True

    @property
    def inputs(self) -> Inputs:
        """As the file takes them."""
        return self.tensors if self.by_name else tuple(self.tensors.values())


@dataclass(frozen=True)
class Bench:
    """Files that were measured side by side.

    Attributes:
        measured: one for each file, with its latency as a share of the first's.
        notes: what the reader must know of how.
    """

    measured: tuple[Measurement, ...]
    notes: tuple[str, ...] = field(default=())


def bench(
    paths: Sequence[Path],
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    shapes: Sequence[str] = (),
    calls: int = 200,
    memory: bool = False,
    max_seconds: float = MAX_SECONDS,
) -> Bench:
    """Measure files side by side; the first is the baseline.

    Inputs are random where they are floats, ones and True where they are not. Dimensions that a
    file leaves open are 1 unless a shape is given.

    Args:
        paths: ONNX files, ``.pt2`` files for the runtimes of PyTorch, or ``.pte`` files.
        runtime: ``"onnxruntime"`` or ``"openvino"``; for ``.pt2`` files ``"eager"`` or
            ``"compile"``; for ``.pte`` files ``"executorch"``.
        threads: intra-op threads.
        shapes: ``"1x3x224x224"`` for files with one input, ``"name=1x3x224x224"`` for the input of
            that name.
        calls: calls of each file that are timed.
        memory: whether peak memory is measured, too.
        max_seconds: wall time after which no more calls are timed.

    Raises:
        InputError: no such file, a shape that cannot be read or does not fit, or a runtime that
            does not serve such files.
        FormatError: a file cannot be read, or the runtime cannot load it.
        MissingExtraError: onnx or the runtime is not installed.
    """
    runtime_named(runtime)
    for path in paths:
        check_form(path, runtime)
    given = dict(map(_shape, shapes))
    made = [inputs_of(path, given) for path in paths]
    unknown = given.keys() - {"", *(name for one in made for name in one.tensors)}
    if unknown:
        names = dict.fromkeys(name for one in made for name in one.tensors)
        raise InputError(
            f"--shape {sorted(unknown)[0]}=...",
            "no file has an input of this name",
            f"The inputs are {', '.join(names)}",
        )
    measured = side_by_side(
        paths,
        [one.inputs for one in made],
        runtime=runtime,
        threads=threads,
        rounds=calls,
        warmup=max(calls // 10, 1),
        max_seconds=max_seconds,
        memory=memory,
    )
    notes = [f"{p.name}: {note}" for p, one in zip(paths, made, strict=True) for note in one.notes]
    notes += [f"{Path(m.path).name}: {note}" for m in measured for note in m.notes]
    return Bench(tuple(measured), tuple(notes))


def _shape(text: str) -> tuple[str, Shape]:
    """``"name=1x3"`` as a name, empty where none is given, and a shape."""
    name, _, sizes = text.rpartition("=")
    if not re.fullmatch(r"[1-9]\d*([x,][1-9]\d*)*", sizes):
        raise InputError(
            f"--shape {text}", "it is no shape", "Write 1x3x224x224, or name=1x3x224x224"
        )
    return name, tuple(map(int, re.split("[x,]", sizes)))


def inputs_of(path: Path, shapes: Mapping[str, Shape]) -> Made:
    """Inputs as a file declares them.

    Args:
        path: an ONNX, ``.pt2`` or ``.pte`` file.
        shapes: by the name of the input; ``""`` is the shape of a file's only input.

    Raises:
        InputError: there is no such file, or a shape does not fit.
        FormatError: it cannot be read, or an input is no tensor of numbers.
    """
    if not path.is_file():
        raise InputError(str(path), "there is no such file", "Export the network first")
    declared = DECLARED[form_of(path)](path)
    if "" in shapes and len(declared.sizes) != 1:
        names = ", ".join(declared.sizes)
        raise InputError(
            "--shape", f"{path.name} has the inputs {names or '(none)'}", "Write name=1x3x224x224"
        )
    tensors, notes = {}, []
    for name, sizes in declared.sizes.items():
        wanted = shapes.get(name, shapes.get(""))
        shape = _fitted(path, name, sizes, wanted)
        if wanted is None and list(shape) != list(sizes):
            open_sizes = "x".join(map(str, sizes))
            notes.append(f"{name} is {open_sizes}; taken as {'x'.join(map(str, shape))}")
        tensors[name] = _values(path, name, declared.dtypes[name], shape)
    return Made(tensors, tuple(notes), declared.by_name)


def _of_onnx(path: Path) -> Declared:
    onnx = load_onnx()
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise FormatError(
            str(path), f"it is no ONNX file: {first_line(error)}", "Give a file that is one"
        ) from error
    weights = {tensor.name for tensor in graph.initializer}
    types = {v.name: v.type.tensor_type for v in graph.input if v.name not in weights}
    sizes = {
        name: [size.dim_value or size.dim_param or "?" for size in held.shape.dim]
        for name, held in types.items()
    }
    return Declared(sizes, {name: _dtype(held.elem_type) for name, held in types.items()})


def _dtype(kind: int) -> torch.dtype | None:
    """The dtype of a number of ONNX's enumeration."""
    try:
        held = np.dtype(load_onnx().helper.tensor_dtype_to_np_dtype(kind))
        return torch.from_numpy(np.empty(0, held)).dtype
    except (KeyError, TypeError, ValueError):
        return None


def _of_program(path: Path) -> Declared:
    """Inputs of a program: tensors, all in their order or all by name."""
    program = read_program(path)
    positional, named = program.call_spec.in_spec.children()
    given = program.graph_signature.user_inputs
    flat = all(child.is_leaf() for spec in (positional, named) for child in spec.children())
    if not flat or (positional.num_leaves and named.num_leaves):
        raise FormatError(
            str(path),
            "its inputs are nested, or some in their order and others by name",
            "Measure such a program in Python: rf.measure(path, inputs)",
        )
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    names = [*named.context] if named.num_leaves else [str(name) for name in given]
    held = dict(zip(names, (values.get(str(name)) for name in given), strict=True))
    return Declared(
        {name: _sizes(v) for name, v in held.items()},
        {name: v.dtype if isinstance(v, Tensor) else None for name, v in held.items()},
        by_name=bool(named.num_leaves),
    )


def _of_executorch(path: Path) -> Declared:
    """Inputs of a program of ExecuTorch; a free batch is the largest that it takes."""
    session = ExecuTorchSession(path, threads=None)
    found = {f"input_{i}": declared for i, declared in enumerate(session.declared)}
    session.close()
    sizes = {name: shape for name, (shape, _) in found.items()}
    return Declared(sizes, {name: dtype for name, (_, dtype) in found.items()}, by_name=False)


DECLARED = {".onnx": _of_onnx, ".pt2": _of_program, ".pte": _of_executorch}
"""Form of a file -> how what it says of its inputs is read."""


def _sizes(value: object) -> list[int | str]:
    shape = value.shape if isinstance(value, Tensor) else ()
    return [size if isinstance(size, int) else str(size) for size in shape]


def _fitted(path: Path, name: str, sizes: Sequence[int | str], wanted: Shape | None) -> Shape:
    """The declared sizes with the open ones filled in, or the shape that is wanted."""
    if wanted is None:
        return tuple(size if isinstance(size, int) else 1 for size in sizes)
    fits = len(wanted) == len(sizes) and all(
        size == given or isinstance(size, str) for size, given in zip(sizes, wanted, strict=True)
    )
    if not fits:
        raise InputError(
            f"--shape {'x'.join(map(str, wanted))}",
            f"{name} of {path.name} is {'x'.join(map(str, sizes))}",
            "Give a shape that fits",
        )
    return wanted


def _values(path: Path, name: str, dtype: torch.dtype | None, shape: Shape) -> Tensor:
    """Random floats, or ones: a valid index, and a mask that hides nothing."""
    if dtype is None:
        raise FormatError(
            str(path), f"its input {name!r} is no tensor of numbers", "Give a file with such inputs"
        )
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).to(dtype)
