"""``compress``: every figure is of a file, runs repeat, and failures leave what was done."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rarefy.pipeline
import rarefy.stages
from rarefy.copies import fingerprint
from rarefy.deployment.runtimes import OnnxSession
from rarefy.errors import (
    DataError,
    ExportError,
    InputError,
    MissingExtraError,
    OutputError,
    RarefyError,
    TrainingError,
)
from rarefy.graph.count import count
from rarefy.metrics import top1
from rarefy.pipeline import Compressed, _repeatable, compress
from rarefy.preflight import check_data
from rarefy.recipe.options import DistillStage, PruneStage, QuantizeStage, SparsifyStage, Stages
from rarefy.reporting.summary import as_dict
from rarefy.schemes import Half, Int8, WeightOnly
from rarefy.storage.format import load
from rarefy.training.evaluate import evaluate
from rarefy.types import Data, Target
from tiny_networks import ALL, SHORT, examples, held_out, perceptron, shuffled

NAMES = ["teacher", "pruned", "distilled", "quantized"]


def run(out: Path, model: nn.Module | None = None, **changes: Any) -> Compressed:
    options: dict[str, Any] = {
        "train": shuffled(),
        "val": held_out(),
        "stages": ALL,
        "seed": 3,
        "progress": False,
    }
    return compress(model or perceptron(), out=out, **(options | changes))


def files(folder: Path, suffix: str = "safetensors") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(f"*.{suffix}")}


def facts(folder: Path) -> list[dict[str, Any]]:
    """The figures of a report without those that time decides."""
    stages = json.loads((folder / "report.json").read_text())["stages"]
    return [
        {k: v for k, v in stage.items() if k not in ("latency_ms", "calls", "seconds")}
        for stage in stages
    ]


def complete(folder: Path) -> list[str]:
    return list(json.loads((folder / "run.json").read_text())["stages"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return run(tmp_path_factory.mktemp("finished"), target=Target(size=1.5, max_drop=1))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Make one operation on files of one name fail as on a full disk."""

    def arrange(operation: str, name: str) -> None:
        owner: Any = os if operation == "replace" else Path
        real = getattr(owner, operation)

        def fails(path: Any, *arguments: Any) -> Any:
            if name in Path(path).name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, *arguments)

        monkeypatch.setattr(owner, operation, fails)

    yield arrange
    monkeypatch.undo()


# --- what a run leaves


class Texts(nn.Module):
    """Words at positions; its graphs hold the length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 8), nn.Parameter(torch.zeros(12, 8))
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places[: input_ids.shape[1]]
        x = self.body(x) * attention_mask[..., None]
        return self.head(x.sum(1) / attention_mask.sum(1)[:, None])


def texts(*lengths: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """A batch of each length."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 9, (4, length), generator=generator) for length in lengths]
    return [({"input_ids": i, "attention_mask": torch.ones_like(i)}, i[:, 0] % 3) for i in ids]


