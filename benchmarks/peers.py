"""What others make of a network, for comparison."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

STEPS = 100
"""Steps in which Torch-Pruning goes towards 95 % of all units, and stops where the share is met."""


def torch_pruning(
    model: nn.Module, example: Tensor, share: float, whole: Sequence[str]
) -> nn.Module:
    """Torch-Pruning, globally by L2 magnitude with its normalization by the mean.

    Args:
        model: the network, which is left as it is.
        example: what it is called with.
        share: of the MACs, as it counts them, that may remain.
        whole: paths of layers whose outputs keep their width.
    """
    import torch_pruning as tp

    small = copy.deepcopy(model)
    before, _ = tp.utils.count_ops_and_params(small, example)
    heads = {m: m.num_heads for m in small.modules() if isinstance(m, nn.MultiheadAttention)}
    pruner = tp.pruner.MagnitudePruner(
        small,
        example,
        importance=tp.importance.MagnitudeImportance(p=2, normalizer="mean"),
        global_pruning=True,
        pruning_ratio=0.95,
        iterative_steps=STEPS,
        ignored_layers=[small.get_submodule(path) for path in whole],
        num_heads=heads,
    )
    for _ in range(STEPS):
        if tp.utils.count_ops_and_params(small, example)[0] <= share * before:
            break
        pruner.step()
    return small.eval()
