"""Quantization of many kinds of networks, one process each: int8, weights alone, files, ONNX.

Run it: python benchmarks/quantize_zoo.py --out quantize_zoo.jsonl
Then:   python benchmarks/quantize_zoo.py --table benchmarks/quantize_zoo.md

Random weights, small inputs. Every network is quantized to int8, static and dynamic, its weights
alone to int4 in groups of 32 and to bf16. Each result is saved, loaded on the class that it is
promised on, compared bit for bit, exported, and run from its file in onnxruntime as a user runs
it. The original must be as it was before: tensors, flags, hooks, attributes, random numbers.
Networks whose record is in the file are skipped.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo_odd_more  # noqa: F401 - it adds to ODD
from torch import Tensor, nn
from zoo import (
    Figures,
    Limits,
    Record,
    Step,
    Subject,
    Task,
    built,
    needed,
    outputs,
    parameters,
    read,
    reloaded,
    run,
)
from zoo_networks import networks
from zoo_odd import ODD
from zoo_own import Builder
from zoo_table import open_points, table, versions

LOW = 10.0
"""Decibels of the outputs below which a placement is worth a look."""

SOLVED = 500_000
"""Parameters below which weights alone are rounded by GPTQ; others to nearest, in seconds."""

DYNAMIC = ("own/", "odd/", "transformers/")
"""Families of mostly linear layers, which are quantized with ranges of each call, too."""

CHOSEN: Mapping[str, str] = {
    "torchvision": (
        "resnet18 mobilenet_v2 mobilenet_v3_small efficientnet_b0 swin_t densenet121 "
        "squeezenet1_1 shufflenet_v2_x0_5 convnext_tiny vgg11_bn alexnet inception_v3 googlenet "
        "regnet_y_400mf mnasnet0_5 lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn "
        "r3d_18 vit_b_16 deeplabv3_mobilenet_v3_large fcn_resnet50"
    ),
    "timm": (
        "test_vit test_byobnet test_convnext test_nfnet mobilenetv4_conv_small ghostnet_050 "
        "repvgg_a0 hrnet_w18_small convnextv2_atto mobilevit_xxs efficientvit_b0 levit_128s "
        "poolformer_s12 xcit_nano_12_p16_224 gmlp_ti16_224 resmlp_12_224 skresnet18 resnest14d "
        "dla34 vovnet39a fastvit_t8 starnet_s1 tf_efficientnetv2_b0 lambda_resnet26t volo_d1_224 "
        "mambaout_femto efficientformerv2_s0 tinynet_e res2net50_14w_8s edgenext_xx_small "
        "cspdarknet53 coat_lite_tiny mixnet_s sequencer2d_s"
    ),
    "transformers": (
        "bert distilbert roberta gpt2 t5 llama vit whisper wav2vec2 albert electra deberta-v2 opt "
        "mistral gemma bart clip qwen2_moe mamba segformer swin fnet modernbert xlm patchtst "
        "convbert bloom speech_to_text"
    ),
}
"""A representative of each kind; of the own and the odd networks all."""


# --- the original ------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model and of the process that quantization must leave alone, as plain data."""
    modules = dict(model.named_modules())
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()},
        "identities": {k: (id(p), p.requires_grad) for k, p in model.named_parameters()},
        "gradients": [k for k, p in model.named_parameters() if p.grad is not None],
        "flags": {k: m.training for k, m in modules.items()},
        "attributes": {k: sorted(vars(m)) for k, m in modules.items()},
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for k, m in modules.items()
        },
        "random numbers": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
        "threads": torch.get_num_threads(),
    }


def changed(before: Any, after: Any) -> bool:
    """Whether two states differ; NaNs are equal."""
    if isinstance(before, Tensor):
        return not torch.equal(before.nan_to_num(), after.nan_to_num())
    if isinstance(before, np.ndarray):
        return not np.array_equal(before, after)
    if isinstance(before, dict):
        return before.keys() != after.keys() or any(changed(before[k], after[k]) for k in before)
    if isinstance(before, tuple | list):
        return len(before) != len(after) or any(map(changed, before, after))
    return bool(before != after)


# --- steps -------------------------------------------------------------------------------------


def quantized(subject: Subject, scheme: Any) -> Figures:
    """Quantize; sum up what became of the layers, and how far the outputs are from float ones."""
    import rarefy as rf

    subject.small = None
    exact = outputs(subject.model, subject.inputs)
    subject.model.train()
    next(subject.model.children(), subject.model).eval()
    before = state(subject.model)
    small = rf.quantize(subject.model, [(subject.inputs, None)], scheme)
    after = state(subject.model)
    touched = [name for name in before if changed(before[name], after[name])]
    if touched:
        raise AssertionError(f"the original is not what it was: {', '.join(touched)}")
    if any(module.training for module in small.modules()):
        raise AssertionError("the result is in train mode")
    subject.small = small
    summary: Any = small.quantization
    return {
        "layers": len(summary.layers),
        "left": dict(Counter(reason[:80] for reason in summary.left.values())),
        "lowest": round(min(summary.layers.values(), default=0.0), 1),
        "sqnr": round(ratio(exact, outputs(small, subject.inputs)), 1),
        "own": isinstance(small, type(subject.model)),
    }


