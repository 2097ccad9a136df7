"""One small file for a compressed network: ``save``, ``load``, ``load_tensor``.

The file is a valid safetensors file; ``docs/format.md`` is its specification. Nothing in it is
executed, and all that it says is checked before it is believed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn

from rarefy.errors import FormatError, InputError, RarefyError
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph
from rarefy.graph.serialize import from_json, to_json
from rarefy.grid import put_grids
from rarefy.pruning.structure import attributes
from rarefy.storage import adapt
from rarefy.storage.adapt import Held
from rarefy.storage.container import Reader, write
from rarefy.storage.grids import quantized_weights
from rarefy.storage.index import Index, capacity, encode, to_columns
from rarefy.storage.pack import damaged, pack
from rarefy.storage.reading import open_file
from rarefy.storage.writing import entries, parts
from rarefy.types import check_network

Entropy: TypeAlias = Literal["zstd", "ans"]
"""How bytes are compressed."""


def save(model: nn.Module, path: str | Path, *, entropy: Entropy = "zstd") -> Path:
    """Write a network to one file, which takes the place of an older one in a single step.

    Parameters and persistent buffers are stored without loss, each in the smallest of its
    encodings; equal models give equal bytes. A :class:`~rarefy.graph.model.GraphModel` is
    stored with its graph; there, float32 weights that only ``fake_quantize`` operators read are
    stored as their integer codes, and come back as the values that the codes stand for, with the
    same outputs.

    Args:
        model: any module, pruned or not, or a ``GraphModel``.
        path: of the file; its directory must exist.
        entropy: how bytes are compressed: ``"zstd"``, fast to read, or ``"ans"``, which takes
            asymmetric numeral systems where these are smaller. Quantized weights come out a few
            percent smaller, most of all sparse ones.

    Returns:
        The path.

    Raises:
        InputError: the model has tensors without data, or state that is no tensor; or
            ``entropy`` is neither.
        OutputError: the file cannot be written; an older one is unchanged.
        FormatError: a graph holds what a file may not hold, such as an unknown operator.

    Example:
        >>> save(torch.nn.Linear(3, 2), "/tmp/linear.safetensors").name
        'linear.safetensors'
    """
    if entropy not in get_args(Entropy):
        raise InputError(
            f"save(entropy={entropy!r})", "there is no such coder", "Use 'zstd' or 'ans'"
        )
    check_network(model, "save(model)")
    held = adapt.held(model)
    adapt.check_storable(model, dict(held.tensors))
    graph, grids = "", quantized_weights(model, held)
    settings: dict[str, Any] = {}
    if isinstance(model, GraphModel):
        graph = to_json(model.graph)
    else:
        settings = {
            "attributes": adapt.implied(model),
            "custom": adapt.custom(model),
            "stubs": adapt.stand_ins(model),
        }
    packed = parts(held, grids, partial(pack, ans=entropy == "ans"))
    if sum(p.record.bytes for p in packed) > capacity(sum(p.record.stored for p in packed)):
        packed = parts(held, grids, partial(pack, codecs=()))
    index = Index(
        kind="graph" if isinstance(model, GraphModel) else "module",
        class_name=f"{type(model).__module__}.{type(model).__qualname__}"[:1000],
        tensors=to_columns([part.record for part in packed]),
        aliases=dict(held.aliases),
        grids={name: grid.record for name, grid in grids.items()},
        **settings,
    )
    write(Path(path), *entries(packed, index, encode(index, graph)))
    return Path(path)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a network that :func:`save` wrote; its outputs and state are the same, bit for bit.

    Args:
        path: of the file.
        model: an instance of the saved class, with its original or any other widths; it is
            copied, not changed. A file of a captured graph needs none and ignores it.

    Returns:
        A module in eval mode: the copy of ``model`` with the tensors and widths of the file, or
        a :class:`~rarefy.graph.model.GraphModel`.

    Raises:
        InputError: the file needs a model and none is given, or it cannot be copied.
        FormatError: the file is missing, damaged, hostile, of a newer version, or of another
            class.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> loaded = load(save(layer, "/tmp/linear.safetensors"), torch.nn.Linear(8, 8))
        >>> bool((loaded.weight == layer.weight).all()), loaded.in_features
        (True, 3)
    """
    with Reader(path) as reader:
        contents = open_file(reader)
        index = contents.index
        if index.kind == "graph":
            graph = from_json(contents.graph)
            found = _graph_model(reader.where, graph, contents.held())
            put_grids(found, contents.grids())
            return found
        if model is None:
            raise InputError(
                f"load({str(path)!r})",
                f"the file holds the tensors of class {index.class_name}, but not its code",
                "Give an instance of that class: load(path, model)",
            )
        copy = adapt.clone(model)
        adapt.put_stubs(copy, index.stubs)
        attributes.remember_buffers(copy, contents.records)
        adapt.check_paths(copy, contents.paths() | index.aliases.keys(), index.class_name)
        put_grids(copy, contents.grids())
        loaded = contents.held()
    adapt.apply(copy, index.attributes, index.custom)
    adapt.fill(copy, loaded)
    if index.custom:
        vars(copy)[attributes.KEY] = {
            name: {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
            for name, values in index.custom.items()
        }
    return copy.eval()


def load_tensor(path: str | Path, name: str) -> Tensor:
    """Read one tensor of a file, whatever its encoding, without reading the others.

    Args:
        path: of the file.
        name: path of the parameter or buffer, e.g. ``"layer1.0.conv1.weight"``.

    Raises:
        FormatError: the file is damaged, or holds no such tensor.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> load_tensor(save(layer, "/tmp/linear.safetensors"), "weight").shape
        torch.Size([2, 3])
    """
    with Reader(path) as reader:
        contents = open_file(reader)
        source = contents.index.aliases.get(name, name)
        if source not in contents.records:
            known = [*contents.records, *contents.index.aliases]
            raise FormatError(
                f"load_tensor({str(path)!r})",
                f"it has no tensor {name!r}{adapt.nearest(name, known)}",
                "Print inspect(path) for a list",
            )
        return contents.tensor(source).detach()


def _graph_model(where: str, graph: Graph, held: Held) -> GraphModel:
    tensors = {
        name: held.tensors[path] for path, names in held.sharing().items() for name in sorted(names)
    }
    parameters = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter)}
    buffers = {n: t for n, t in tensors.items() if n not in parameters}
    try:
        return GraphModel(graph, parameters, buffers)
    except (RarefyError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(where, f"its graph and tensors do not fit ({str(error)[:200]})") from error
