"""Random small networks as data: chains and graphs of the layers that convolutional networks use.

A network is a list of steps, each with the numbers of the values that it reads, so that it can be
copied, pickled and shrunk. Every forward is written with shapes, never with literal sizes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {
    "max_pool": {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d},
    "avg_pool": {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d},
}
ACTIVATIONS = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Step:
    kind: str
    reads: tuple[int, ...]
    layers: tuple[str, ...] = ()
    number: int = 0


class RandomNet(nn.Module):
    """Runs steps; value 0 is the input."""

    def __init__(self, rank: int, steps: list[Step], layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.rank, self.steps = rank, steps
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            inputs = [values[i] for i in step.reads]
            layers = [self.layers[name] for name in step.layers]
            values.append(self.run(step, inputs, layers))
        return values[-1]

    def run(self, step: Step, inputs: list[Tensor], layers: list[nn.Module]) -> Tensor:
        x = inputs[0]
        if step.kind == "layers":
            for layer in layers:
                x = layer(x)
            return x
        if step.kind in ACTIVATIONS:
            return ACTIVATIONS[step.kind](x)
        if step.kind in POOLS:
            return POOLS[step.kind][self.rank](x, 2)
        return getattr(self, f"_{step.kind}")(inputs, layers, step.number)

    def _add(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        return inputs[0] + inputs[1]

    def _multiply(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        return inputs[0] * inputs[1]

    def _concatenate(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        return torch.cat(inputs, 1)

    def _gate(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        x = inputs[0]
        pooled = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        return x * torch.sigmoid(layers[1](torch.relu(layers[0](pooled))))

    def _chunk(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        value, gate = inputs[0].chunk(2, 1)
        return value * torch.sigmoid(gate)

    def _split(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        x = inputs[0]
        first, second = x.split([number, x.shape[1] - number], 1)
        return torch.cat([second, first], 1)

    def _shuffle(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        x = inputs[0]
        grouped = x.view(x.shape[0], number, x.shape[1] // number, *x.shape[2:])
        return grouped.transpose(1, 2).reshape(x.shape)

    def _pixels(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        return F.pixel_shuffle(inputs[0], 2)

    def _inplace(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        return (inputs[0] + 0.5).mul_(0.7).relu_()

    def _mean(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        return layers[0](inputs[0].flatten(2).mean(2))

    def _flatten(self, inputs: list[Tensor], layers: list[nn.Module], number: int) -> Tensor:
        return layers[1](torch.relu(layers[0](inputs[0].flatten(1))))


class _Builder:
    """Draws steps; ``open`` maps values of the current extent to their channels."""

    def __init__(self, draw, rank: int) -> None:
        self.draw, self.rank = draw, rank
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self.channels, self.extent = 2, 4
        self.open: dict[int, int] = {0: self.channels}

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self) -> tuple[int, int]:
        return self.draw(st.sampled_from(sorted(self.open.items())))

    def layer(self, module: nn.Module) -> str:
        name = f"l{len(self.layers)}"
        self.layers[name] = module
        return name

    def push(self, step: Step, channels: int, extent: int | None = None) -> int:
        self.steps.append(step)
        if extent is not None and extent != self.extent:
            self.extent = extent
            self.open.clear()
        self.open[len(self.steps)] = channels
        return len(self.steps)

    def conv(self, i: int, o: int, kernel: int, groups: int = 1, dilation: int = 1) -> nn.Module:
        bias = self.draw(st.booleans())
        padding = dilation * (kernel // 2)
        return CONV[self.rank](
            i, o, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias
        )

    # --- one method per kind of step ---

    def add_conv(self) -> int:
        x, c = self.pick()
        o = self.number(2, 8)
        conv = self.conv(c, o, self.draw(st.sampled_from([1, 3])), 1, self.number(1, 2))
        return self.push(Step("layers", (x,), (self.layer(conv),)), o)

    def add_strided(self) -> int:
        x, c = self.pick()
        o = self.number(2, 8)
        conv = CONV[self.rank](c, o, 3, stride=2, padding=1)
        return self.push(Step("layers", (x,), (self.layer(conv),)), o, (self.extent + 1) // 2)

    def add_grouped(self) -> int:
        x, c = self.pick()
        groups = next(g for g in (4, 3, 2, 1) if c % g == 0)
        o = groups * self.number(1, 3)
        return self.push(Step("layers", (x,), (self.layer(self.conv(c, o, 3, groups)),)), o)

    def add_depthwise(self) -> int:
        x, c = self.pick()
        o = c * self.number(1, 2)
        return self.push(Step("layers", (x,), (self.layer(self.conv(c, o, 3, c)),)), o)

    def add_norm(self) -> int:
        x, c = self.pick()
        norm = NORM[self.rank](c, affine=self.draw(st.booleans()))
        return self.push(Step("layers", (x,), (self.layer(norm),)), c)

    def add_activation(self) -> int:
        x, c = self.pick()
        return self.push(Step(self.draw(st.sampled_from(sorted(ACTIVATIONS))), (x,)), c)

    def add_prelu(self) -> int:
        x, c = self.pick()
        return self.push(Step("layers", (x,), (self.layer(nn.PReLU(c)),)), c)

    def add_pair(self) -> int:
        x, c = self.pick()
        others = [i for i, channels in self.open.items() if channels == c and i != x]
        kind = self.draw(st.sampled_from(["add", "multiply"]))
        if others:
            y = self.draw(st.sampled_from(sorted(others)))
        else:
            y = self.push(Step("layers", (x,), (self.layer(self.conv(c, c, 1)),)), c)
        return self.push(Step(kind, (x, y)), c)

    def add_concatenation(self) -> int:
        (x, c), (y, d) = self.pick(), self.pick()
        return self.push(Step("concatenate", (x, y)), c + d)

    def add_gate(self) -> int:
        x, c = self.pick()
        hidden = self.number(1, 4)
        names = self.layer(self.conv(c, hidden, 1)), self.layer(self.conv(hidden, c, 1))
        return self.push(Step("gate", (x,), names), c)

    def add_halves(self) -> int:
        x, c = self.pick()
        return self.push(Step("chunk", (x,)), c // 2) if c % 2 == 0 else self.add_split()

    def add_split(self) -> int:
        x, c = self.pick()
        return self.push(Step("split", (x,), number=self.number(1, c - 1)), c) if c > 1 else x

    def add_shuffle(self) -> int:
        x, c = self.pick()
        groups = next(g for g in (3, 2, 1) if c % g == 0)
        return self.push(Step("shuffle", (x,), number=groups), c)

    def add_reuse(self) -> int:
        x, c = self.pick()
        name = self.layer(self.conv(c, c, 3))
        return self.push(Step("layers", (x,), (name, name)), c)

    def add_shared(self) -> int:
        x, c = self.pick()
        first, second = self.conv(c, c, 1), self.conv(c, c, 1)
        second.weight = first.weight
        return self.push(Step("layers", (x,), (self.layer(first), self.layer(second))), c)

    def add_transposed(self) -> int:
        x, c = self.pick()
        o = self.number(2, 6)
        conv = TRANSPOSED[self.rank](c, o, 3, padding=1, bias=self.draw(st.booleans()))
        return self.push(Step("layers", (x,), (self.layer(conv),)), o)

    def add_inplace(self) -> int:
        x, c = self.pick()
        return self.push(Step("inplace", (x,)), c)

    def add_pool(self) -> int:
        x, c = self.pick()
        if self.extent < 2:
            return x
        kind = self.draw(st.sampled_from(sorted(POOLS)))
        return self.push(Step(kind, (x,)), c, self.extent // 2)

    def add_pixels(self) -> int:
        x, c = self.pick()
        if self.rank != 2 or c % 4 or self.extent > 4:
            return x
        return self.push(Step("pixels", (x,)), c // 4, self.extent * 2)

    def finish(self) -> RandomNet:
        x = len(self.steps)
        c = self.open[x]
        if self.draw(st.booleans()):
            self.push(Step("mean", (x,), (self.layer(nn.Linear(c, 3)),)), 3)
        else:
            size, hidden = c * self.extent**self.rank, self.number(2, 6)
            names = self.layer(nn.Linear(size, hidden)), self.layer(nn.Linear(hidden, 3))
            self.push(Step("flatten", (x,), names), 3)
        return RandomNet(self.rank, self.steps, self.layers)


KINDS = sorted(name for name in vars(_Builder) if name.startswith("add_"))


@st.composite
def networks(draw) -> tuple[RandomNet, Tensor]:
    """A network in float64 with nothing at its initial value, and inputs for it."""
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 99)))
        builder = _Builder(draw, draw(st.sampled_from([2, 2, 2, 1, 3])))
        builder.add_conv()
        for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=9)):
            getattr(builder, kind)()
        net = builder.finish().double().eval()
        return settled(net), torch.randn(2, 2, *[4] * builder.rank, dtype=torch.float64)


def settled(net: nn.Module) -> nn.Module:
    """The network with BatchNorms as after training: no mean of 0, no scale of 1."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net
