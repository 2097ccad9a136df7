"""The zoo: what rarefy does with hundreds of networks, one process each.

Run it: python benchmarks/zoo.py --out zoo.jsonl --torch-pruning --onnx
Then:   python benchmarks/zoo.py --out zoo.jsonl --table benchmarks/zoo.md

Every network is traced, pruned by a quarter and by a half of the units of every group with proof,
run, trained for one step, saved and loaded, and, on request, exported to ONNX; beside it,
Torch-Pruning prunes a fresh copy. A step that fails is recorded with its error and the line of the
network's code, and the others go on. Networks whose record is in the file are skipped.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_networks import networks
from zoo_own import Builder

from rarefy.types import Inputs  # the rest is imported by each process anew

Figures: TypeAlias = dict[str, Any]
Record: TypeAlias = dict[str, Any]
Send: TypeAlias = Callable[[Figures], None]

RATIOS = (0.25, 0.5)
LOW = 0.3
"""A share of prunable parameters below this is worth a look."""

PATIENCE = 20
"""How many times its CPU seconds a process may wait for a busy machine."""


# --- one network -------------------------------------------------------------------------------


@dataclass
class Subject:
    """A network on its way through the steps.

    Attributes:
        build: makes a model and its inputs.
        model: the original.
        inputs: its example inputs.
        traced: its groups.
        small: what pruning made of it; the last ratio counts.
    """

    build: Builder
    model: nn.Module = field(default_factory=nn.Module)
    inputs: Inputs = ()
    traced: Any = None
    small: nn.Module | None = None


Step: TypeAlias = Callable[[Subject], Figures]


def built(subject: Subject) -> Figures:
    """Make the network; it must run as it is."""
    torch.manual_seed(0)
    subject.model, subject.inputs = subject.build()
    leaves = outputs(subject.model, subject.inputs)
    return {"params": parameters(subject.model), "outputs": len(leaves)}


def traced(subject: Subject) -> Figures:
    """Find what can go: groups, and the share of the parameters that they cover."""
    import rarefy as rf

    begin = time.process_time()
    network = subject.traced = rf.trace(subject.model, subject.inputs)
    seconds = time.process_time() - begin
    return {
        "cpu_seconds": round(seconds, 2),
        "groups": len(network.groups),
        "units": sum(map(len, network.groups)),
        "prunable": round(prunable(subject.model, network), 4),
        "unknown": dict(network.unknown),
        "frozen": reasons(subject.model, network),
    }


def pruned(subject: Subject, ratio: float) -> Figures:
    """Remove a share of every group with proof, and run what is left."""
    import rarefy as rf

    subject.small = None
    budget = rf.Budget(sparsity=ratio, scope="local")
    small = rf.prune(subject.model, subject.inputs, budget, criterion="magnitude")
    record: Any = small.pruned
    found = {
        "kind": record.kind,
        "reason": record.reason[:400],
        "error": record.error,
        "removed": round(1 - parameters(small) / parameters(subject.model), 4),
    }
    if record.kind == "graph":
        found["line"] = graph_line(subject, budget)
    before, after = (shapes(m, subject.inputs) for m in (subject.model, small))
    if before != after:
        raise AssertionError(f"outputs of shapes {after}, not {before}")
    subject.small = small
    return found


def stepped(subject: Subject) -> Figures:
    """One step of SGD; how many parameters a gradient reaches is recorded."""
    small = needed(subject.small)
    mode = trainable_mode(subject.model, subject.inputs)
    small.train(mode)
    small.zero_grad()
    loss = loss_of(small, subject.inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    reached = sum(p.grad is not None for p in small.parameters())
    torch.optim.SGD(small.parameters(), lr=1e-4).step()
    small.eval()
    if not reached:
        raise AssertionError("no parameter has a gradient")
    return {"mode": "train" if mode else "eval", "gradients": reached}


def stored(subject: Subject) -> Figures:
    """Save, load into another instance of the class (a graph: from the file alone), compare."""
    small = needed(subject.small)
    return reloaded(subject, small, small.pruned.kind == "module")  # type: ignore[union-attr]


def reloaded(subject: Subject, small: nn.Module, own: bool) -> Figures:
    """Save a result and load it, into a new instance where it is of the network's ``own`` class."""
    import rarefy as rf

    torch.manual_seed(1)
    fresh = subject.build()[0] if own else None
    with tempfile.TemporaryDirectory() as folder:
        path = rf.save(small, Path(folder) / "small.safetensors")
        size = path.stat().st_size
        again = rf.load(path, fresh)
    pairs = (outputs(again, subject.inputs), outputs(small, subject.inputs))
    torch.testing.assert_close(*pairs, rtol=0, atol=0, equal_nan=True)
    return {"bytes": size}


