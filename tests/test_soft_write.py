"""Writing: what is stored, by whom, and what is left after whatever goes wrong."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rarefy.copies import fingerprint
from rarefy.distillation.ensemble import Ensemble
from rarefy.distillation.soft_labels import shards
from rarefy.distillation.soft_labels import write as writing
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.records import Dense, Outputs, Sampled, TopK
from rarefy.distillation.soft_labels.views import Replay
from rarefy.errors import DataError, InputError, OutputError, TrainingError
from several_processes import in_processes
from soft_label_store import CLASSES, SAMPLES, dataset, expected, images, loader, teacher, write


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores of the tests have several shards."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 300)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> list[Any]:
    labels = SoftLabels(folder)
    return [labels.answers(view=view).tolist() for view in range(labels.views)]


@pytest.mark.parametrize("data", [loader(), loader(num_workers=1), list(images().split(9))])
def test_what_is_read_is_what_the_teacher_says(tmp_path: Path, data, small_shards) -> None:
    store = write(tmp_path, data)
    assert store.kind == "dense"
    assert len(names(tmp_path)) > 4
    found = SoftLabels(tmp_path).answers()
    assert torch.allclose(found, expected(teacher(), images()), rtol=2**-11, atol=1e-6)


def test_nothing_of_the_users_changes(tmp_path: Path) -> None:
    model, data = teacher().train(), loader(generator=torch.Generator().manual_seed(3))
    model[1].eval()
    before = fingerprint(model), [m.training for m in model.modules()], data.generator.get_state()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    write(tmp_path, data, model)
    after = fingerprint(model), [m.training for m in model.modules()], data.generator.get_state()
    assert before[:2] == after[:2]
    assert (before[2] == after[2]).all()
    assert (torch.get_rng_state() == states[0]).all()
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Positions(nn.Module):
    """Outputs of another shape for each image."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        table = {
            "sequence": lambda: x.flatten(2).transpose(1, 2),
            "image": lambda: x,
            "scalar": lambda: x.mean(dim=(1, 2, 3)),
            "scores": lambda: {"logits": x[:, 0, 0]},
        }
        return table[self.form]()


@pytest.mark.parametrize(
    ("outputs", "options"),
    [
        ("sequence", {}),
        ("sequence", {"form": TopK(2)}),
        ("image", {"dim": 1}),
        ("image", {"form": Outputs("float32")}),
        ("scalar", {"form": Outputs("float32")}),
        ("scores", {"form": Sampled(5)}),
    ],
)
def test_outputs_of_any_fixed_shape(tmp_path: Path, outputs: str, options: dict[str, Any]) -> None:
    model = Positions(outputs)
    write(tmp_path, model=model, **options)
    labels = SoftLabels(tmp_path)
    found = labels.answers(torch.tensor([5, 99, 5]), 0)
    raw = model(images()[[5, 99, 5]])
    raw = raw["logits"] if isinstance(raw, dict) else raw
    assert found.shape == raw.shape
    if isinstance(labels.manifest.layout.form, Outputs):
        assert (found == raw).all()
    else:
        dim = options.get("dim", -1)
        close = 0.21 if options.get("form") == Sampled(5) else 0.5 if "form" in options else 1e-3
        assert (found.softmax(dim) - raw.softmax(dim)).abs().max() < close


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Positions("image"), {}, "dim=1"),
        (Positions("image"), {"dim": 4}, "classes"),
        (teacher(), {"views": 0}, "at least 1"),
        (teacher(), {"mass": 1.5}, "at most 1"),
        (teacher(), {"form": "dense"}, "Dense"),
        (teacher(), {"ranks": (2, 2)}, "rank"),
        (teacher(), {"ranks": (0, 2), "overwrite": True}, "Remove the folder"),
        (teacher(), {"seed": -1}, "seed"),
        (teacher(), {"form": TopK(50)}, "11 classes"),
        (teacher(), {"mass": "most"}, "no number"),
        (nn.Flatten(0), {}, "batch"),
        (nn.Linear(7, 3), {}, r"write_soft_labels\(teacher\): it does not run on a batch"),
        ([teacher()], {}, "a list is no network.*Ensemble"),
        (Positions("scores"), {"views": 2}, "Replay"),
    ],
)
def test_options_out_of_range(tmp_path: Path, model, options, words: str) -> None:
    folder = tmp_path / "store"
    with pytest.raises(InputError, match=words):
        write(folder, model=model, **options)
    assert not folder.exists()