@pytest.mark.slow
def test_texts_are_padded_to_the_longest_of_all_data(tmp_path: Path) -> None:
    stages = Stages(prune=PruneStage(macs=0.7), repair=None, distill=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Texts()
    data = {"train": texts(5, 7), "val": texts(6), "test": texts(4, 9)}
    found = run(tmp_path / "run", model, stages=stages, **data)
    session = OnnxSession(found.folder / "quantized.onnx")
    ((padded, _),) = texts(9)
    assert session(padded)[0].shape == (4, 3)


def test_every_figure_is_of_the_file_on_disk(finished: Compressed) -> None:
    assert [stage.name for stage in finished.report.stages] == NAMES
    for stage in finished.report.stages:
        path = finished.folder / f"{stage.name}.safetensors"
        network = load(path, perceptron())
        cost = count(network, examples()[0][:2])
        assert (stage.params, stage.macs) == (cost.params, cost.macs)
        assert stage.bytes == path.stat().st_size
        assert stage.onnx_bytes == path.with_suffix(".onnx").stat().st_size
        assert stage.latency_ms.p10 <= stage.latency_ms.median <= stage.latency_ms.p90
        if stage.name == "quantized":
            session = OnnxSession(path.with_suffix(".onnx"))
            batches = [(session(x)[0], y) for x, y in held_out()]
            assert stage.accuracy == top1(lambda logits: logits, batches)
        else:
            assert stage.accuracy == evaluate(network, held_out())


def test_the_result_is_smaller_and_learned(finished: Compressed) -> None:
    teacher, pruned, distilled, quantized = finished.report.stages
    assert pruned.macs <= 0.5 * teacher.macs
    assert distilled.params == pruned.params < teacher.params
    assert quantized.bytes < distilled.bytes < teacher.bytes
    assert teacher.accuracy > 0.5
    assert any("proven against masking" in note for note in pruned.notes)
    assert any("accuracy after repair" in note for note in distilled.notes)
    assert [w.layer for w in finished.report.widths] == ["0", "3", "5"]
    assert finished.report.widths[-1].before == finished.report.widths[-1].after == 3
    assert finished.report.frozen


def test_the_network_returned_is_the_last_file(finished: Compressed) -> None:
    x = examples()[0]
    reloaded = load(finished.folder / "quantized.safetensors")
    assert torch.equal(finished.model(x), reloaded(x))
    assert not finished.model.training


def test_the_report_is_written_as_returned(finished: Compressed) -> None:
    text = (finished.folder / "report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(as_dict(finished.report)))
    assert finished.report.seed == 3
    assert finished.report.environment["torch"] == torch.__version__
    calls = {stage.calls for stage in finished.report.stages}
    assert f"1 thread, batch 1, {calls.pop()} calls" in finished.report.environment["latency"]
    assert "<html" in (finished.folder / "report.html").read_text()
    assert len(finished.report.checks) == 2
    assert all(check.met for check in finished.report.checks)
    assert not list(finished.folder.glob(".*"))


def test_files_may_be_read_by_whom_the_umask_says(finished: Compressed) -> None:
    modes = {path.stat().st_mode for path in finished.folder.iterdir()}
    assert len(modes) == 1


# --- runs repeat, and leave no trace


def state() -> list[Any]:
    return [
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
        torch.get_rng_state().tolist(),
        list(warnings.filters),
        dict(os.environ),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    ]


def test_equal_runs_give_equal_files_and_touch_nothing(
    finished: Compressed, tmp_path: Path
) -> None:
    model, loader = perceptron().train(), shuffled()
    model[3].eval()
    hook = model[0].register_forward_hook(lambda *_: None)
    flags = [module.training for module in model.modules()]
    random.seed(9)
    torch.manual_seed(9)  # another global state than that of the first run
    before, weights = state(), fingerprint(model)
    run(tmp_path / "again", model, train=loader, target=Target(size=1.5, max_drop=1))
    assert state() == before
    assert fingerprint(model) == weights
    assert [module.training for module in model.modules()] == flags
    assert list(model[0]._forward_hooks) == [hook.id]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not hasattr(model, "pruned")
    for suffix in ("safetensors", "onnx"):
        assert files(tmp_path / "again", suffix) == files(finished.folder, suffix)
    assert facts(tmp_path / "again") == facts(finished.folder)


def test_a_run_that_is_interrupted_again_and_again_ends_with_the_same_files(
    finished: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target = Target(size=1.5, max_drop=1)
    stamps: dict[str, int] = {}
    for done, step in enumerate(["prune", "distill", "quantize", "settled"], start=1):
        with monkeypatch.context() as patch:
            room = rarefy.pipeline if step == "settled" else rarefy.stages
            patch.setattr(room, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, target=target, resume=True)
        assert complete(tmp_path) == NAMES[:done]
        assert not (tmp_path / "report.json").exists()
        found = {n: (tmp_path / f"{n}.safetensors").stat().st_mtime_ns for n in NAMES[:done]}
        assert {name: found[name] for name in stamps} == stamps  # nothing is made twice
        stamps = found
        torch.rand(7)  # the global state has no influence
    result = run(tmp_path, target=target, resume=True)
    assert files(tmp_path) == files(finished.folder)
    assert facts(tmp_path) == facts(finished.folder)
    assert result.report.widths == finished.report.widths
    assert result.report.frozen == finished.report.frozen


def test_a_generator_of_the_data_has_the_same_state_in_every_stage() -> None:
    generator = torch.Generator().manual_seed(4)
    loader = DataLoader(TensorDataset(*examples()), 32, shuffle=True, generator=generator)
    before, orders = generator.get_state(), []
    for _ in range(2):
        with _repeatable(0, loader):
            orders.append([y.tolist() for _, y in loader])
    assert orders[0] == orders[1]
    assert torch.equal(generator.get_state(), before)


# --- folders


def test_an_earlier_run_is_refused_and_left_as_it_is(finished: Compressed) -> None:
    before = {path: path.read_bytes() for path in finished.folder.iterdir()}
    with pytest.raises(OutputError, match=r"holds an earlier run.*--resume.*--overwrite"):
        run(finished.folder)
    for changes in ({"seed": 4}, {"stages": SHORT}, {"model": perceptron(1)}, {"target": None}):
        with pytest.raises(OutputError, match="another network, other options or another seed"):
            run(finished.folder, resume=True, **changes)
    with pytest.raises(InputError, match="not both"):
        run(finished.folder, resume=True, overwrite=True)
    assert before == {path: path.read_bytes() for path in finished.folder.iterdir()}


def test_overwriting_replaces_the_whole_run(finished: Compressed, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    (folder / "mine.txt").write_text("mine")
    run(folder, stages=SHORT, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        "mine.txt", "report.html", "report.json", "run.json",
        "teacher.safetensors", "teacher.onnx", "pruned.safetensors", "pruned.onnx",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["pruned.safetensors", "teacher.onnx"])
@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_damaged_artifacts_are_named(
    finished: Compressed, tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "truncated":
        (folder / name).write_bytes(content[: len(content) // 2])
    before = files(folder)
    with pytest.raises(OutputError) as caught:
        run(folder, resume=True, target=Target(size=1.5, max_drop=1))
    assert str(folder / name) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert files(folder) == before


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("replace", "pruned.safetensors"),
        ("replace", "pruned.onnx"),
        ("write_bytes", "pruned.onnx"),
        ("write_bytes", "report.html"),
    ],
)
def test_a_full_disk_leaves_earlier_stages(
    tmp_path: Path, full_disk: Callable[[str, str], None], operation: str, name: str
) -> None:
    full_disk(operation, name)
    with pytest.raises(OutputError, match="No space left on device"):
        run(tmp_path, stages=SHORT)
    assert complete(tmp_path)[0] == "teacher"
    load(tmp_path / "teacher.safetensors", perceptron())
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / name).exists()


# --- what a run may be given


def test_unlabelled_training_data(tmp_path: Path) -> None:
    stages = ALL.model_copy(update={"train": None, "quantize": None})
    result = run(tmp_path, train=[x for x, _ in shuffled()], stages=stages)
    assert [stage.name for stage in result.report.stages] == NAMES[:3]


def test_units_may_be_scored_on_the_training_data(tmp_path: Path) -> None:
    found = {}
    for criterion in ("magnitude", "fisher"):
        prune = PruneStage(sparsity=0.5, criterion=criterion)
        stages = Stages(prune=prune, repair=None, distill=None, quantize=None)
        done = run(tmp_path / criterion, stages=stages)
        found[criterion] = torch.cat([p.detach().flatten() for p in done.model.parameters()])
    assert not torch.equal(found["magnitude"], found["fisher"])


def test_repair_alone(tmp_path: Path) -> None:
    stages = SHORT.model_copy(update={"repair": ALL.repair})
    names = [stage.name for stage in run(tmp_path, stages=stages).report.stages]
    assert names == ["teacher", "pruned", "repaired"]


def test_a_target_finds_the_budget_and_is_held_against_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rarefy.stages, "reachable_budget", lambda *_: (0.25, "found: 0.25"))
    stages = SHORT.model_copy(update={"prune": None})
    target = Target(size=1000, max_drop=1)
    teacher, pruned = (result := run(tmp_path, stages=stages, target=target)).report.stages
    assert pruned.macs <= 0.25 * teacher.macs
    assert "found: 0.25" in pruned.notes
    drop, size = result.report.checks
    assert drop.met
    assert drop.value == teacher.accuracy - pruned.accuracy
    assert not size.met
    assert size.value == teacher.bytes / pruned.bytes


class TwoOutputs(nn.Module):
    """Its first output is not its logits, and always wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        answers = self.body(x * scale)
        return {"opposite": -answers, "logits": answers}


def test_two_inputs_and_a_mapping_of_outputs(tmp_path: Path) -> None:
    x, y = examples()
    data = [((x, torch.ones(len(x), 1)), y)]
    changes = {"repair": None, "distill": None}
    result = run(
        tmp_path, TwoOutputs(), train=data, val=data, stages=ALL.model_copy(update=changes)
    )
    _, pruned, quantized = result.report.stages
    assert quantized.accuracy == pytest.approx(pruned.accuracy, abs=0.1)


def test_the_quantized_network_is_trained_and_layers_stay_in_float(tmp_path: Path) -> None:
    options = {"int8": Int8(skip=("5",)), "max_drop": 0.5}
    first = ALL.model_copy(update={"train": None, "repair": None, "distill": None})
    found = {}
    for epochs in (0, 2):
        stage = QuantizeStage(**options, epochs=epochs, lr=0.1)
        stages = first.model_copy(update={"quantize": stage})
        found[epochs] = run(tmp_path / str(epochs), stages=stages)
    plain, trained = (load(found[n].folder / "quantized.safetensors") for n in (0, 2))
    assert fingerprint(plain) != fingerprint(trained)
    scale = "0.weight_scale"
    assert torch.equal(plain.get_buffer(scale), trained.get_buffer(scale))
    for result in found.values():
        assert "5 left in float: left in float by choice" in result.report.stages[-1].notes


@pytest.mark.parametrize("scheme", [{"weights": WeightOnly(bits=4)}, {"half": Half()}])
def test_weights_alone_are_quantized(tmp_path: Path, scheme: dict[str, Any]) -> None:
    stages = SHORT.model_copy(update={"quantize": QuantizeStage(**scheme)})
    result = run(tmp_path / "small", stages=stages)
    _, pruned, quantized = result.report.stages
    assert quantized.bytes < pruned.bytes
    assert quantized.accuracy == pytest.approx(pruned.accuracy, abs=0.1)


# --- what a run refuses, before it writes anything


class Returns(nn.Module):
    """Returns what a function makes of the answers of a small network."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.change = perceptron(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.body(x))


def with_nan(path: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with torch.no_grad():
        model.state_dict()[path].reshape(-1)[0] = float("nan")
    return model


X, Y = examples()
GOOD: Data = [(X, Y)]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": {"a": 1}}, InputError, r"compress\(model\): a dict was given"),
        ({"model": nn.DataParallel(perceptron())}, InputError, r"model\.module"),
        ({"model": nn.LazyLinear(3)}, InputError, "weight is not initialized"),
        ({"model": with_nan("0.weight")}, InputError, r"0\.weight: .* NaN"),
        ({"model": with_nan("1.running_mean")}, InputError, r"1\.running_mean: it holds NaN"),
        ({"model": Returns(lambda y: (y, y))}, InputError, "a tuple holds no logits"),
        ({"model": Returns(lambda y: y.view(32, 3))}, InputError, "one example alone"),
        ({"train": [(X.double(), Y)]}, InputError, r"train\), first batch: .*float64 \(96, 8\)"),
        ({"val": [(X[:, :7], Y)]}, InputError, r"val\), first batch: .*float32 \(96, 7\)"),
        ({"test": [(X, Y + 1)]}, DataError, r"test\), .*: label 3 is none of the .* 3 classes"),
        ({"test": [(X, -Y)]}, DataError, "label -[12] is none"),
        ({"val": [(X, Y.float())]}, DataError, r"val\), .* targets are torch.float32"),
        ({"val": [(X, Y[1:])]}, DataError, r"labels of shape \(95,\) do not fit"),
        ({"val": [(X, Y.tolist())]}, DataError, "no tensor"),
        ({"val": [X]}, DataError, r"val\), first batch: it has no targets"),
        ({"train": [X]}, DataError, r"train\), first batch: it has no targets"),
        ({"train": []}, DataError, r"train\): the data yielded no example"),
        ({"train": iter(GOOD)}, DataError, r"train\): a list_iterator can be read only once"),
        ({"val": (b for b in GOOD)}, DataError, "a generator can be read only once"),
        ({"train": X}, DataError, "Tensor is not an iterable of batches"),
        ({"train": None}, DataError, "NoneType is not an iterable of batches"),
        ({"train": [(X, X, Y)]}, DataError, r"train\): a batch is a tuple of 3"),
        ({"train": [(X.numpy(), Y)]}, DataError, r"train\): inputs are a ndarray"),
        ({"train": [(X.index_fill(0, Y[:1], float("nan")), Y)]}, InputError, "answers NaN"),
        ({"example_inputs": X.numpy()}, InputError, "inputs are a ndarray"),
        ({"stages": {"prune": {}}}, InputError, r"stages\): a dict is no Stages"),
        ({"target": {"size": 2}}, InputError, r"target\): a dict is no Target"),
        ({"seed": 2**32}, InputError, "below 2"),
        ({"seed": "a"}, InputError, "whole number"),
        ({"model": Returns(lambda y: y[:, :, None])}, InputError, r"shape \(32, 3, 1\).*one by"),
        ({"example_inputs": X[:, :5]}, InputError, r"compress\(example_inputs\): .* not run"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], kind: type[RarefyError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run(tmp_path / "out", **changes)
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_probabilities_may_be_learned_but_not_scored() -> None:
    soft = [(X, nn.functional.one_hot(Y, 3).float())]
    check_data(perceptron(), soft, "train", soft=True)
    with pytest.raises(DataError, match="do not fit"):
        check_data(perceptron(), soft, "val")


def test_an_extra_that_is_missing_is_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rarefy\[onnx\]'"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what fails on the way


class Unexportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y * 2 if float(y.sum()) > 0 else y


def test_a_network_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch\.export cannot follow its forward"):
        run(tmp_path, Unexportable(), stages=SHORT)
    assert complete(tmp_path) == []
    assert not list(tmp_path.glob("*.onnx"))


class RowByRow(nn.Module):
    """Its graph is unrolled over the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(row[None]) for row in x])


def test_an_export_bound_to_a_number_of_examples_is_refused_at_the_first_stage(
    tmp_path: Path,
) -> None:
    with pytest.raises(ExportError, match=r"teacher\.onnx: .* one example alone"):
        run(tmp_path, RowByRow(), stages=SHORT)
    assert complete(tmp_path) == []


def test_a_loss_that_diverges_leaves_the_stages_before(tmp_path: Path) -> None:
    stages = SHORT.model_copy(update={"distill": DistillStage(epochs=2, lr=1e30)})
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf).*Lower lr"):
        run(tmp_path, stages=stages)
    assert complete(tmp_path) == NAMES[:2]


def test_a_bad_batch_in_the_middle_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\(data\), epoch 1: a batch is a int"):
        run(tmp_path, train=[(X, Y), 3])


def test_stages_may_be_left_out_in_python() -> None:
    stages = Stages(repair=None, distill=None, quantize=None)
    assert (stages.train, stages.repair, stages.distill, stages.quantize) == (None,) * 4


def test_whole_blocks_may_go(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Deep()
    stages = Stages(prune=PruneStage(blocks=1, structure="depth"), distill=None, quantize=None)
    result = run(tmp_path, model=model, stages=stages)
    before, after = result.report.stages[0], result.report.stages[1]
    assert after.params == before.params - sum(p.numel() for p in model.blocks[0].parameters())
    assert type(result.model).__name__ == "Deep"


class Deep(nn.Module):
    """A stack of residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        inputs = examples()[0][0].numel()
        self.stem, self.head = nn.Linear(inputs, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


class Twice(nn.Module):
    """A layer that reads its own outputs: repair cannot solve it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(8, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)).relu())
        out: Tensor = self.head(x.relu())
        return out


def test_what_repair_leaves_alone_is_noted(tmp_path: Path) -> None:
    changes = {"train": None, "prune": PruneStage(macs=0.49), "distill": None, "quantize": None}
    result = run(tmp_path, Twice(), stages=ALL.model_copy(update=changes))
    notes = result.report.stages[-1].notes
    assert result.report.stages[-1].name == "repaired"
    assert "not repaired: twice: its weight is used several times" in notes


@pytest.mark.parametrize("repaired", [True, False])
@pytest.mark.parametrize("structure", ["weight", "2:4"])
def test_zeros_stay_through_training_and_quantization(
    tmp_path: Path, structure: str, repaired: bool
) -> None:
    stages = ALL.model_copy(
        update={
            "train": None,
            "prune": PruneStage(macs=1.0),
            "repair": ALL.repair if repaired else None,
            "sparsify": SparsifyStage(
                sparsity=None if structure == "2:4" else 0.5, structure=structure, samples=32
            ),
            "quantize": QuantizeStage(weights=WeightOnly(bits=4, method="rtn")),
        }
    )
    result = run(tmp_path, stages=stages)
    names = ["teacher", "pruned", "sparse", "distilled", "quantized"]
    assert [stage.name for stage in result.report.stages] == names
    notes = " ".join(result.report.stages[2].notes)
    assert ("after repair" in notes) is repaired
    assert "weights are zero: a smaller file, and no less work" in notes
    kept = {
        name: load(tmp_path / f"{name}.safetensors", perceptron()).state_dict() for name in names
    }
    weights = {path: value for path, value in kept["sparse"].items() if value.ndim > 1}
    zeros = sum(int((value == 0).sum()) for value in weights.values())
    assert zeros == pytest.approx(0.5 * sum(map(torch.numel, weights.values())), abs=1)
    for path, value in weights.items():
        gone = value == 0
        assert not torch.equal(kept["distilled"][path], value)
        for later in ("distilled", "quantized"):
            assert not kept[later][path][gone].any()
    again = run(tmp_path, stages=stages, resume=True)
    assert [s.accuracy for s in again.report.stages] == [s.accuracy for s in result.report.stages]


def test_zeros_stay_where_a_quantized_network_is_trained(tmp_path: Path) -> None:
    stages = ALL.model_copy(
        update={
            "train": None,
            "prune": PruneStage(macs=1.0),
            "repair": None,
            "distill": None,
            "sparsify": SparsifyStage(sparsity=0.5, criterion="magnitude"),
            "quantize": QuantizeStage(int8=Int8(), epochs=1, lr=0.01),
        }
    )
    run(tmp_path, stages=stages)
    sparse = load(tmp_path / "sparse.safetensors", perceptron()).state_dict()
    found = load(tmp_path / "quantized.safetensors", perceptron())
    trained = dict(found.named_parameters())
    seen = 0
    for path, value in sparse.items():
        if value.ndim == 2 and path in trained:
            seen += 1
            assert not torch.equal(trained[path], value)
            assert not trained[path][value == 0].any()
    assert seen


def test_without_training_the_sparse_network_is_what_is_quantized(tmp_path: Path) -> None:
    stages = SHORT.model_copy(
        update={"repair": ALL.repair, "sparsify": SparsifyStage(sparsity=0.3, samples=16)}
    )
    result = run(tmp_path, stages=stages)
    assert [s.name for s in result.report.stages][:3] == ["teacher", "pruned", "sparse"]
    assert "repaired" not in [s.name for s in result.report.stages]
