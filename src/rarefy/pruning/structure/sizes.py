"""A plan and what a forward states of its sizes -> attributes that follow, and where it fails.

:func:`solve` gives every attribute the value that the smaller tensors need, or names the equations
that no value satisfies. :func:`agree` changes a plan so that the user's own forward can carry it
out: groups that must shrink together (the width of a stream and the heads inside it) do so by one
share, and those that cannot follow are left whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import gcd
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rarefy.graph.groups import Mask
from rarefy.graph.labels import Atoms
from rarefy.graph.program import Spec
from rarefy.graph.rules.creation import TABLES
from rarefy.graph.trace import Network
from rarefy.pruning.plan import Plan, Scores
from rarefy.pruning.structure.expressions import (
    OPERATIONS,
    TESTS,
    Apply,
    Attribute,
    Equation,
    Expression,
    Extent,
    Number,
    leaves,
)

Values = Mapping[Attribute, int]
"""The attributes whose new value is known."""


@dataclass(frozen=True)
class Solution:
    """What a plan means for a forward.

    Attributes:
        values: the value that every attribute needs.
        broken: equations that do not hold, whatever the attributes are.
    """

    values: Values
    broken: tuple[Equation, ...]


class Sizes:
    """What the forward of a network states of its sizes, as far as pruning can change it.

    Args:
        network: the trace.
        equations: of its forward.
    """

    def __init__(self, network: Network, equations: Sequence[Equation]) -> None:
        self.network = network
        stated = [e for e in equations if _is_known(network, e)]
        self.clusters = tuple(_clusters(network, [*stated, *_lasting(network)]))

    @cached_property
    def parts(self) -> tuple[frozenset[int], ...]:
        """Numbers of groups, those together that the forward's sizes couple."""
        coupled = [frozenset(c.groups) for c in self.clusters]
        single = set(range(len(self.network.groups))).difference(*coupled)
        return (*coupled, *(frozenset([g]) for g in sorted(single)))

    def solve(self, plan: Plan) -> Solution:
        """The attributes that fit a plan, and the equations that nothing fits."""
        values: dict[Attribute, int] = {}
        broken: list[Equation] = []
        for cluster in self.clusters:
            found = cluster.solve(plan)
            values |= found.values
            broken += found.broken
        return Solution(values, tuple(broken))

    def agree(
        self,
        plan: Plan,
        scores: Scores,
        floors: Mapping[int, int],
        round_to: int = 1,
        *,
        force: bool = False,
    ) -> Plan:
        """A plan near the one given that the forward can carry out.

        Where the code states a plain number, nothing is changed unless ``force`` is given: such
        groups would have to stay whole.

        Args:
            plan: what should go.
            scores: importance of every unit, one array per group.
            floors: the number of units that each group keeps at least; groups without stay whole.
            round_to: what the number of kept units is a multiple of, in groups with more units.
            force: leave units in place also where the code states a plain number.
        """
        for cluster in self.clusters:
            broken = cluster.broken(plan.removed)
            if not broken:
                continue
            if force or not any(_is_hard(e) for e in broken):
                plan = cluster.settle(plan, scores, floors, round_to, broken[0])
                continue
            found = cluster.yielding.settle(plan, scores, floors, round_to, broken[0])
            if not cluster.broken(found.removed):  # what else has to stay holds the number, too
                plan = found
        return plan

    def together(self, groups: Collection[int]) -> Iterator[tuple[int, ...]]:
        """Of these, groups that may have to shrink by one share for the forward to hold."""
        for cluster in self.clusters:
            for shrinking in cluster.kinds(groups):
                if len(shrinking) > 1:
                    yield shrinking


