"""Int8 files side by side: rarefy's, onnxruntime's own and NNCF's, in onnxruntime and in OpenVINO.

    python benchmarks/quantization.py speed
    python benchmarks/quantization.py accuracy --depth 20 56
    python benchmarks/quantization.py together
    python benchmarks/quantization.py torchao

``speed`` writes each network, with random weights, in float and in int8 by each tool, and calls the
files in turn in each runtime on one thread. Times are CPU time, as a share of that of rarefy's
file: above 1 is slower than rarefy. ``convolutions`` and ``products`` say how many of them
onnxruntime really computes in integers, in the graph that it runs. ``accuracy`` measures pretrained
ResNets on CIFAR-10 in onnxruntime, all tools having seen the same unlabelled images. ``together``
compares half the channels in int8 in OpenVINO with the whole network in PyTorch. ``torchao``
compares transformers that it quantized, in PyTorch, with rarefy's files in their runtimes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cifar
import torch
from torch import Tensor, nn
from turns import in_turn

import rarefy as rf
from rarefy.deployment.modules import CompiledSession, EagerSession
from rarefy.deployment.runtimes import RUNTIMES, OpenVinoSession, Session, optimized_ops

WORDS, LENGTH = 30_522, 128
"""Vocabulary and tokens of the encoder's inputs."""


@dataclass(frozen=True)
class Subject:
    """A network and unlabelled inputs, one example each.

    Attributes:
        model: the network.
        inputs: what tools calibrate on.
        attention: whether it is a transformer, which some tools treat on their own.
    """

    model: nn.Module
    inputs: Sequence[Tensor]
    attention: bool = False


class Encoder(nn.Module):
    """A BERT of six layers that takes token numbers alone, as many all-MiniLM models are."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
        config = BertConfig(vocab_size=WORDS, num_attention_heads=12, **sizes)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers (B, L) -> (B, L, 384)."""
        found: Tensor = self.bert(ids).last_hidden_state
        return found


def vision(name: str, *, attention: bool = False) -> Subject:
    """A network of torchvision, with random weights."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    return Subject(model, torch.randn(16, 3, 224, 224).split(1), attention)


def encoder() -> Subject:
    """A BERT-like encoder, with random weights."""
    torch.manual_seed(0)
    return Subject(Encoder().eval(), torch.randint(WORDS, (16, LENGTH)).split(1), True)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "resnet18": lambda: vision("resnet18"),
    "resnet50": lambda: vision("resnet50"),
    "mobilenet_v3_large": lambda: vision("mobilenet_v3_large"),
    "efficientnet_b0": lambda: vision("efficientnet_b0"),
    "vit_b_32": lambda: vision("vit_b_32", attention=True),
    "encoder": encoder,
}


# --- tools --------------------------------------------------------------------------------------


def by_rarefy(subject: Subject, _: Path, path: Path) -> None:
    """Every layer that can be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        small = rf.quantize(subject.model, batched(subject), rf.Int8())
    rf.export(small, path, batched(subject)[0])


