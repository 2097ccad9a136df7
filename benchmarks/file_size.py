"""Bytes of a file, for each way to store the same network: dense, and with most weights at zero.

    python benchmarks/file_size.py --depth 56

A pretrained CIFAR ResNet, dense and with 90 % of its weights at zero by magnitude, is stored as it
is and with its weights quantized, rounding to nearest. The yardstick is the plain safetensors file
of the dense network in fp32. Seconds are those of reading the file, the least of three times.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import cifar
import torch
from torch import nn

import rarefy as rf
from rarefy.schemes import WeightOnly
from rarefy.storage.format import Entropy

EXAMPLE = torch.zeros(2, 3, 32, 32)

SCHEMES: Mapping[str, WeightOnly | None] = {
    "fp32": None,
    "int8": WeightOnly(bits=8, method="rtn"),
    "int4": WeightOnly(bits=4, method="rtn"),
    "palette of 16": WeightOnly(bits=4, method="palette"),
}


def seconds(path: Path, model: nn.Module) -> float:
    """The least of three times that reading takes."""
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        rf.load(path, model)
        found.append(time.perf_counter() - begin)
    return min(found)


def main() -> None:
    """Print one row per network, scheme and coder, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=56, choices=(20, 56))
    parser.add_argument("--sparsity", type=float, default=0.9)
    chosen = parser.parse_args()

    dense = cifar.network(chosen.depth)
    sparse = rf.prune(
        dense,
        EXAMPLE,
        rf.Budget(sparsity=chosen.sparsity, scope="global"),
        structure="weight",
        criterion="magnitude",
    )
    size = cifar.plain_bytes(dense)
    with tempfile.TemporaryDirectory() as folder:
        print(f"ResNet-{chosen.depth}, plain fp32 file: {size:,} bytes\n")
        print("| network | weights | entropy coder | bytes | times smaller | read s |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        for name, model in (("dense", dense), (f"{chosen.sparsity:.0%} zeros", sparse)):
            for title, scheme in SCHEMES.items():
                network = model if scheme is None else rf.quantize(model, None, scheme)
                for entropy in get_args(Entropy):
                    path = rf.save(network, Path(folder) / "a.safetensors", entropy=entropy)
                    small = path.stat().st_size
                    print(
                        f"| {name} | {title} | {entropy} | {small:,} | {size / small:.1f} "
                        f"| {seconds(path, dense):.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