class _Cluster:
    """Equations that share attributes or groups of units."""

    def __init__(self, network: Network, equations: Sequence[Equation], groups: Sequence[int]):
        self.network = network
        self.equations = tuple(equations)
        self.groups = tuple(groups)
        self._known: dict[bytes, tuple[Equation, ...]] = {}

    @cached_property
    def yielding(self) -> _Cluster:
        """The same without the plain numbers that the code states."""
        soft = [e for e in self.equations if not _is_hard(e)]
        return _Cluster(self.network, soft, self.groups)

    def solve(self, plan: Plan) -> Solution:
        """Give values to attributes, one equation after the other."""
        values: dict[Attribute, int] = {}
        broken: list[Equation] = []
        pending = list(self.equations)
        while pending:
            later = [e for e in pending if not self._settled(e, plan, values, broken)]
            if len(later) == len(pending):  # several unknown: the least stays as it is
                unknown = [a for a in _attributes(later[0]) if a not in values]
                least = min(unknown, key=lambda a: a.value)
                values[least] = least.value
            pending = later
        return Solution(values, tuple(broken))

    def broken(self, removed: Mask) -> tuple[Equation, ...]:
        """Equations that do not hold without these units; remembered by these."""
        key = np.packbits(removed[self._units]).tobytes()
        if key not in self._known:
            self._known[key] = self.solve(Plan.of(self.network, removed)).broken
        return self._known[key]

    def _settled(
        self, equation: Equation, plan: Plan, values: dict[Attribute, int], broken: list[Equation]
    ) -> bool:
        """Check an equation or solve it for its one unknown; whether that could be done."""
        left = self._value(equation.left, plan, values)
        right = self._value(equation.right, plan, values)
        if left is not None and right is not None:
            if left != right:
                broken.append(equation)
            return True
        unknown = [a for a in _attributes(equation) if a not in values]
        if len(unknown) != 1 or (left is None and right is None) or _is_test(equation):
            return False
        side, target = (equation.left, right) if left is None else (equation.right, left)
        assert target is not None
        found = self._invert(side, target, plan, values)
        if found is None:
            broken.append(equation)
        else:
            values[unknown[0]] = found
        return True

    def _value(self, expression: Expression, plan: Plan, values: Values) -> int | None:
        """The value under a plan; None where an attribute is not known yet."""
        if isinstance(expression, Number):
            return expression.value
        if isinstance(expression, Attribute):
            return values.get(expression)
        if isinstance(expression, Extent):
            size, atoms = _extent(self.network, expression)
            return size if atoms is None else size - int(plan.gone[atoms].sum())
        left = self._value(expression.left, plan, values)
        right = self._value(expression.right, plan, values)
        if left is None or right is None:
            return None
        if expression.op in TESTS:
            return int(TESTS[expression.op](left, right))
        if right == 0 and expression.op not in ("add", "sub", "mul"):
            return None
        return OPERATIONS[expression.op](left, right)

    def _invert(
        self, expression: Expression, target: int, plan: Plan, values: Values
    ) -> int | None:
        """The value of the one unknown attribute that makes ``expression`` equal ``target``."""
        if isinstance(expression, Attribute):
            return target if target > 0 else None
        assert isinstance(expression, Apply)
        left = self._value(expression.left, plan, values)
        right = self._value(expression.right, plan, values)
        op = expression.op
        if left is None and right is not None:
            back = {"add": target - right, "sub": target + right, "floordiv": target * right}
            if op == "mul" and right and target % right == 0:
                back["mul"] = target // right
            known = back.get(op)
            return None if known is None else self._invert(expression.left, known, plan, values)
        if right is None and left is not None:
            back = {"add": target - left, "sub": left - target}
            if op == "mul" and left and target % left == 0:
                back["mul"] = target // left
            if op == "floordiv" and target and left % target == 0:
                back["floordiv"] = left // target
            known = back.get(op)
            return None if known is None else self._invert(expression.right, known, plan, values)
        return None

    # --- plans that hold -----------------------------------------------------------------------

    def settle(
        self,
        plan: Plan,
        scores: Scores,
        floors: Mapping[int, int],
        round_to: int,
        cause: Equation,
    ) -> Plan:
        """The first plan that holds: all groups by one share, or without those of some kind.

        Plans to which one without any of these units would be nearer are passed over.
        """
        share = float(plan.removed[self._units].mean())
        for shrinking in self.kinds(floors):
            for gone in _shares([self._size(g) for g in shrinking], share):
                counts = {g: round(self._size(g) * gone) for g in shrinking}
                far = sum(counts.values()) > 2 * share * len(self._units) + 1e-9
                if far or not self._allowed(counts, floors, round_to):
                    continue
                removed = self._without(plan, counts, scores)
                if not self.broken(removed):
                    return self._plan(plan, removed, counts, cause)
        return plan

    def kinds(self, groups: Collection[int]) -> Iterator[tuple[int, ...]]:
        """Of these groups, those that shrink where groups of some kinds stay whole."""
        for whole in self._left_whole():
            yield tuple(g for g in self.groups if self._kind(g) not in whole and g in groups)

    def _allowed(self, counts: Mapping[int, int], floors: Mapping[int, int], to: int) -> bool:
        """Whether groups keep what they must, in multiples where these are asked for."""
        kept = {g: self._size(g) - n for g, n in counts.items()}
        rounded = all(n % to == 0 or self._size(g) <= to for g, n in kept.items())
        return rounded and all(n >= floors[g] for g, n in kept.items())

    def _size(self, group: int) -> int:
        return len(self.network.groups[group])

    @cached_property
    def _units(self) -> Atoms:
        return np.concatenate([self.network.groups[g].units for g in self.groups])

    def _left_whole(self) -> Iterator[frozenset[_Kind]]:
        """Kinds of groups that stay whole, the fewest units first; in the end all of them."""
        held: dict[_Kind, int] = {}
        for g in self.groups:
            held[self._kind(g)] = held.get(self._kind(g), 0) + self._size(g)
        few = range(len(held) + 1) if len(held) <= MOST_KINDS else (0, 1, len(held))
        choices = [frozenset(c) for r in few for c in combinations(sorted(held), r)]
        return iter(sorted(choices, key=lambda c: sum(held[kind] for kind in c)))

    def _kind(self, group: int) -> _Kind:
        """Groups of one kind stay whole or shrink together: all heads, all positions in heads.

        The number of units, how far the entries of a unit are from each other, and how many tensors
        it has a part in.
        """
        members = self.network.groups[group].members
        indices = members[0].indices
        apart = int(indices[0, 1] - indices[0, 0]) if indices.shape[1] > 1 else 0
        return self._size(group), apart, len(members)

    def _without(self, plan: Plan, counts: Mapping[int, int], scores: Scores) -> Mask:
        """This many units of each group removed, those of the least scores."""
        removed: Mask = plan.removed.copy()
        removed[self._units] = False
        for g, count in counts.items():
            order = np.argsort(scores[g], kind="stable")
            removed[self.network.groups[g].units[order[:count]]] = True
        return removed

    def _plan(
        self, before: Plan, removed: Mask, counts: Mapping[int, int], cause: Equation
    ) -> Plan:
        """The plan without these units, and why groups that were to shrink stay whole."""
        reason = "has to fit other sizes in the forward"
        if cause.source:
            reason += f" (at {cause.source})"
        whole = {
            g: reason for g in self.groups if not counts.get(g) and _any(before, self.network, g)
        }
        return Plan.of(self.network, removed, {**before.whole, **whole})