def exported(subject: Subject) -> Figures:
    """Write ONNX; rarefy.export itself holds onnxruntime's outputs against PyTorch's."""
    import rarefy as rf

    with tempfile.TemporaryDirectory() as folder:
        path = rf.export(needed(subject.small), Path(folder) / "small.onnx", subject.inputs)
        return {"bytes": path.stat().st_size}


def torch_pruning(subject: Subject) -> Figures:
    """Torch-Pruning on a fresh copy: half of every group, the last layer left alone."""
    import torch_pruning as tp

    model, inputs = subject.model.eval(), subject.inputs
    count, whole = len(outputs(model, inputs)), parameters(model)
    begin = time.process_time()
    pruner = tp.pruner.MagnitudePruner(
        model,
        example_inputs=inputs,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=last_layer(model, inputs),
    )
    pruner.step()
    seconds = time.process_time() - begin
    removed = 1 - parameters(model) / whole
    if len(outputs(model, inputs)) != count:
        raise AssertionError("it has other outputs")
    if removed <= 0:
        raise AssertionError("nothing was removed")
    return {"cpu_seconds": round(seconds, 2), "removed": round(removed, 4)}


RAREFY: Mapping[str, Step] = {
    "build": built,
    "trace": traced,
    "prune 0.25": lambda subject: pruned(subject, 0.25),
    "prune 0.5": lambda subject: pruned(subject, 0.5),
    "backward": stepped,
    "save and load": stored,
}
"""Steps of every network, in this order."""

ONNX: Mapping[str, Step] = {"onnx": exported}
OTHER: Mapping[str, Step] = {"build": built, "torch-pruning": torch_pruning}
ESSENTIAL = ("build", "trace")
"""Steps without which there is nothing to do for the others."""


# --- what the steps share ----------------------------------------------------------------------


class NotReachedError(Exception):
    """An earlier step failed, so that there is nothing to do."""


def needed(small: nn.Module | None) -> nn.Module:
    """The smaller network, if there is one."""
    if small is None:
        raise NotReachedError
    return small


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Tensors that the network returns in eval mode."""
    from rarefy.batches import call

    model.eval()
    with torch.no_grad():
        returned = call(model, inputs)
    leaves = [t for t in pytree.tree_leaves(returned) if isinstance(t, Tensor)]
    return leaves or [t for t in vars(returned).values() if isinstance(t, Tensor)]


def shapes(model: nn.Module, inputs: Inputs) -> list[list[int]]:
    """Shapes of the outputs."""
    return [list(t.shape) for t in outputs(model, inputs)]


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """A number that depends on every output."""
    from rarefy.batches import call

    leaves = [t for t in pytree.tree_leaves(call(model, inputs)) if isinstance(t, Tensor)]
    floats = [t for t in leaves if t.is_floating_point() and t.requires_grad]
    return torch.stack([t.square().mean() for t in floats]).sum()


def trainable_mode(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the original itself runs in train mode on these inputs."""
    model.train()
    try:
        loss_of(model, inputs)
    except Exception:  # noqa: BLE001 - a network may need targets in train mode
        return False
    finally:
        model.eval()
    return True


def prunable(model: nn.Module, network: Any) -> float:
    """Share of the parameters' elements that belong to some removable unit."""
    paths: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), set()).add(path)
    covered: dict[tuple[str, int], set[int]] = {}
    for group in network.groups:
        for member in group.members:
            covered.setdefault((member.path, member.dim), set()).update(member.indices.ravel())
    total = left = 0.0
    for parameter in model.parameters():
        rest = 1.0
        for dim, size in enumerate(parameter.shape):
            own = (covered.get((p, dim), ()) for p in paths[id(parameter)])
            rest *= 1 - max(map(len, own), default=0) / max(size, 1)
        total += parameter.numel()
        left += rest * parameter.numel()
    return 1 - left / max(total, 1.0)


