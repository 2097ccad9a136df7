"""Residual blocks: branches that the trunk can do without.

In ``trunk + branch(trunk)`` the sum is the trunk where the branch gives zero, so that all that
only the branch needs can go. A branch is what nothing reads but the sum: the operators, parameters
and buffers whose every use leads into it. What it shares with the rest (a normalization before two
parallel branches, a bias of positions for all layers) stays. This is read off the captured graph,
whatever the code calls its modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from rarefy.graph.count import batch_of, graph_macs
from rarefy.graph.declarations import writes
from rarefy.graph.memory import Memory
from rarefy.graph.program import Graph, Node, Ref


@dataclass(frozen=True)
class Block:
    """A residual branch that can be bypassed: without it, the sum is the trunk.

    Attributes:
        name: path of the module that it is, or of the largest module in it.
        add: node that adds the branch to the trunk.
        trunk: node that is left in place of the sum.
        branch: node whose value is added, zero when the block goes; empty for a whole layer, whose
            output ``add`` is and whose input is ``trunk``.
        nodes: names of all nodes that nothing but the branch needs, in order.
        tensors: paths of the parameters and buffers that nothing but the branch reads.
        macs: multiply-accumulate operations of one example.
        params: parameter values.
        macs_share: share of the network's MACs.
        params_share: share of the parameter values that the network reads.
        shared: paths of the parameters that it reads and that stay, as something else reads them.
    """

    name: str
    add: str
    trunk: str
    branch: str
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]
    macs: int
    params: int
    macs_share: float
    params_share: float
    shared: tuple[str, ...] = ()

    def __str__(self) -> str:
        also = f", shares {', '.join(self.shared[:2])}" if self.shared else ""
        return (
            f"{self.name}: {self.macs_share:.1%} of MACs, {self.params_share:.1%} of parameters, "
            f"{len(self.tensors)} tensors{also}"
        )


@dataclass(frozen=True)
class Joint:
    """Two paths that meet, neither of which can be bypassed.

    Attributes:
        node: where they meet.
        scope: path of the module whose forward joins them.
        reason: why neither can be bypassed.
        source: line of the user's code, where known.
    """

    node: str
    scope: str
    reason: str
    source: str

    def __str__(self) -> str:
        place = f" at {self.source}" if self.source else ""
        return f"{self.scope or self.node}: {self.reason}{place}"


@dataclass(frozen=True)
class Depth:
    """What can be bypassed in a network, and what nearly could be.

    Attributes:
        blocks: in the order of their sums.
        joints: where two paths meet and neither can be bypassed, with the reason.
    """

    blocks: tuple[Block, ...]
    joints: tuple[Joint, ...]


def find_blocks(graph: Graph, parameters: Collection[str]) -> Depth:
    """All residual branches of a graph that can be bypassed.

    Args:
        graph: the captured network.
        parameters: paths of its parameters; what else it reads are buffers and constants.
    """
    finder = _Finder(graph, frozenset(parameters))
    found = [f for node in graph.calls if (f := finder.at(node)) is not None]
    blocks = [f for f in found if isinstance(f, Block)]
    joints = tuple(f for f in found if isinstance(f, Joint))
    return Depth(_named(graph, blocks, finder.parameters), joints)


SUMS = frozenset(("add", "add_", "sub", "sub_"))
"""Operators that give their first operand where the second is zero; sums also the other way."""

SAME = frozenset(
    "dropout feature_dropout alpha_dropout contiguous clone detach alias to view reshape expand "
    "lift_fresh _to_copy view_as expand_as type_as".split()
)
"""Operators that may give the value that they are given, which their shapes tell."""

_OTHERS: Mapping[str, str] = {
    "cat": "its paths are concatenated, so that nothing can stand in for one of them",
    "mul": "its paths are multiplied, so that without one of them nothing is left",
}
"""Other operators that join paths -> why none can be bypassed."""


class _Finder:
    """Searches one graph."""

    def __init__(self, graph: Graph, parameters: frozenset[str]) -> None:
        self.graph, self.parameters = graph, parameters
        self.memory = Memory(graph)
        self.rank = {node.name: rank for rank, node in enumerate(graph.nodes)}
        self.macs = graph_macs(graph, lambda name: graph.by_name[name].shape)
        self.batch = batch_of(graph)
        self.total = max(sum(self.macs.values()), 1)
        read = [n for n in graph.nodes if n.op == "tensor" and n.path in parameters]
        self.values = max(sum(prod(n.shape) for n in read), 1)
        self.varying = _varying(graph)
        self.written: dict[str, list[str]] = {}  # node -> writes in place that it depends on
        for name in (n.name for n in graph.calls if writes(n.op)):
            for reader in self.memory.effects[name]:
                self.written.setdefault(reader, []).append(name)

    def at(self, node: Node) -> Block | Joint | None:
        """What meets at a node: a block and its trunk, two paths, or nothing of interest."""
        operands = _operands(node)
        if len(operands) < 2 or not all(name in self.varying for name in operands):
            return None
        if node.kind.removesuffix("_") in _OTHERS:
            return self._other(node, operands)
        if node.kind not in SUMS:
            return None
        reasons: dict[str, int] = {}
        for trunk, branch in _ways(node, operands):
            region = self._region(node, branch, trunk)
            if not self._costs(region) or not self._meets(trunk, branch):
                continue
            reason = self._fault(node, trunk, branch, region)
            if not reason:
                return self._block(node, trunk, branch, region)
            reasons[reason] = sum(self.macs.get(name, 0) for name in region)
        if not reasons:
            return None
        longest = max(reasons, key=reasons.__getitem__)  # the other path is the shortcut
        return Joint(node.name, node.scope, longest, node.source)

    def _other(self, node: Node, operands: Sequence[str]) -> Joint | None:
        """A path that returns to its own start in another way than by a sum."""
        for branch in operands:
            region = self._region(node, branch)
            sources = {name for part in region for name in self.graph.by_name[part].inputs}
            if self._costs(region) and sources & (set(operands) - {branch}):
                reason = _OTHERS[node.kind.removesuffix("_")]
                return Joint(node.name, node.scope, reason, node.source)
        return None

    def _region(self, node: Node, branch: str, trunk: str = "") -> list[str]:
        """The nodes whose every effect leads through ``branch`` into ``node``, in order.

        With a trunk, those are among them that nothing needs where it takes the node's place.
        """
        inside: set[str] = set()
        stays = self._origin(trunk) if trunk else ""
        pending = {branch, trunk} - {""}
        while pending:
            name = max(pending, key=self.rank.__getitem__)
            pending.discard(name)
            own = self.graph.by_name[name]
            effects = self.memory.effects[name]
            if own.op == "input" or name == stays or not effects:
                continue
            if all(user in inside or user == node.name for user in effects):
                inside.add(name)
                pending.update(own.inputs)
                pending.update(self.written.get(name, ()))
        return sorted(inside, key=self.rank.__getitem__) if branch in inside else []

    def _origin(self, trunk: str) -> str:
        """The node whose value the trunk is, without casts that change nothing."""
        node = self.graph.by_name[trunk]
        while node.kind in ("to", "alias"):
            source = self.graph.by_name[node.inputs[0]]
            if source.value != node.value:
                break
            node = source
        return node.name

    def _meets(self, trunk: str, branch: str) -> bool:
        """Whether both are activations of one shape, or the branch is computed from the trunk."""
        same = self.graph.by_name[trunk].value == self.graph.by_name[branch].value
        return same or self._leads(trunk, branch)

    def _costs(self, region: Sequence[str]) -> bool:
        """Whether anything is saved without these nodes."""
        return any(self.macs.get(name) or self._is_parameter(name) for name in region)

    def _is_parameter(self, name: str) -> bool:
        node = self.graph.by_name[name]
        return node.op == "tensor" and node.path in self.parameters

    def _fault(self, node: Node, trunk: str, branch: str, region: Sequence[str]) -> str:
        """Why the sum is not the trunk without the branch; empty where it is."""
        given = self.graph.by_name[trunk]
        if not self._leads(trunk, branch):
            return f"its shortcut is no identity: {given.kind} in {given.scope or 'forward'}"
        if given.value != node.value:
            return "the sum has another shape or type than the trunk"
        inside = {name for name in region if self.graph.by_name[name].op != "tensor"}
        for name in (*region, *((node.name,) if node.args[0] == Ref(branch) else ())):
            if writes(self.graph.by_name[name].op) and self.memory.owner[name] not in inside:
                return f"its branch writes into a value from outside ({name})"
        return ""

    def _leads(self, trunk: str, branch: str) -> bool:
        """Whether the branch is computed from the trunk, or from what the trunk was before."""
        stem = self._stem(trunk)
        first = min(self.rank[name] for name in stem)
        pending, seen = [branch], {branch}
        while pending:
            name = pending.pop()
            if name in stem:
                return True
            for source in self.graph.by_name[name].inputs:
                if source not in seen and self.rank[source] >= first:
                    seen.add(source)
                    pending.append(source)
        return False

    def _stem(self, trunk: str) -> set[str]:
        """The trunk, and the values that it is the sum of."""
        found: set[str] = set()
        pending = [trunk]
        while pending:
            node = self.graph.by_name[pending.pop()]
            if node.name in found or node.name not in self.varying:
                continue
            found.add(node.name)
            operands = _operands(node)
            same = [n for n in operands if self.graph.by_name[n].value == node.value]
            if node.kind in SUMS:
                pending += same
            elif node.kind.removesuffix("_") in SAME:
                pending += same[:1]
        return found

    def _block(self, node: Node, trunk: str, branch: str, region: Sequence[str]) -> Block:
        nodes = [self.graph.by_name[name] for name in region]
        tensors = [n for n in nodes if n.op == "tensor"]
        params = sum(prod(n.shape) for n in tensors if n.path in self.parameters)
        macs = sum(self.macs.get(n.name, 0) for n in nodes)
        read = {name for n in nodes for name in n.inputs if self._is_parameter(name)}
        return Block(
            name="",
            add=node.name,
            trunk=self._origin(trunk),
            branch=branch,
            nodes=tuple(region),
            tensors=tuple(n.path for n in tensors),
            macs=macs // self.batch,
            params=params,
            macs_share=macs / self.total,
            params_share=params / self.values,
            shared=tuple(
                self.graph.by_name[n].path
                for n in sorted(read - set(region), key=self.rank.get)  # type: ignore[arg-type]
            ),
        )


def _operands(node: Node) -> list[str]:
    """Names of the tensors that a node joins or passes on."""
    given = node.args[0] if node.kind == "cat" and node.args else node.args[:2]
    return [arg.name for arg in given if isinstance(arg, Ref)] if given else []


def _ways(node: Node, operands: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(trunk, branch) of a sum: a trunk that is subtracted or scaled is no trunk."""
    first, second = operands
    yield first, second
    if node.kind.startswith("add") and node.options.get("alpha", 1) == 1:
        yield second, first


