"""A network without some of its residual blocks: the user's own class, or a rewritten graph.

In the class, modules of which nothing is left are replaced by :class:`~rarefy.graph.stubs.Stub`,
the largest ones that the forward calls: a whole block that returns what it is given, or the parts
of a branch, which give zeros. In the graph, the sum is replaced by the trunk. Either way the result
is held against the original whose branches give zeros at the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from rarefy.copies import copied, successor
from rarefy.errors import RarefyError, first_line
from rarefy.graph.blocks import Block
from rarefy.graph.capture import Capture, capture, check_runs, graph_model, plain_attention
from rarefy.graph.count import graph_macs
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Spec
from rarefy.graph.stubs import Gives, Stub, put, without_blocks, without_nodes
from rarefy.graph.trace import Network
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.proof import ClassError, Comparison, Masking, prove
from rarefy.types import Inputs

Places = Mapping[str, tuple[Gives, int]]
"""Path of a module -> what the stub in its place gives, and how many outputs it has (see there)."""


class BlockError(ClassError):
    """The user's class cannot be kept without some blocks.

    Attributes:
        blocks: those of them that cannot go alone.
    """

    blocks: tuple[Block, ...] = ()


def bypass(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    blocks: Sequence[Block],
    *,
    keep_class: bool = False,
) -> tuple[nn.Module, str, float]:
    """The network without these blocks, proven.

    Args:
        model: the network, which is left as it is.
        example_inputs: what it was traced with.
        network: its trace.
        blocks: some of the trace's.
        keep_class: never return a rewritten graph.

    Returns:
        The smaller network in eval mode; why it is no instance of the user's class, or empty; and
        the largest difference from masking, relative to the outputs' sensitivity.

    Raises:
        BlockError: the class has to be kept, and its forward does not work without a block.
        ProofError: the smaller network differs from masking.
    """
    plan = Plan.without(network, blocks)
    masking = Masking(model, example_inputs, network, plan)
    found = Comparison(inf, "it is a graph already")
    if not isinstance(model, GraphModel):
        called = outputs(model, example_inputs)
        for way in _ways(model, network, blocks, called):
            found = _against(model, example_inputs, network, blocks, way, masking)
            if not found.fault:
                return stubbed(model, way).eval(), "", found.error
        if keep_class:
            raise _refused(model, example_inputs, network, blocks, called, found.fault)
    error = prove(
        model, example_inputs, network, plan, lambda m, p: bypassed(m, network, p.blocks), masking
    )
    reason = found.fault
    if not isinstance(model, GraphModel):
        reason = f"its forward needs modules of the blocks that go: {reason}"
    return bypassed(model, network, blocks).eval(), reason, error


def _ways(
    model: nn.Module, network: Network, blocks: Sequence[Block], called: Mapping[str, int]
) -> Iterator[Places]:
    """Stubs for whole blocks where these hand on their input, or else for their parts alone."""
    whole = places(model, network, blocks, called)
    yield whole
    if any(gives == "input" for gives, _ in whole.values()):
        yield places(model, network, blocks, called, whole=False)


def _against(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    blocks: Sequence[Block],
    found: Places,
    masking: Masking,
) -> Comparison:
    """Hold the class with stubs against masking; it must not compute more than the graph does."""
    if not found:
        return Comparison(inf, "no module of it can go as a whole")
    comparison = masking.compare(lambda m, _: stubbed(m, found))
    if comparison.fault:
        return comparison
    try:
        left = _macs(capture(stubbed(model, found), example_inputs).graph.live)
    except RarefyError as error:
        return Comparison(inf, f"what is left cannot be captured: {first_line(error)}")
    if left > _macs(without_blocks(network.captured.graph.live, blocks)):
        return Comparison(inf, "it computes with what they give in code of its own")
    return comparison


def _macs(graph: Graph) -> int:
    return sum(graph_macs(graph, lambda name: graph.by_name[name].shape).values())


def _refused(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    blocks: Sequence[Block],
    called: Mapping[str, int],
    fault: str,
) -> BlockError:
    """The error that tells which blocks cannot go from the class."""
    stuck = []
    for block in blocks if len(blocks) > 1 else ():
        masking = Masking(model, example_inputs, network, Plan.without(network, [block]))
        ways = _ways(model, network, [block], called)
        each = (_against(model, example_inputs, network, [block], w, masking) for w in ways)
        if all(comparison.fault for comparison in each):
            stuck.append(block)
    error = BlockError(
        f"prune({type(model).__name__}, keep_class=True)",
        f"its forward does not work without {', '.join(b.name for b in stuck or blocks)}: {fault}",
        "Exclude these blocks, make them modules of their own, or accept a rewritten graph "
        "(keep_class=False)",
    )
    error.blocks = tuple(stuck or blocks)
    return error


# --- the user's class --------------------------------------------------------------------------


def stubbed(model: nn.Module, found: Places) -> nn.Module:
    """A copy of the user's module with stubs in these places."""
    small = successor(model)
    for path, (gives, count) in found.items():
        put(small, path, Stub(small.get_submodule(path), gives, count))
    return small