def stored(subject: Subject) -> Figures:
    """Save, load on another instance of the class where there is one, compare bit for bit."""
    small = needed(subject.small)
    return reloaded(subject, small, isinstance(small, type(subject.model)))


def exported(subject: Subject) -> Figures:
    """Write ONNX, run it in onnxruntime with its own optimizations, and time it."""
    import rarefy as rf
    from rarefy.deployment.runtimes import OnnxSession

    small = needed(subject.small)
    with tempfile.TemporaryDirectory() as folder:
        path = rf.export(small, Path(folder) / "small.onnx", subject.inputs)
        session = OnnxSession(path)
        found = session(_known(session, subject))
        timed = rf.measure(path, _known(session, subject), calls=3, warmup=1)
        expected = outputs(small, subject.inputs)
        return {
            "bytes": path.stat().st_size,
            "difference": round(10 ** (-ratio(expected, found) / 20), 6),
            "ms": round(timed.latency_ms.median, 3),
        }


def dynamic(subject: Subject) -> Figures:
    """Ranges of each call: quantize, save, load and export."""
    from rarefy.schemes import Int8

    return {
        **quantized(subject, Int8(activations="dynamic")),
        **stored(subject),
        **exported(subject),
    }


def halved(subject: Subject) -> Figures:
    """Weights in bf16: quantize, save and load."""
    from rarefy.schemes import Half

    return {**quantized(subject, Half("bf16")), **stored(subject)}


def _static(subject: Subject) -> Figures:
    return quantized(subject, None)


def _weights(subject: Subject) -> Figures:
    from rarefy.schemes import WeightOnly

    method = "gptq" if parameters(subject.model) < SOLVED else "rtn"
    return {**quantized(subject, WeightOnly(bits=4, group=32, method=method)), "method": method}


STEPS: Mapping[str, Step] = {
    "build": built,
    "int8": _static,
    "int8 file": stored,
    "int8 onnx": exported,
    "int4": _weights,
    "int4 file": stored,
    "int4 onnx": exported,
    "dynamic": dynamic,
    "half": halved,
}
"""Steps of every network, in this order; files are of the result before them."""