def _any(plan: Plan, network: Network, group: int) -> bool:
    """Whether the plan would take a unit of the group."""
    return bool(plan.removed[network.groups[group].units].any())


def _shares(sizes: Sequence[int], wanted: float) -> Iterator[float]:
    """Shares that take whole numbers of units of all groups, the nearest to ``wanted`` first."""
    if not sizes:
        yield 0.0
        return
    step = gcd(*sizes)
    around = sorted(range(1, step), key=lambda n: (abs(n / step - wanted), n))
    yield from (n / step for n in around[:MOST_SHARES])


_Kind: TypeAlias = tuple[int, int, int]

MOST_SHARES = 16
"""How many shares are tried before groups are left whole."""

MOST_KINDS = 6
"""Number of kinds of groups up to which all ways to leave some whole are tried."""


def _is_hard(equation: Equation) -> bool:
    """Whether the code states a plain number, so that only leaving units in place satisfies it."""
    return equation.literal and not equation.yields


def _is_test(equation: Equation) -> bool:
    return isinstance(equation.left, Apply) and equation.left.op in TESTS


def _attributes(equation: Equation) -> Iterator[Attribute]:
    """Attributes in an equation, each as often as it stands there."""
    for side in (equation.left, equation.right):
        yield from (x for x in leaves(side) if isinstance(x, Attribute))


