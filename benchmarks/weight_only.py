"""Weights alone quantized: accuracy and size of the file, method by method.

    python benchmarks/weight_only.py [--depth 20] [--images 2000] [--calibration 512]
        [--only GPTQ learned]

Every row is measured on the network that was loaded from its file. The first is the float network
in the file that ``safetensors`` writes. No label is used before the accuracy is counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from cifar import images, network, plain_bytes
from torch import Tensor, nn

import rarefy as rf

SCHEMES = {
    "bf16": rf.Half("bf16"),
    "int8, RTN": rf.WeightOnly(bits=8, method="rtn"),
    "int4, RTN, min-max": rf.WeightOnly(bits=4, method="rtn", observer="minmax"),
    "int4, RTN": rf.WeightOnly(bits=4, method="rtn", observer="mse"),
    "int4, AWQ ranges": rf.WeightOnly(bits=4, method="awq"),
    "int4, GPTQ, min-max": rf.WeightOnly(bits=4, method="gptq", observer="minmax"),
    "int4, GPTQ": rf.WeightOnly(bits=4, method="gptq", observer="mse"),
    "int4, learned, min-max": rf.WeightOnly(bits=4, method="learned", observer="minmax"),
    "int4, learned": rf.WeightOnly(bits=4, method="learned", observer="mse"),
    "int3, RTN": rf.WeightOnly(bits=3, method="rtn", observer="mse"),
    "int3, GPTQ": rf.WeightOnly(bits=3, method="gptq", observer="mse"),
    "int3, learned": rf.WeightOnly(bits=3, method="learned", observer="mse"),
    "int4, groups of 32, RTN": rf.WeightOnly(bits=4, group=32, method="rtn", observer="mse"),
    "int4, groups of 32, GPTQ": rf.WeightOnly(bits=4, group=32, observer="mse"),
    "palette of 8 values": rf.WeightOnly(bits=3, method="palette"),
    "palette of 16 values": rf.WeightOnly(bits=4, method="palette"),
}


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    found = torch.cat([model(part).argmax(1) for part in x.split(250)])
    return 100 * float((found == y).double().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = network(given.depth)
    calibration = [images("train", given.calibration)[0]]
    x, y = images("test", given.images)
    with tempfile.TemporaryDirectory() as folder:
        small, size = Path(folder, "small.safetensors"), plain_bytes(model)
        print(
            f"ResNet-{given.depth}, {given.images} test images, {given.calibration} unlabelled "
            "training images"
        )
        print(f"{'weights':26} {'top-1 %':>8} {'bytes':>9} {'smaller':>8} {'seconds':>8}")
        print(f"{'float':26} {correct(model, x, y):8.2f} {size:9,} {1:8.2f} {0:8.1f}", flush=True)
        chosen = {n: s for n, s in SCHEMES.items() if any(part in n for part in given.only)}
        for name, scheme in chosen.items():
            started = time.perf_counter()
            quantized = rf.quantize(model, calibration, scheme)
            seconds = time.perf_counter() - started
            rf.save(quantized, small)
            loaded = rf.load(small, network(given.depth))
            assert torch.equal(loaded(x[:2]), quantized(x[:2]))
            stored = small.stat().st_size
            print(
                f"{name:26} {correct(loaded, x, y):8.2f} {stored:9,} {size / stored:8.2f} "
                f"{seconds:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
