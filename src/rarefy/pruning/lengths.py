"""Weight norms whose vectors lose entries: their lengths shrink by as much.

A weight norm computes ``g v / |v|`` (Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868).
Fewer entries of ``v`` alone would make all that stay larger; with ``g`` shrunk by the share of the
length that stays, the entries of the weight keep their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.graph.program import Graph


def remaining_lengths(
    graph: Graph,
    tensor: Callable[[str], Tensor],
    kept: Mapping[tuple[str, int], NDArray[np.int64]],
) -> dict[str, Tensor]:
    """Path and new values, in the old shape, of every length whose vectors lose entries.

    Args:
        graph: the network.
        tensor: path -> values before anything goes.
        kept: (path, dimension) -> entries that stay.
    """
    found: dict[str, Tensor] = {}
    for node in graph.calls:
        if node.kind != "_weight_norm":
            continue
        v, g = (graph.by_name[name] for name in node.inputs[:2])
        dim = int(node.argument("dim"))
        lost = {d: entries for (path, d), entries in kept.items() if path == v.path and d != dim}
        if not lost or g.op != "tensor" or g.path in found:
            continue
        whole, length = tensor(v.path).detach(), tensor(g.path).detach()
        rest = whole
        for d, entries in lost.items():
            rest = rest.index_select(d, torch.from_numpy(entries).to(rest.device))
        before, after = (torch.norm_except_dim(t, 2, dim) for t in (whole, rest))
        found[g.path] = torch.where(before > 0, length * (after / before), length)
    return found