def test_what_several_networks_answer_is_stored_as_one(tmp_path: Path) -> None:
    parts = [teacher().train(), nn.Sequential(nn.Flatten(), nn.Linear(48, 11))]
    write(tmp_path, model=Ensemble(parts, weights=[3, 1]))
    wanted = [expected(part, images()) for part in parts]
    assert parts[0].training
    labels = SoftLabels(tmp_path)
    mean = (0.75 * wanted[0] + 0.25 * wanted[1]).log_softmax(-1)
    assert torch.allclose(labels.answers(), mean, rtol=1e-3, atol=1e-2)
    with pytest.raises(OutputError, match="give the teacher that wrote it"):
        write(tmp_path, model=Ensemble(parts))


def test_outputs_that_change_their_shape_are_refused(tmp_path: Path) -> None:
    data = [torch.randn(4, 3, n) for n in (5, 5, 6)]
    with pytest.raises(InputError, match=r"ids 8 to 11 .*\(3, 6\).*pad"):
        write(tmp_path, data, nn.Identity())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named_by_its_id_and_stored_for_nobody(tmp_path: Path, value: float) -> None:
    x = images()
    x[[50, 53], 0, 0, 0] = value
    data = DataLoader(TensorDataset(x), batch_size=16)
    with pytest.raises(DataError, match=r"ids 50, 53, in the batch with ids 48 to 63"):
        write(tmp_path, data, nn.Flatten())
    with pytest.raises(OutputError, match="not written yet"):
        SoftLabels(tmp_path)


def test_a_teacher_that_changes_while_it_answers(tmp_path: Path) -> None:
    class Learning(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.add_(1)
            return super().forward(x)

    with pytest.raises(TrainingError, match="changed"):
        write(tmp_path, list(torch.randn(20, 3).split(5)), Learning(3, 2))
    with pytest.raises(OutputError, match="not written yet"):
        SoftLabels(tmp_path)


def test_top_k_follows_the_mass(tmp_path: Path) -> None:
    sharp = nn.Sequential(nn.Flatten(), nn.Linear(48, 400))
    nn.init.normal_(sharp[1].weight)
    stores = {m: write(tmp_path / str(m), model=sharp, mass=m, temperature=1) for m in (0.5, 0.99)}
    assert stores[0.5].options["k"] < stores[0.99].options["k"]
    assert all(m <= store.kept_mass < 1 for m, store in stores.items())
    found, exact = SoftLabels(tmp_path / "0.99").answers(), expected(sharp, images())
    left_out = 1 - exact.exp().topk(int(stores[0.99].options["k"]), -1).values.sum(-1)
    assert ((found.exp() - exact.exp()).abs().sum(-1) <= 2 * left_out + 5e-3).all()


# --- again, and by others


def test_the_same_call_again_does_nothing(tmp_path: Path, small_shards) -> None:
    store = write(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert write(tmp_path) == store
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == stamps


@pytest.mark.parametrize("form", [None, Sampled(7)])
@pytest.mark.parametrize("kind", ["loader", "batches"])
def test_an_interrupted_store_is_continued_to_the_same(
    tmp_path: Path, form, kind: str, small_shards
) -> None:
    data = loader() if kind == "loader" else list(images().split(9))
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    write(whole, data, form=form)
    write(torn, data, form=form)
    files = sorted(torn.glob("*.records"))
    files[1].rename(files[1].with_suffix(".part"))  # killed before it got its name
    cut = files[2].read_bytes()[:-17]
    files[2].unlink()
    files[2].with_suffix(".part").write_bytes(cut)
    files[3].unlink()
    with pytest.raises(OutputError, match="continues where it was"):
        SoftLabels(torn)
    write(torn, data, form=form)
    assert not list(torn.glob("*.part"))
    assert content(torn) == content(whole)


MISMATCHES = {
    "teacher": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))}, "teacher: "),
    "length": ({"data": loader(dataset(90))}, "number of examples: the store has 100"),
    "order": ({"data": list(images().flip(0).split(16))}, "ids: "),
    "form": ({"form": Dense()}, r"form: the store has mass=0\.99, temperature=4\.0, this is Dense"),
    "seed": ({"seed": 5}, "seed: the store has 0, this is 5"),
    "transform": ({"data": loader(Replay(dataset()))}, "transform: the store has none"),
    "preprocessing": ({"data": loader(TensorDataset(2 * images()))}, "inputs: .*other inputs"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_store_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    options, words = MISMATCHES[name]
    write(tmp_path)
    before = content(tmp_path)
    with pytest.raises(OutputError, match=words):
        write(tmp_path, **options)
    assert content(tmp_path) == before
    write(tmp_path, overwrite=True, **options)
    SoftLabels(tmp_path)


def test_without_resume_a_store_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(OutputError, match="overwrite=True"):
        write(tmp_path, resume=False)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(OutputError, match="without a manifest"):
        write(tmp_path)


@pytest.mark.parametrize("kind", ["loader", "batches"])
def test_ranks_write_their_own_shards(tmp_path: Path, kind: str) -> None:
    data = loader() if kind == "loader" else list(images().split(9))
    for rank in (2, 0, 1):
        write(tmp_path / "several", data, ranks=(rank, 3))
        assert len(list(tmp_path.glob("several/*.records"))) == {2: 1, 0: 2, 1: 3}[rank]
    write(tmp_path / "one", data)
    assert content(tmp_path / "several") == content(tmp_path / "one")


def test_every_view_has_its_own_answers(tmp_path: Path, small_shards) -> None:
    replay = Replay(dataset(), lambda x: x + torch.randn_like(x))
    write(tmp_path, loader(replay, num_workers=1), views=3)
    labels, ids = SoftLabels(tmp_path), torch.tensor([0, 57, 99])
    for view in range(3):
        inputs = torch.stack([replay[view, int(i)][0] for i in ids])
        found = labels.answers(ids, view)
        assert torch.allclose(found, expected(teacher(), inputs), rtol=1e-3, atol=1e-5)


# --- full disks and kills


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path: Path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"of 30 bytes need 3,000 bytes more, and 100"):
        write(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_disk_that_becomes_full_leaves_a_store_to_continue(
    tmp_path: Path, monkeypatch, small_shards
) -> None:
    real, left = shards.write_all, [1300]

    def limited(file, data: bytes) -> None:
        real(file, data[: left[0]])
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write_all", limited)
    with pytest.raises(OutputError, match="No space left on device"):
        write(tmp_path)
    assert len(list(tmp_path.glob("*.records"))) >= 1
    monkeypatch.setattr(shards, "write_all", real)
    write(tmp_path)
    assert torch.allclose(
        SoftLabels(tmp_path).answers(), expected(teacher(), images()), rtol=1e-3, atol=1e-6
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
def test_a_real_full_disk(tmp_path: Path, monkeypatch, small_shards) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setattr(writing, "_require_space", lambda *_: None)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 200))
        with pytest.raises(OutputError, match="No space left on device"):
            write(disk, model=model, form=Dense())
        monkeypatch.undo()
        with pytest.raises(OutputError, match="are free"):
            write(disk, model=model, form=Dense())
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        write(disk, model=model, form=Dense())
        assert torch.allclose(
            SoftLabels(disk).answers(), expected(model, images()), rtol=1e-3, atol=1e-6
        )
    finally:
        subprocess.run(["umount", str(disk)], check=False)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import accelerate, pytest, torch
