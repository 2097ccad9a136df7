"""The metric of a network where it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from rarefy.batches import evaluating, seeded
from rarefy.errors import InputError, RarefyError, first_line
from rarefy.metrics import Metric, Ratio, Top1, predictor, title
from rarefy.process import on_all, replayable, together
from rarefy.training.shares import divided
from rarefy.types import Data, check_network

if TYPE_CHECKING:
    from accelerate import Accelerator


def evaluate(model: nn.Module, data: Data, *, metric: Metric | None = None) -> float:
    """How good a network is on data: by default its top-1 accuracy, 0 to 1.

    The network is evaluated where it is, in eval mode without gradients; its training flags and
    the global random states are as before afterwards.

    Args:
        model: the network.
        data: batches, see :mod:`rarefy.batches`; labelled for all metrics of rarefy's.
        metric: ``metric(model, data)`` to a number: one of :mod:`rarefy.metrics`, such as
            ``PSNR()`` or ``Perplexity()``, or any function; None for
            :class:`~rarefy.metrics.Top1`.

    Raises:
        DataError: the data are empty or not labelled, or labels do not fit the outputs.
        InputError: the outputs hold NaN, or the metric fails or is no number.

    Example:
        >>> evaluate(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    check_network(model, "evaluate(model)")
    return measured(model, data, metric or Top1(), "evaluate")


def measured(
    model: nn.Module,
    data: Data,
    metric: Metric,
    where: str,
    accelerator: Accelerator | None = None,
) -> float:
    """The metric; with an accelerator the same number on all its processes.

    They share the batches where the metric is a :class:`~rarefy.metrics.Ratio`; any other is
    computed by each of them on all of the data that it has, and that of the first counts.
    """
    shared = accelerator is not None and accelerator.num_processes > 1
    part, parts, sums, value = 0, 1, (0.0, 0.0), math.nan
    if shared and accelerator is not None and not divided(data):
        part, parts = accelerator.process_index, accelerator.num_processes
    with together(accelerator), evaluating(model), seeded(0), replayable(data):
        try:
            if isinstance(metric, Ratio):
                sums = metric.totals(predictor(model), data, where, part, parts)
            else:
                value = float(metric(model, data))
        except RarefyError:
            raise
        except Exception as error:
            raise InputError(
                f"{where}(metric)",
                f"{title(metric)} failed: {first_line(error)}",
                "It is called as metric(model, data) and gives a number",
            ) from error
    if shared and accelerator is not None:
        every = on_all((value, *sums), accelerator)
        value, sums = every[0][0], (sum(e[1] for e in every), sum(e[2] for e in every))
    if isinstance(metric, Ratio):
        value = metric.final(where, *sums)
    if math.isnan(value):
        raise InputError(
            f"{where}(metric)", f"{title(metric)} is NaN", "Check the metric, the data, the network"
        )
    return value