def _varying(graph: Graph) -> frozenset[str]:
    """Nodes whose value depends on the inputs."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op == "input" or not found.isdisjoint(node.inputs):
            found.add(node.name)
    return frozenset(found)


# --- names -------------------------------------------------------------------------------------


def _named(graph: Graph, blocks: Sequence[Block], parameters: Collection[str]) -> tuple[Block, ...]:
    """Blocks under the path of the module that they share, or else of the largest in them."""
    common = [_common([graph.by_name[n].scope for n in _calls(graph, b)]) for b in blocks]
    held = [n for n in graph.nodes if n.op == "tensor" and n.path in parameters]
    sizes = {node.path: prod(node.shape) for node in held}
    names: list[str] = []
    for block, scope in zip(blocks, common, strict=True):
        alone = scope and sum(_within(other, scope) for other in common) == 1
        name = scope if alone else _largest(block, scope, sizes)
        names.append(name if name not in names else f"{name} ({block.add})")
    return tuple(replace(b, name=name) for b, name in zip(blocks, names, strict=True))


def _calls(graph: Graph, block: Block) -> list[str]:
    return [name for name in block.nodes if graph.by_name[name].op != "tensor"]


def _within(path: str, scope: str) -> bool:
    return f"{path}.".startswith(f"{scope}.")


def _common(scopes: Sequence[str]) -> str:
    """The longest path that all of these begin with."""
    parts = [scope.split(".") for scope in scopes]
    found: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        found.append(level[0])
    return ".".join(found)


def _largest(block: Block, scope: str, sizes: Mapping[str, int]) -> str:
    """The module directly below ``scope`` that holds most of a block's parameters."""
    held: dict[str, int] = {}
    depth = len(scope.split(".")) if scope else 0
    for path in (*block.tensors, *block.shared):
        owner = path.rpartition(".")[0]
        below = not scope or _within(owner, scope)
        child = ".".join(owner.split(".")[: depth + 1]) if below else owner
        held[child] = held.get(child, 0) + sizes.get(path, 0)
    return (max(held, key=held.__getitem__) if held else "") or scope or block.add
