"""The metric of a network where it is."""

from __future__ import annotations

from torch import nn

from rarefy.batches import call, evaluating, seeded
from rarefy.metrics import top1
from rarefy.process import replayable
from rarefy.training.networks import device_of, moved
from rarefy.types import Data


def evaluate(model: nn.Module, data: Data) -> float:
    """Top-1 accuracy: the share of labels that have the highest logit, 0 to 1.

    The network is evaluated where it is, in eval mode without gradients; its training flags and
    the global random states are as before afterwards. For logits of several positions,
    ``(B, L, C)`` or ``(B, C, H, W)``, every position labelled other than -100 counts.

    Args:
        model: the network.
        data: labelled batches, see :mod:`rarefy.batches`.

    Raises:
        DataError: the data are empty or not labelled, or labels do not fit the logits.
        InputError: the logits hold NaN.

    Example:
        >>> evaluate(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    device = device_of(model)
    with evaluating(model), seeded(0), replayable(data):
        return top1(lambda x: call(model, moved(x, device)), data, where="evaluate")