def places(
    model: nn.Module,
    network: Network,
    blocks: Sequence[Block],
    called: Mapping[str, int],
    *,
    whole: bool = True,
) -> Places:
    """The largest modules of which nothing is left without these blocks.

    Args:
        model: the user's module.
        network: its trace.
        blocks: what goes.
        called: modules that the forward calls, with their outputs (:func:`outputs`).
        whole: whether modules that hand on their input are among them, or only their parts.
    """
    graph = network.captured.graph.live
    after, renamed = without_nodes(graph, {block.add: block.trunk for block in blocks})
    inside = _by_module(graph)
    found: dict[str, tuple[Gives, int]] = {}
    for path, _ in model.named_modules(remove_duplicate=False):
        own = inside.get(path, frozenset())
        parents = (path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1))
        if not path or not own or path not in called or any(p in found for p in parents):
            continue
        if any(name in after.by_name for name in own):
            continue
        leaving = (n for n in own & renamed.keys() if {u.name for u in graph.users[n]} - own)
        gives: Gives = "input" if any(True for _ in leaving) else "zeros"
        if whole or gives == "zeros":
            found[path] = (gives, called[path])
    return found


def _by_module(graph: Graph) -> dict[str, frozenset[str]]:
    """Names of the calls made within each module that return tensors, and not sizes of them."""
    found: dict[str, set[str]] = {}
    for node in (n for n in graph.calls if isinstance(n.value, Spec | tuple)):
        parts = node.scope.split(".")
        for count in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:count]), set()).add(node.name)
    return {path: frozenset(names) for path, names in found.items()}


def outputs(model: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """Modules that are called, by path: 0 where they return a tensor, else the length of a tuple.

    Those that return anything else, or now this and now that, are left out: no stub does so.
    """
    seen: dict[int, set[int]] = {}

    def note(module: nn.Module, _: object, output: object) -> None:
        seen.setdefault(id(module), set()).add(_form(output))

    handle = register_module_forward_hook(note)
    try:
        with plain_attention(model):
            check_runs(model, example_inputs)
    finally:
        handle.remove()
    named = model.named_modules(remove_duplicate=False)
    forms = ((path, seen.get(id(module), set())) for path, module in named)
    return {path: min(form) for path, form in forms if len(form) == 1 and min(form) >= 0}


def _form(output: object) -> int:
    """0 for a tensor, the length of a plain tuple that begins with one, -1 for the rest."""
    if isinstance(output, Tensor):
        return 0
    return len(output) if type(output) is tuple and isinstance(output[0], Tensor) else -1


# --- the graph ---------------------------------------------------------------------------------


def bypassed(model: nn.Module, network: Network, blocks: Sequence[Block]) -> GraphModel:
    """The captured graph without these blocks, as a module with tensors of its own."""
    captured = network.captured
    graph = without_blocks(captured.graph.live, blocks)
    with torch.no_grad():
        return copied(graph_model(model, Capture(graph, captured.constants)))
