"""A moving average of weights while they are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rarefy.copies import copied
from rarefy.training.networks import tensors_of, unexpanded


class Average:
    """The exponential moving average of a network (Polyak and Juditsky 1992).

    After step ``t`` (from 1) the average moves by ``1 - d`` of the way to the weights, with
    ``d = min(decay, (1 + t) / (10 + t))``, so that the first weights are soon forgotten (as in
    TensorFlow's ``ExponentialMovingAverage``; the rise is not in the paper). Until step
    ``(10 decay - 1) / (1 - decay)``, which is 4,490 for 0.998, it is an average over about the last
    tenth of the steps, whatever the decay. Buffers of floating point, such as the statistics of
    BatchNorm, are averaged with the weights that they belong to; other buffers are copied.

    Args:
        model: the network whose weights are averaged.
        decay: in (0, 1), 0.999 for example.
        zeros: whether weights that are exactly zero in the network are zero in the average, so
            that what was pruned stays so.
    """

    def __init__(self, model: nn.Module, decay: float, *, zeros: bool) -> None:
        self.source, self.decay, self.zeros = model, decay, zeros
        self.model = copied(model).requires_grad_(False)
        self.names = [name for name, _ in model.named_parameters()]  # frozen ones are pruned, too

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the network after its so-many-th step, from 1."""
        follow(self.model, self.source, 1 - min(self.decay, (1 + step) / (10 + step)))
        ours, theirs = dict(tensors_of(self.model)), dict(tensors_of(self.source))
        for name in self.names if self.zeros else ():
            ours[name].masked_fill_(theirs[name] == 0, 0.0)

    def state_dict(self) -> Mapping[str, Tensor]:
        """All averaged tensors by name."""
        return dict(tensors_of(self.model))


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, share: float) -> None:
    """Move all tensors of an average by a share of the way to those of its network.

    Tensors that are not of floating point are copied, as are sparse ones and those of 8 bits.
    """
    moves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (_, own), (_, its) in zip(tensors_of(average), tensors_of(network), strict=True):
        target, source = unexpanded(own), unexpanded(its, own)
        if own.is_floating_point() and own.layout is torch.strided and own.dtype.itemsize > 1:
            moves[0].append(target)
            moves[1].append(source)
        else:
            target.copy_(source)
    torch._foreach_lerp_(*moves, share)
