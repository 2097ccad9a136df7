"""Small networks that multiply with a parameter, or with a part of it."""

import torch
from torch import nn

from rarefy.graph.capture import capture
from rarefy.graph.program import Graph


class Reads(nn.Module):
    """A parameter and a bias, read by a function of one's own."""

    def __init__(self, shape, call, bias=None) -> None:
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.randn(shape)), call
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the function gives."""
        return self.call(x, self.weight, self.bias)


def graph(net: nn.Module, *inputs: torch.Tensor) -> Graph:
    """What the network computes of these inputs."""
    return capture(net.eval(), inputs).graph


X = torch.randn(6, 5, 4)
IMAGE = torch.randn(2, 4, 6, 6)
