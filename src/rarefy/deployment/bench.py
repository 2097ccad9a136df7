"""Any ONNX files side by side, on inputs that are made from what the files declare."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rarefy.deployment.measure import MAX_SECONDS, side_by_side
from rarefy.deployment.runtimes import load_onnx, runtime_named
from rarefy.errors import FormatError, InputError, first_line
from rarefy.types import Measurement

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """Inputs of one file.

    Attributes:
        tensors: by name.
        notes: which sizes the file leaves open, and what they were set to.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


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
    """Measure ONNX files side by side; the first is the baseline.

    Inputs are random where they are floats, ones and True where they are not. Dimensions that a
    file leaves open are 1 unless a shape is given.

    Args:
        paths: the files.
        runtime: ``"onnxruntime"`` or ``"openvino"``.
        threads: intra-op threads.
        shapes: ``"1x3x224x224"`` for files with one input, ``"name=1x3x224x224"`` for the input of
            that name.
        calls: calls of each file that are timed.
        memory: whether peak memory is measured, too.
        max_seconds: wall time after which no more calls are timed.

    Raises:
        InputError: no such file, a shape that cannot be read or does not fit, or a runtime that
            serves no files.
        FormatError: a file is no ONNX file, or the runtime cannot load it.
        MissingExtraError: onnx or the runtime is not installed.
    """
    if runtime_named(runtime).serves != "file":
        raise InputError(
            f"runtime={runtime!r}",
            "it runs networks in PyTorch, and files are to be compared",
            "Use 'onnxruntime' or 'openvino'",
        )
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
        [one.tensors for one in made],
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
        path: an ONNX file.
        shapes: by the name of the input; ``""`` is the shape of a file's only input.

    Raises:
        InputError: there is no such file, or a shape does not fit.
        FormatError: it is no ONNX file, or an input is no tensor of numbers.
    """
    onnx = load_onnx()
    if not path.is_file():
        raise InputError(str(path), "there is no such file", "Export the network first")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise FormatError(
            str(path), f"it is no ONNX file: {first_line(error)}", "Give a file that is one"
        ) from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if "" in shapes and len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise InputError(
            "--shape", f"{path.name} has the inputs {names or '(none)'}", "Write name=1x3x224x224"
        )
    tensors, notes = {}, []
    for value in inputs:
        declared = value.type.tensor_type
        sizes = [size.dim_value or size.dim_param or "?" for size in declared.shape.dim]
        wanted = shapes.get(value.name, shapes.get(""))
        shape = _fitted(path, value.name, sizes, wanted)
        if wanted is None and list(shape) != sizes:
            open_sizes = "x".join(map(str, sizes))
            notes.append(f"{value.name} is {open_sizes}; taken as {'x'.join(map(str, shape))}")
        tensors[value.name] = _values(path, value.name, declared.elem_type, shape)
    return Made(tensors, tuple(notes))


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


def _values(path: Path, name: str, kind: int, shape: Shape) -> Tensor:
    """Random floats, or ones: a valid index, and a mask that hides nothing."""
    try:
        dtype = np.dtype(load_onnx().helper.tensor_dtype_to_np_dtype(kind))
        array = np.ones(shape, dtype)
        if array.dtype.kind == "f":
            array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        return torch.from_numpy(array)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            str(path), f"its input {name!r} is no tensor of numbers", "Give a file with such inputs"
        ) from error