from rarefy.distillation.soft_labels import write as writing
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.shards import held_bytes
from rarefy.errors import RarefyError
from soft_label_store import loader, teacher, write

torch.set_num_threads(1)
writing.SHARD_BYTES = 300
folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = teacher()
    def forward(self, x):
        time.sleep(0.01)
        return self.model(x)

for kills in range(100):
    whole = {path: path.read_bytes() for path in folder.glob("*.records")}
    child = os.fork()
    if not child:
        write(folder, loader(batch_size=4), Slow())
        os._exit(0)
    begin, target = time.monotonic(), held_bytes(folder) + chance.randrange(1, 900)
    while held_bytes(folder) < target and time.monotonic() - begin < 20 and not os.waitid(
        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.0005 * chance.random())
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not status:
        break
    assert all(path.read_bytes() == content for path, content in whole.items())
    if len(list(folder.glob("*.records"))) < 10:
        with pytest.raises(RarefyError):
            SoftLabels(folder)
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are copies")
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_it_continues_where_it_was(tmp_path: Path, seed: int) -> None:
    """Killed again and again; what is complete stays as it is, and what is not is not served."""
    found = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 3
    assert not list(tmp_path.glob("*.part"))
    read = SoftLabels(tmp_path).answers()
    assert read.shape == (SAMPLES, CLASSES)
    assert torch.allclose(read, expected(teacher(), images()), rtol=2**-11, atol=1e-6)


PROCESSES = """
import sys
from accelerate import Accelerator
from soft_label_store import write
from rarefy.distillation.soft_labels.read import SoftLabels
write(sys.argv[1])
SoftLabels(sys.argv[1])
"""


@pytest.mark.slow
def test_processes_of_accelerate_share_the_work(tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    in_processes(script, str(tmp_path), ACCELERATE_USE_CPU="1")
    assert len(list(tmp_path.glob("*.records"))) == 2
    assert torch.allclose(
        SoftLabels(tmp_path).answers(), expected(teacher(), images()), rtol=1e-3, atol=1e-6
    )