def reasons(model: nn.Module, network: Any) -> list[str]:
    """Reasons for what is frozen, those that hold the most parameters first."""
    sizes = {path: p.numel() for path, p in model.named_parameters(remove_duplicate=False)}
    held: dict[str, int] = {}
    for frozen in network.frozen:
        reason = f"{frozen.operator}: {frozen.reason} @ {frozen.source}"
        held[reason] = held.get(reason, 0) + sizes.get(frozen.path, 0)
    return sorted(held, key=lambda reason: -held[reason])[:6]


def graph_line(subject: Subject, budget: Any) -> str:
    """Where the user's own forward stops working with other widths."""
    from rarefy.pruning.scoring.criteria import named, scored
    from rarefy.pruning.scoring.evidence import Evidence
    from rarefy.pruning.selection.select import select
    from rarefy.pruning.structure.surgery import cut

    try:
        network = subject.traced
        evidence = Evidence(dict(subject.model.named_parameters(remove_duplicate=False)))
        scores = [scored(group, evidence, named("magnitude")) for group in network.groups]
        plan = select(network, subject.model, scores, budget)
        outputs(cut(subject.model, network, plan), subject.inputs)
    except Exception as error:  # noqa: BLE001 - the error is what is asked for
        return users_line(error)
    return "it runs, but differs"


def last_layer(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """The layer with a kernel that runs last."""
    order: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda m, *_: order.append(m))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return order[-1:]


LIBRARIES = ("/torch/", "/rarefy/", "/torch_pruning/", "/benchmarks/zoo.py", "<")


def users_line(error: BaseException) -> str:
    """The last line of the traceback that is not PyTorch's, and rarefy's own last line."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not any(part in f.filename for part in LIBRARIES)]
    ours = [f for f in frames if "/rarefy/" in f.filename]
    named = [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.line}" for f in theirs[-1:]]
    named += [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in ours[-1:]]
    return " | ".join(named)


def failure(error: BaseException) -> Figures:
    """What is recorded of an error; ``clear`` where rarefy refuses the network with a reason."""
    from rarefy.errors import ProofError, RarefyError

    return {
        "failed": f"{type(error).__name__}: {error}"[:600],
        "clear": isinstance(error, RarefyError) and not isinstance(error, ProofError),
        "line": users_line(error),
    }


# --- processes ---------------------------------------------------------------------------------


def work(
    build: Builder, steps: Mapping[str, Step], seconds: float, gigabytes: int, pipe: Any
) -> None:
    """Run the steps of one network in a process of its own; every figure is sent as it comes."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    subject = Subject(build)
    for name, step in steps.items():
        pipe.send((name, None))
        begin = time.perf_counter()
        try:
            figures = step(subject)
        except NotReachedError:
            pipe.send((name, {}))
            continue
        except Exception as error:  # noqa: BLE001 - whatever fails is what is looked for
            figures = failure(error)
        figures["seconds"] = round(time.perf_counter() - begin, 2)
        figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        pipe.send((name, figures))
        if "failed" in figures and name in ESSENTIAL:
            break
    pipe.close()


@dataclass
class Job:
    """A process that works on a network, and what it has said so far."""

    name: str
    process: BaseProcess
    pipe: Connection
    deadline: float
    steps: dict[str, Figures] = field(default_factory=dict)
    running: str = ""

    def hear(self) -> bool:
        """Take in what is said; whether there may be more."""
        try:
            name, figures = self.pipe.recv()
        except EOFError:
            return False
        self.running = name if figures is None else ""
        if figures:
            self.steps[name] = figures
        return True

    def end(self, why: str) -> Record:
        """Stop the process where it still runs, and sum up."""
        if self.process.is_alive():
            self.process.join(5) if not why else self.process.kill()
        self.process.join()
        if self.running:
            if self.process.exitcode == -signal.SIGXCPU:
                why = "time limit"
            died = why or f"the process ended with code {self.process.exitcode}"
            self.steps[self.running] = {"failed": died, "clear": False, "line": ""}
        return {"name": self.name, "steps": self.steps}


@dataclass(frozen=True)
class Limits:
    """Of one network and of the run."""

    workers: int
    seconds: float
    gigabytes: int
    budget: float


Task: TypeAlias = tuple[str, Builder, Mapping[str, Step], float]
"""Name, builder, steps, CPU seconds."""