def _extent(network: Network, extent: Extent) -> tuple[int, Atoms | None]:
    """The size of a tensor along a dimension, and the labels there."""
    if isinstance(extent.dim, str):
        counted = network.flow.counts[extent.node, extent.dim]
        return len(counted), counted
    value, labels = network.captured.graph.by_name[extent.node].value, None
    carried = network.flow.labels.get(extent.node)
    if extent.part is not None and isinstance(value, tuple):
        value = value[extent.part]
        carried = carried[extent.part] if carried is not None else None
    assert isinstance(value, Spec)
    if carried:
        labels = carried[extent.dim]
    return value.shape[extent.dim], labels


def _is_known(network: Network, equation: Equation) -> bool:
    """Whether all that an equation counts was counted in the walk over the graph."""
    found = [x for s in (equation.left, equation.right) for x in leaves(s)]
    named = [(x.node, x.dim) for x in found if isinstance(x, Extent) and isinstance(x.dim, str)]
    return all(name in network.flow.counts for name in named)


def _lasting(network: Network) -> Iterator[Equation]:
    """What a forward needs as it was, whatever it states.

    Attention divides by the root of its heads' size where no other scale is given, and a tensor
    whose entries differ (a ramp, a constant) comes out with all of them.
    """
    graph = network.captured.graph
    for name in network.flow.implicit_scale:
        query = graph.by_name[name].args[0].name
        yield from _stays(network, Extent(query, None, len(graph.by_name[query].shape) - 1))
    for node in graph.nodes:
        made = node.op == "tensor" and node.path in network.flow.made
        if (made or node.kind in TABLES) and isinstance(node.value, Spec):
            for dim in range(len(node.shape)):
                yield from _stays(network, Extent(node.name, None, dim))


def _stays(network: Network, extent: Extent) -> Iterator[Equation]:
    size, labels = _extent(network, extent)
    if labels is not None:
        source = network.captured.graph.by_name[extent.node].source
        yield Equation(extent, Number(size), source, yields=True)


def _clusters(network: Network, equations: Sequence[Equation]) -> Iterator[_Cluster]:
    """Equations that can be broken at all, joined where they share an attribute or a group."""
    owner = _owners(network)
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    keys: list[list[object]] = []
    for equation in equations:
        found = [x for s in (equation.left, equation.right) for x in leaves(s)]
        held = {x for x in found if isinstance(x, Attribute)}
        touched = {g for x in found if isinstance(x, Extent) for g in _touched(network, owner, x)}
        keys.append([*held, *touched])
        for key in keys[-1][1:]:
            parent[root(key)] = root(keys[-1][0])
    together: dict[object, tuple[list[Equation], set[int]]] = {}
    for equation, own in zip(equations, keys, strict=True):
        if own:
            members, groups = together.setdefault(root(own[0]), ([], set()))
            members.append(equation)
            groups |= {g for g in own if isinstance(g, int)}
    for members, groups in together.values():
        if groups:
            yield _Cluster(network, members, sorted(groups))


def _owners(network: Network) -> NDArray[np.int64]:
    """For each unit, its group; -1 for units that belong to none."""
    owner = np.full(network.coupling.units, -1, np.int64)
    for number, group in enumerate(network.groups):
        owner[group.units] = number
    return owner


def _touched(network: Network, owner: NDArray[np.int64], extent: Extent) -> set[int]:
    """Groups whose units shrink an extent."""
    atoms = _extent(network, extent)[1]
    if atoms is None:
        return set()
    units = np.unique(network.coupling.pairs(atoms)[0])
    return {int(g) for g in np.unique(owner[units]) if g >= 0}
