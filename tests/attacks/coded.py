"""A file for each way of storing a tensor, and what reading one may cost."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import rarefy as rf
from forging import graph
from rarefy.storage import format as module
from rarefy.storage import pack as packing
from rarefy.storage import streams
from rarefy.storage.contents import inspect
from rarefy.storage.format import Entropy, save
from rarefy.storage.pack import CODECS, Bytes, Packed

SHAPE = (48, 16, 3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def values(few: bool) -> Tensor:
    """Normal numbers, or seven of them again and again."""
    numbers = torch.randn(SHAPE, generator=generator())
    if not few:
        return numbers
    return numbers.reshape(-1)[torch.randint(7, SHAPE, generator=generator())]


def tensor(codec: str) -> Tensor:
    """Something that a codec can store; under a mask four of five numbers are zero."""
    found = CODECS[codec]
    if codec == "raw":
        return torch.randint(-(2**31), 2**31, SHAPE, generator=generator()).to(torch.int32)
    numbers = values(found.palette)
    return numbers * (torch.rand(SHAPE, generator=generator()) < 0.2) if found.mask else numbers


def forced(
    name: str, elements: Bytes, bits: int | None, shape: tuple[int, ...], *, ans: bool
) -> Packed:
    """The elements in this form, whether it is the smallest or not; the small tensor stays raw."""
    codec = CODECS[name]
    if name == "raw" or shape != SHAPE:
        return packing.pack(elements, bits, shape, codecs=())
    mask: tuple[bytes, ...] = ()
    if codec.dim is not None:
        elements = packing._swapped(elements, shape, codec.dim)
    if codec.mask:
        present = elements.any(axis=1)
        mask = (streams.write(np.packbits(present, bitorder="little"), use_ans=ans),)
        elements = elements[present]
    if not codec.palette:
        return Packed(name, (*mask, packing._write_planes(elements, bits, ans)))
    palette = packing._palette(elements)
    assert palette is not None
    return Packed(name, (*mask, *packing._write_palette(*palette, ans)))


class Holder(nn.Module):
    """One tensor that a codec is made for, and a small one beside it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = nn.Parameter(torch.linspace(0, 1, 5))


def on_grid(bits: int, group: int | None, sparse: bool) -> nn.Module:
    """A layer on a grid."""
    layer = nn.Linear(30, 24)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, 30, generator=generator()))
        if sparse:
            layer.weight[torch.rand(24, 30, generator=generator()) < 0.8] = 0
        layer.bias.zero_()
    model = nn.Sequential(layer)
    return rf.quantize(model, None, rf.WeightOnly(bits=bits, group=group, method="rtn"))


GRIDS: dict[str, Callable[[], nn.Module]] = {
    "int8": partial(on_grid, 8, None, False),
    "int8 in groups": partial(on_grid, 8, 7, False),
    "int4": partial(on_grid, 4, None, False),
    "int4 in groups": partial(on_grid, 4, 8, False),
    "sparse int8": partial(on_grid, 8, None, True),
    "sparse int4": partial(on_grid, 4, None, True),
    "graph": graph,
}

KINDS = [(kind, entropy) for kind in (*CODECS, *GRIDS) for entropy in ("zstd", "ans")]


def model(kind: str) -> nn.Module:
    """A network whose file has a tensor that is stored in this way."""
    return GRIDS[kind]() if kind in GRIDS else Holder(tensor(kind))


@cache
def target(kind: str) -> nn.Module:
    """A network that such a file can be loaded into; loading leaves it as it is."""
    return nn.Sequential(nn.Linear(30, 24)) if kind in GRIDS else model(kind)


def file_of(kind: str, entropy: Entropy, path: Path) -> bytes:
    """Its file."""
    if kind in GRIDS:
        return save(model(kind), path, entropy=entropy).read_bytes()
    with patch.object(module, "pack", partial(forced, kind)):
        save(model(kind), path, entropy=entropy)
    held = {entry.path: entry.encoding for entry in inspect(path).tensors}
    assert held["weight"] == kind
    return path.read_bytes()


# --- cost --------------------------------------------------------------------------------------

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux tells the resident set and its highest, and where it is told to forget that."""


def _bytes(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextmanager
def at_most(memory: int, seconds: float) -> Iterator[None]:
    """Pass where what is done takes no more; memory is what the process grows by, where Linux
    tells it, and time is the processor's."""
    told = STATUS.is_file() and RESET.is_file()
    if told:
        RESET.write_text("5")
    before: Any = _bytes("VmRSS") if told else 0
    start = time.process_time()
    yield
    taken = time.process_time() - start
    assert taken <= seconds, f"{taken:.2f} s"
    grown = _bytes("VmHWM") - before if told else 0
    print(f"{grown:,} bytes, {taken:.2f} s")  # shown where a test fails, or with -s
    assert grown <= memory, f"{grown:,} bytes"