def run(tasks: Iterable[Task], limits: Limits) -> Iterator[Record]:
    """Work on the tasks side by side; records come in the order in which they end."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(tasks)[::-1], dict[Any, Job]()
    stop = time.monotonic() + limits.budget
    while running or (waiting and time.monotonic() < stop):
        while waiting and len(running) < limits.workers and time.monotonic() < stop:
            name, build, steps, seconds = waiting.pop()
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=work, args=(build, steps, seconds, limits.gigabytes, there)
            )
            process.start()
            there.close()
            running[here] = Job(name, process, here, time.monotonic() + PATIENCE * seconds)
        soonest = min(job.deadline for job in running.values())
        for pipe in wait(list(running), max(0.0, soonest - time.monotonic())):
            if not running[pipe].hear():
                yield running.pop(pipe).end("")
        for pipe in [p for p, job in running.items() if time.monotonic() > job.deadline]:
            yield running.pop(pipe).end("time limit")


# --- records -----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Record]:
    """Records of a file by name; later lines add their steps to earlier ones."""
    found: dict[str, Record] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            old = found.get(record["name"], {"steps": {}})["steps"]
            if record.get("anew"):  # Torch-Pruning's process may have ended before
                old = {name: old[name] for name in old if name == "torch-pruning"}
            found[record["name"]] = {**record, "steps": {**old, **record["steps"]}}
    return found


def faults(record: Record) -> list[str]:
    """What is wrong with a network, a line each; empty where all is well."""
    found = []
    for name, figures in record["steps"].items():
        if name == "torch-pruning":
            continue
        if figures.get("clear") and name not in ("save and load", "onnx"):
            continue
        if "failed" in figures:
            found.append(f"{name}: {figures['failed']} [{figures['line']}]")
        elif figures.get("kind") == "graph":
            found.append(f"{name}: graph: {figures['reason']} [{figures.get('line', '')}]")
        elif figures.get("prunable", 1) < LOW:
            found.append(f"prunable {figures['prunable']}: {'; '.join(figures['frozen'][:3])}")
    return found


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns: ``own/*``, or a part such as ``resnet``."""
    return any(fnmatch.fnmatch(name, p) or p in name for p in patterns)


def tasks(chosen: argparse.Namespace, held: Mapping[str, Record]) -> Iterator[Task]:
    """What is left to do."""
    for name, build in networks().items():
        if chosen.only and not matches(name, chosen.only):
            continue
        old = held.get(name)
        again = bool(chosen.redo) and matches(name, chosen.redo)
        again |= chosen.failed and old is not None and bool(faults(old))
        if old is None or again:
            steps = {**RAREFY, **(ONNX if chosen.onnx else {})}
            wanted = chosen.steps or steps
            yield name, build, {n: s for n, s in steps.items() if n in wanted}, chosen.seconds
        if chosen.torch_pruning and (old is None or "torch-pruning" not in old["steps"]):
            yield name, build, OTHER, 60.0


def measure(chosen: argparse.Namespace) -> None:
    """Work on what is left to do, and append a line per network."""
    held = read(chosen.out)
    limits = Limits(chosen.workers, chosen.seconds, chosen.memory, chosen.budget_seconds)
    for record in run(tasks(chosen, held), limits):
        record["anew"] = "torch-pruning" not in record["steps"]
        record["command"] = shlex.join(["python", *sys.argv])
        with chosen.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        lines = faults(record)
        took = sum(s.get("seconds", 0.0) for s in record["steps"].values())
        print(f"{'FAULT' if lines else 'ok   '} {record['name']} {took:.0f} s", flush=True)
        for line in lines:
            print("      " + line[:300], flush=True)


def main() -> None:
    """Measure, or write the table of what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"), help="records, a line each")
    parser.add_argument("--only", nargs="+", default=[], help="names or parts of names")
    parser.add_argument("--redo", nargs="+", default=[], help="measure these again")
    parser.add_argument("--failed", action="store_true", help="measure again what has a fault")
    parser.add_argument("--steps", nargs="+", help=f"only these of: {', '.join(RAREFY)}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300, help="CPU limit of one network")
    parser.add_argument("--memory", type=int, default=16, help="limit of one network, in GB")
    parser.add_argument("--budget-seconds", type=float, default=1e9, help="start none after this")
    parser.add_argument("--onnx", action="store_true", help="export each to ONNX, with parity")
    parser.add_argument("--torch-pruning", action="store_true", help="and what Torch-Pruning does")
    parser.add_argument("--table", type=Path, help="write the table of the records and stop")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.table:
        from zoo_table import page

        chosen.table.write_text(page(read(chosen.out), faults))
    else:
        measure(chosen)


if __name__ == "__main__":
    main()
