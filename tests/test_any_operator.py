"""Any operator, with a rule or without one, on any labelled arguments: carried or frozen.

Arguments are drawn from an operator's declaration until it runs on them. Whatever it computes goes
on to a last layer, and removing units must equal masking them.
"""

import random
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carrying import X, check_proven
from rarefy.errors import CaptureError, InputError, ProofError
from rarefy.graph.declarations import is_random
from rarefy.graph.ops import RULES, find
from rarefy.graph.trace import trace

torch.set_num_threads(1)

OTHERS = """
renorm unique_consecutive median mode kthvalue histc cov corrcoef trapezoid diff cross
cartesian_prod combinations vander take put masked_select masked_scatter nonzero argwhere
rot90 block_diag diag_embed diagonal_scatter as_strided unfold_backward trace logdet det inverse
pinverse linalg_inv linalg_qr linalg_svd cholesky_solve triangular_solve matrix_power matrix_exp
tensordot cdist pdist pairwise_distance dist gcd lcm frexp ldexp nextafter heaviside polygamma
igamma special_zeta special_bessel_y0 i0 sinc angle signbit trunc frac bincount searchsorted
cummax cummin logcumsumexp aminmax quantile nanmedian nanquantile std_mean var_mean
fractional_max_pool2d lp_pool2d unique_dim index_reduce scatter_reduce segment_reduce
affine_grid_generator crow_indices nuclear_norm hinge_embedding_loss huber_loss l1_loss kl_div
upsample_nearest_exact2d bernoulli rand_like randperm narrow_copy select_copy
""".split()
"""Operators, most of which have no rule."""

MAKES = {
    "rows": lambda n, y, z: y,
    "others": lambda n, y, z: z,
    "heads": lambda n, y, z: y.reshape(3, 2, 4),
    "image": lambda n, y, z: y[:, :, None, None] * torch.linspace(0.5, 2, 16).view(4, 4),
    "signal": lambda n, y, z: y[:, :, None] * torch.linspace(0.5, 2, 4),
    "line": lambda n, y, z: y.unsqueeze(1),
    "square": lambda n, y, z: y.unsqueeze(2) * z.unsqueeze(1),
    "sum": lambda n, y, z: y.sum(1),
    "table": lambda n, y, z: n.table,
    "row": lambda n, y, z: n.table[0],
    "number": lambda n, y, z: n.table[0, 0],
    "order": lambda n, y, z: n.order,
    "places": lambda n, y, z: (y > 0).long(),
    "few": lambda n, y, z: torch.tensor([0, 2, 1]),
    "mask": lambda n, y, z: y > z,
    "constant": lambda n, y, z: torch.arange(8.0),
}