def ratio(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """SQNR in decibels of all outputs of real numbers, the worst of them; 200 where equal."""
    if len(exact) != len(found):
        raise AssertionError(f"{len(found)} outputs, not {len(exact)}")
    lowest = 200.0
    for a, b in zip(exact, found, strict=True):
        if not a.is_floating_point():
            continue
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        error, size = float((a - b).norm()), float(a.norm())
        if error:
            lowest = min(lowest, 20 * float(np.log10(max(size, 1e-12) / error)))
    return lowest


def _known(session: Any, subject: Subject) -> Any:
    """The inputs that the file has, by name where they are named."""
    given = subject.inputs
    if isinstance(given, Mapping):
        return {name: value for name, value in given.items() if name in session.inputs}
    return given


# --- the page ----------------------------------------------------------------------------------


def faults(record: Record) -> list[str]:
    """What failed, and outputs that are nearly noise, a line each."""
    found = []
    for name, figures in record["steps"].items():
        if "failed" in figures:
            kind = "refused: " if figures.get("clear") else ""
            found.append(f"{name}: {kind}{figures['failed']} [{figures['line']}]")
        elif name in ("int8", "dynamic") and figures.get("sqnr", LOW) < LOW:
            found.append(f"{name}: outputs at {figures['sqnr']} dB")
    return found


HEAD = (
    "network", "parameters", "int8 layers", "in float", "int8 dB", "file", "file bytes",
    "ONNX", "differs by", "int4 layers", "int4 dB", "file", "file bytes", "ONNX", "differs by",
    "dynamic", "bf16", "int8 ms", "seconds",
)  # fmt: skip


def row(record: Record) -> list[str]:
    """The row of a network."""
    steps = record["steps"]

    def cell(step: str, key: str, form: str = "") -> str:
        figures = steps.get(step, {})
        return format(figures[key], form) if key in figures else "-"

    def mark(step: str) -> str:
        figures = steps.get(step)
        if not figures:
            return "-"
        return "ok" if "failed" not in figures else "refused" if figures["clear"] else "fails"

    left = steps.get("int8", {}).get("left", {})
    cells = [record["name"], cell("build", "params", ","), cell("int8", "layers")]
    cells += [str(sum(left.values())) if "int8" in steps else "-", cell("int8", "sqnr")]
    for kind in ("int8", "int4"):
        if kind == "int4":
            cells += [cell(kind, "layers"), cell(kind, "sqnr")]
        cells += [mark(f"{kind} file"), cell(f"{kind} file", "bytes", ",")]
        cells += [mark(f"{kind} onnx"), cell(f"{kind} onnx", "difference", ".0e")]
    seconds = sum(figures.get("seconds", 0.0) for figures in steps.values())
    return [*cells, mark("dynamic"), mark("half"), cell("int8 onnx", "ms"), f"{seconds:.0f}"]


def page(records: Mapping[str, Record]) -> str:
    """The whole page."""
    every = list(records.values())
    families: dict[str, list[Record]] = {}
    for name in records:
        families.setdefault(name.partition("/")[0], []).append(records[name])
    summary = [
        [family, str(len(rows)), *(_share(rows, step) for step in STEPS)]
        for family, rows in {**families, "all": every}.items()
    ]
    reasons: Counter[str] = Counter()
    for record in every:
        reasons.update(record["steps"].get("int8", {}).get("left", {}))
    return "\n".join(
        [
            "# Quantization of many kinds of networks",
            "",
            f"Each network in a process of its own with one thread, random weights. {versions()}.",
            "`quantize_zoo.py` says what the steps are. *dB* is the SQNR of the outputs on the "
            "calibration inputs; *differs by* is the distance of onnxruntime's outputs, with its "
            "own optimizations, from PyTorch's quantized ones, relative to their norm.",
            "",
            *table(("family", "networks", *STEPS), summary),
            "",
            *table(HEAD, [row(record) for record in every]),
            "",
            "## Layers left in float",
            "",
            *table(("reason", "layers"), [[r, str(n)] for r, n in reasons.most_common()]),
            "",
            "## What is wrong, or refused",
            "",
            *(open_points(every, faults) or ["Nothing."]),
            "",
        ]
    )


def _share(records: Sequence[Record], step: str) -> str:
    tried = [r["steps"][step] for r in records if r["steps"].get(step)]
    return f"{sum('failed' not in figures for figures in tried)} of {len(tried)}"


# --- running -----------------------------------------------------------------------------------


def chosen() -> dict[str, Builder]:
    """Networks by family and name, families in turn."""
    known = {**networks(), **{f"odd/{name}": build for name, build in ODD.items()}}
    families = [[n for n in known if n.startswith(f"{f}/")] for f in ("own", "odd")]
    families += [[f"{f}/{n}" for n in names.split()] for f, names in CHOSEN.items()]
    longest = max(map(len, families))
    turns = [names[turn] for turn in range(longest) for names in families if turn < len(names)]
    return {name: known[name] for name in turns if name in known}


def tasks(options: argparse.Namespace, held: Mapping[str, Record]) -> Iterator[Task]:
    """What is left to do."""
    for name, build in chosen().items():
        if options.only and not any(part in name for part in options.only):
            continue
        old = held.get(name)
        if old is None or options.redo or (options.failed and faults(old)):
            left_out = () if name.startswith(DYNAMIC) else ("dynamic",)
            wanted = {"build", *(options.steps or STEPS)}.difference(left_out)
            steps = {n: step for n, step in STEPS.items() if n in wanted}
            yield name, build, steps, options.seconds


def warm_up() -> None:
    """Import what every process needs, once, so that each sees the same revision of the code."""
    import onnxruntime  # noqa: F401

    import rarefy as rf

    layer, x = nn.Linear(2, 2), torch.randn(2, 2)
    for scheme in (rf.Int8(), rf.WeightOnly(method="rtn")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer"
            rf.save(rf.quantize(layer, [x], scheme), path)
            rf.export(rf.quantize(layer, [x], scheme), path, x, check=False)


def main() -> None:
    """Measure what is left to do, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("quantize_zoo.jsonl"))
    parser.add_argument("--only", nargs="+", default=[], help="parts of names")
    parser.add_argument("--steps", nargs="+", help=f"only these of: {', '.join(STEPS)}")
    parser.add_argument("--redo", action="store_true", help="measure again")
    parser.add_argument("--failed", action="store_true", help="measure again what has a fault")
    parser.add_argument("--seconds", type=float, default=180, help="CPU limit of one network")
    parser.add_argument("--memory", type=int, default=10, help="limit of one network, in GB")
    parser.add_argument("--table", type=Path, help="write the page of the records and stop")
    options = parser.parse_args()
    held = read(options.out)
    if options.table:
        options.table.write_text(page(dict(sorted(held.items()))))
        return
    torch.set_num_threads(1)
    warm_up()
    limits = partial(Limits, workers=1, gigabytes=options.memory, budget=1e9)
    for record in run(tasks(options, held), limits(seconds=options.seconds)):
        with options.out.open("a") as file:
            file.write(json.dumps({**record, "anew": True}) + "\n")
        lines = faults(record)
        print(f"{'FAULT' if lines else 'ok   '} {record['name']}", flush=True)
        for line in lines:
            print("      " + line[:400], flush=True)


if __name__ == "__main__":
    main()