def for_runtime(runtime: str) -> Callable[[Subject, Path, Path], None]:
    """What int8 does not speed up in the runtime stays in float."""

    def make(subject: Subject, _: Path, path: Path) -> None:
        single = list(subject.inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            small = rf.quantize(subject.model, single, rf.Int8(), runtime=runtime)
        rf.export(small, path, batched(subject)[0])

    return make


def batched(subject: Subject) -> list[Tensor]:
    """The inputs in batches of 16."""
    return list(torch.cat(list(subject.inputs)).split(16))


def by_onnxruntime(subject: Subject, plain: Path, path: Path) -> None:
    """onnxruntime's static quantization, with its own preparation of the file."""
    from onnxruntime import InferenceSession
    from onnxruntime import quantization as tool
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.feeds = iter([{name: x.numpy()} for x in subject.inputs])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    name = InferenceSession(str(plain)).get_inputs()[0].name
    tool.quantize_static(
        str(prepared),
        str(path),
        Reader(name),
        quant_format=tool.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tool.QuantType.QUInt8,
        weight_type=tool.QuantType.QInt8,
    )


def by_nncf(preset: str) -> Callable[[Subject, Path, Path], None]:
    """NNCF on the ONNX file, for a CPU."""

    def make(subject: Subject, plain: Path, path: Path) -> None:
        import nncf
        import onnx

        model = onnx.load(plain)
        name = model.graph.input[0].name
        with contextlib.redirect_stdout(sys.stderr):  # its bars
            small = nncf.quantize(
                model,
                nncf.Dataset([{name: x.numpy()} for x in subject.inputs]),
                preset=nncf.QuantizationPreset(preset),
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(subject.inputs),
                model_type=nncf.ModelType.TRANSFORMER if subject.attention else None,
            )
        onnx.save(small, path)

    return make


Maker = Callable[[Subject, Path, Path], None]

PEERS: Mapping[str, Maker] = {
    "onnxruntime": by_onnxruntime,
    "NNCF, mixed": by_nncf("mixed"),
    "NNCF, performance": by_nncf("performance"),
}


def made(maker: Maker, subject: Subject, plain: Path, path: Path) -> Path | str:
    """The file that a tool wrote, or why there is none."""
    try:
        maker(subject, plain, path)
    except Exception as error:  # noqa: BLE001 - a peer may raise anything
        return reason(error)
    return path


# --- speed --------------------------------------------------------------------------------------

CONVOLUTIONS = {"Conv": 0, "FusedConv": 0, "NhwcFusedConv": 0, "QLinearConv": 1, "ConvInteger": 1}
PRODUCTS = dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "FusedGemm"), 0) | dict.fromkeys(
    ("QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), 1
)


def in_integers(path: Path, kinds: Mapping[str, int]) -> str:
    """How many operators of these kinds onnxruntime computes in integers, of how many."""
    found = {op: times for op, times in optimized_ops(path).items() if op in kinds}
    return f"{sum(n for op, n in found.items() if kinds[op])} of {sum(found.values())}"


def speed(chosen: argparse.Namespace) -> None:
    """Print one row per network, runtime and file."""
    head = "| network | runtime | file | CPU time, rarefy's = 1 | interval | ms | convolutions |"
    print(f"{head} products |\n" + "| --- " * 8 + "|", flush=True)
    for name in chosen.networks:
        subject = SUBJECTS[name]()
        with tempfile.TemporaryDirectory() as folder:
            plain = rf.export(subject.model, Path(folder, "float.onnx"), batched(subject)[0])
            files = {
                tool: made(maker, subject, plain, Path(folder, f"{number}.onnx"))
                for number, (tool, maker) in enumerate(PEERS.items())
            }
            files["rarefy, every layer"] = made(by_rarefy, subject, plain, Path(folder, "r.onnx"))
            for runtime in chosen.runtimes:
                served = Path(folder, f"{runtime}.onnx")
                own = made(for_runtime(runtime), subject, plain, served)
                rows = {"rarefy, for the runtime": own, "float": plain, **files}
                print("\n".join(timed(name, runtime, rows, subject, chosen)), flush=True)


def timed(
    name: str, runtime: str, files: Mapping[str, Path | str], subject: Subject, chosen: Any
) -> Iterator[str]:
    """Rows of one network in one runtime; the first file is what the others are held against."""
    files = {tool: runnable(path, runtime, subject.inputs[0]) for tool, path in files.items()}
    there = {tool: path for tool, path in files.items() if isinstance(path, Path)}
    found = rf.measure(
        list(there.values()),
        subject.inputs[0],
        runtime=runtime,
        threads=1,
        calls=chosen.calls,
        warmup=5,
        max_seconds=chosen.seconds,
    )
    measured = dict(zip(there, found, strict=True))
    for tool, path in files.items():
        if isinstance(path, str):
            yield f"| {name} | {runtime} | {tool} | fails ({path}) | | | | |"
            continue
        one = measured[tool]
        share = "1 |" if one.share is None else f"{one.share.value:.3f} | {interval(one.share)}"
        counts = f"{in_integers(path, CONVOLUTIONS)} | {in_integers(path, PRODUCTS)}"
        latency = f"{one.latency_ms.median:.2f}"
        yield f"| {name} | {runtime} | {tool} | {share} | {latency} | {counts} |"


def runnable(path: Path | str, runtime: str, x: Tensor) -> Path | str:
    """The file if the runtime can run it, or why not."""
    if isinstance(path, str):
        return path
    try:
        RUNTIMES[runtime].open(path, 1)(x)
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        return reason(error)
    return path


def reason(error: Exception) -> str:
    """The end of an error's first line."""
    return f"{type(error).__name__}: ...{str(error).strip().splitlines()[0][-80:]}"


def interval(share: Any) -> str:
    """The interval of a ratio."""
    return f"{share.low:.3f} to {share.high:.3f}"


# --- accuracy -----------------------------------------------------------------------------------


def accuracy(chosen: argparse.Namespace) -> None:
    """Print one row per network and file."""
    x, y = cifar.images("test", chosen.test)
    test = list(zip(x.split(250), y.split(250), strict=True))
    examples = cifar.images("train", chosen.calibration)[0]
    print(f"{len(y)} test images, {len(examples)} unlabelled training images, onnxruntime\n")
    print("| network | file | top-1 | lost | MB | seconds |\n" + "| --- " * 6 + "|", flush=True)
    for depth in chosen.depth:
        whole = cifar.network(depth)
        small = rf.prune(whole, x[:2], rf.Budget(macs=0.5), data=[examples], heal=False)
        healed = rf.repair(whole, small, [examples], samples=len(examples))
        for name, model in {f"ResNet-{depth}": whole, f"half of ResNet-{depth}": healed}.items():
            print("\n".join(held(name, Subject(model, examples.split(1)), test)), flush=True)


def held(name: str, subject: Subject, test: Any) -> Iterator[str]:
    """Rows of one network: in float, then by each tool."""
    schemes = {
        "rarefy": rf.Int8(),
        "rarefy, bias corrected": rf.Int8(correct_bias=True),
        "rarefy, 4-bit weights": rf.WeightOnly(bits=4),
    }

    def own(scheme: Any) -> Maker:
        def make(subject: Subject, _: Path, path: Path) -> None:
            rf.export(rf.quantize(subject.model, batched(subject), scheme), path, subject.inputs[0])

        return make

    makers = {tool: own(scheme) for tool, scheme in schemes.items()} | dict(PEERS)
    with tempfile.TemporaryDirectory() as folder:
        plain = rf.export(subject.model, Path(folder, "float.onnx"), subject.inputs[0])
        base = correct(plain, test)
        yield f"| {name} | float | {base:.2%} | | {plain.stat().st_size / 1e6:.2f} | |"
        for number, (tool, maker) in enumerate(makers.items()):
            start = time.process_time()
            path = made(maker, subject, plain, Path(folder, f"{number}.onnx"))
            seconds = time.process_time() - start
            if isinstance(path, str):
                yield f"| {name} | {tool} | fails ({path}) | | | |"
                continue
            top1 = correct(path, test)
            size = path.stat().st_size / 1e6
            lost = f"{100 * (base - top1):+.2f}"
            yield f"| {name} | {tool} | {top1:.2%} | {lost} | {size:.2f} | {seconds:.0f} |"


def correct(path: Path, test: Any) -> float:
    """Top-1 of a file in onnxruntime."""
    found = rf.measure(path, test[0][0], calls=1, warmup=1, data=test).accuracy
    assert found is not None
    return found


# --- together -----------------------------------------------------------------------------------


def together(chosen: argparse.Namespace) -> None:
    """Print the time of the whole network in PyTorch over that of half of it in int8."""
    print("| network | channels | PyTorch ms | OpenVINO ms | faster |\n" + "| --- " * 5 + "|")
    for name in ("resnet18", "resnet50"):
        subject = vision(name)
        x = subject.inputs[0]
        small = rf.prune(subject.model, x, rf.Budget(sparsity=0.5, scope="local"), heal=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "small.onnx")
            by_rarefy(Subject(small, subject.inputs), path, path)
            sessions: list[Session] = [EagerSession(subject.model, 1), OpenVinoSession(path, 1)]
            calls = [partial(session.run, session.feed(x)) for session in sessions]
            found = in_turn(*calls, rounds=chosen.calls, warmup=chosen.calls // 10)
            whole, half = (1000 * seconds for seconds in found)
        print(f"| {name} | 0.5 | {whole:.2f} | {half:.2f} | {whole / half:.1f} |", flush=True)


# --- torchao ------------------------------------------------------------------------------------


def by_torchao(subject: Subject) -> dict[str, nn.Module]:
    """What torchao makes for int8 on a CPU: linear layers alone, for PyTorch alone."""
    from torchao import quantization as tool

    schemes = {
        "dynamic int8": tool.Int8DynamicActivationInt8WeightConfig(),
        "int8 weights": tool.Int8WeightOnlyConfig(),
    }
    found = {}
    for name, scheme in schemes.items():
        found[name] = copy.deepcopy(subject.model)
        tool.quantize_(found[name], scheme)
    return found


def torchao(chosen: argparse.Namespace) -> None:
    """Print one row per transformer and way to serve it."""
    print("| network | served by | CPU ms | of float in eager PyTorch |\n" + "| --- " * 4 + "|")
    for name in chosen.networks:
        subject = SUBJECTS[name]()
        if not subject.attention:
            continue
        x = subject.inputs[0]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            sessions: dict[str, Session] = {}
            for title, model in {"float": subject.model, **by_torchao(subject)}.items():
                tool = "" if title == "float" else "torchao, "
                sessions[f"{tool}{title}, eager"] = EagerSession(model, 1)
                sessions[f"{tool}{title}, compiled"] = CompiledSession(model, 1)
            for runtime in chosen.runtimes:
                path = made(for_runtime(runtime), subject, Path(), Path(folder, f"{runtime}.onnx"))
                assert isinstance(path, Path), path
                sessions[f"rarefy, int8, {runtime}"] = RUNTIMES[runtime].open(path, 1)
            calls = [partial(session.run, session.feed(x)) for session in sessions.values()]
            found = in_turn(*calls, rounds=chosen.calls, warmup=chosen.calls // 10)
        for title, seconds in zip(sessions, found, strict=True):
            row = f"| {name} | {title} | {1000 * seconds:.1f} | {seconds / found[0]:.2f} |"
            print(row, flush=True)


MODES = {"torchao": torchao, "speed": speed, "accuracy": accuracy, "together": together}


def main() -> None:
    """Print one of the tables, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=list(MODES))
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60, help="of one comparison, at most")
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--test", type=int, help="test images; all if not given")
    parser.add_argument("--calibration", type=int, default=512)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    MODES[chosen.mode](chosen)


if __name__ == "__main__":
    main()