class AnyNet(nn.Module):
    """Two layers, one operator on what they give, and a last layer over all of its results."""

    def __init__(self, operator: Any, args: tuple[Any, ...], width: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.y, self.z, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(width, 2)
            self.table = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("order", torch.tensor([3, 1, 7, 0, 2, 5, 4, 6]))
        self.operator, self.args = operator, args
        self.eval()

    def results(self, x: Tensor) -> Tensor:
        y, z = self.y(x), self.z(x)

        def made(arg: Any) -> Any:
            if isinstance(arg, list):
                return [made(a) for a in arg]
            return MAKES[arg](self, y, z) if arg in MAKES and isinstance(arg, str) else arg

        args = [made(arg) for arg in self.args]
        if self.operator._schema.is_mutable:
            args[0] = args[0] * 1
        found = [t for t in pytree.tree_leaves(self.operator(*args)) if isinstance(t, Tensor)]
        parts = []
        for t in found:
            real = torch.view_as_real(t) if t.is_complex() else t.to(x.dtype)
            flat = real.flatten(1) if t.ndim > 1 and len(t) == 3 else real.reshape(1, -1)
            parts.append(flat.expand(3, -1))
        return torch.cat([y, *parts], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.results(x).tanh())


def drawn(draw: random.Random, argument: torch.Argument) -> Any:
    """A value for one argument, by its type and name."""
    kind, name = str(argument.type), argument.name
    if argument.has_default_value() and draw.random() < 0.6:
        return argument.default_value
    if kind.startswith("Optional") and draw.random() < 0.5:
        return None
    if name == "dtype":  # PyTorch reads memory beyond its tables for numbers that are none
        return torch.float64
    inner = kind.removeprefix("Optional[").rstrip("]") if kind.startswith("Optional") else kind
    if inner == "Tensor":
        positions = name in ("index", "indices", "mask", "condition", "repeats")
        places = ["order", "places", "few", "mask"]
        return draw.choice(places if positions else list(MAKES))
    if kind.startswith("List[Optional[Tensor"):
        return [*[None] * draw.randrange(2), draw.choice(["order", "places", "few", "mask"])]
    if kind.startswith("List[Tensor"):
        return [draw.choice(["rows", "others", "square"])] * draw.randrange(1, 4)
    if "List[int" in kind:
        sizes = [[1], [2], [0, 1], [1, 0], [-1], [2, 2], [8], [3, 8], [3, 4, 2], [1, 1], [3, -1]]
        return draw.choice(sizes)
    if inner in ("int", "SymInt", "number", "float", "bool"):
        numbers = {"float": [0.5, 2.0], "bool": [True, False], "number": [0.5, 2, -1]}
        return draw.choice(numbers.get(inner, [0, 1, 2, -1, 4]))
    raise LookupError(kind)


def overloads(name: str) -> list[Any]:
    """Overloads that take a tensor and return at least one."""
    found = []
    for owner in (name, f"{name}_"):
        packet = getattr(torch.ops.aten, owner, None)
        for overload in packet.overloads() if packet else ():
            declared = getattr(packet, overload)._schema
            takes = any("Tensor" in str(a.type) for a in declared.arguments)
            gives = any("Tensor" in str(r.type) for r in declared.returns)
            if takes and gives and not any(a.is_out for a in declared.arguments):
                found.append(getattr(packet, overload))
    return found


def cases(name: str, seed: int) -> Iterator[AnyNet]:
    """Networks around an operator that run."""
    draw = random.Random(f"{name} {seed}")
    known = overloads(name)
    for _ in range(200 if known else 0):
        operator = draw.choice(known)
        try:
            args = tuple(drawn(draw, a) for a in operator._schema.arguments if not a.kwarg_only)
            net = AnyNet(operator, args)
            with torch.no_grad():
                results = net.results(X)
        except (LookupError, RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            continue
        except NotImplementedError:
            continue
        if 8 < results.shape[1] <= 1500 and bool(torch.isfinite(results).all()):
            yield AnyNet(operator, args, results.shape[1])


def check(net: AnyNet) -> bool:
    """Whether the operator can be captured and proven; it must then equal masking."""
    try:
        network = trace(net, X)
    except CaptureError:
        return False
    op = f"aten.{net.operator._schema.name.split('::')[1]}.{net.operator._overloadname}"
    called = any(node.op == op for node in network.captured.graph.nodes)
    if called and find(op) is find("torchvision.nms.default"):
        assert op in network.unknown
    if is_random(op):
        return False
    try:
        check_proven(net, X, network)
    except (InputError, ProofError) as refused:
        found = str(refused)  # random numbers, or none: outside of where the operator is defined
        assert "nothing can be proven" in found or "are no numbers" in found, found
        return False
    return True


LEFT_OUT = """
operator sym_size empty new_empty empty_like empty_strided new_empty_strided lstm gru rnn_tanh
rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
""".split()
"""What leaves memory as it is, and what does not check its arguments before it reads them."""

NAMES = sorted(
    ({op.removeprefix("aten.").split(".")[0] for op in RULES} | set(OTHERS)) - set(LEFT_OUT)
)


@pytest.mark.parametrize("name", [n for n in NAMES if overloads(n)][::6])
def test_any_operator_is_carried_or_frozen(name) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an operator's own, on arguments that make no sense
        for net in islice(cases(name, 0), 1):
            check(net)


def test_the_cases_reach_most_operators() -> None:
    names = NAMES[::12]
    reached = [n for n in names if next(cases(n, 0), None) is not None]
    assert len(reached) > len(names) * 0.7
