"""The commands as a user meets them: what they print, what they leave, and their exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import rarefy
import rarefy.pipeline
from rarefy.cli import _guarded, app
from rarefy.recipe import load_recipe
from rarefy.storage.format import save
from tiny_networks import RECIPE, SHORT_RECIPE, SOURCE, write_recipe

COMMANDS = ["demo", "compress", "recipe", "inspect", "bench"]


def invoke(*arguments: str | Path) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from rarefy.cli import app; app()", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def tensors(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def figures(folder: Path) -> list[Any]:
    stages = json.loads((folder / "report.json").read_text())["stages"]
    return [[stage[k] for k in ("name", "accuracy", "params", "macs", "bytes")] for stage in stages]


# --- help


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_every_command(arguments: list[str]) -> None:
    found = invoke(*arguments)
    assert all(name in found.output for name in COMMANDS)
    assert "smaller and faster" in found.output
    assert found.exit_code == (0 if arguments else 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("demo", ["--out", "--resume", "--overwrite", "--quiet", "--seed", "--debug"]),
        ("compress", ["RECIPE", "--out", "--resume", "--overwrite", "--quiet", "--debug"]),
        ("recipe", []),
        ("inspect", ["FILE", "--debug"]),
        ("bench", ["FILES", "--runtime", "--threads", "--shape", "--json", "--memory", "--debug"]),
    ],
)
def test_each_command_has_help(name: str, options: list[str]) -> None:
    found = invoke(name, "--help")
    assert found.exit_code == 0
    assert all(option.lower() in found.output.lower() for option in options)


def test_help_of_compress_leads_to_a_recipe() -> None:
    assert "rarefy recipe" in invoke("compress", "--help").output


def test_the_version() -> None:
    assert invoke("--version").output == f"rarefy {rarefy.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["magic"], ["compress"], ["compress", "a", "b"], ["demo", "--seed", "x"], ["demo", "--sed"]],
)
def test_usage_errors(arguments: list[str]) -> None:
    found = invoke(*arguments)
    assert found.exit_code == 2
    assert "Usage" in found.output


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_out_of_range(seed: str) -> None:
    assert invoke("demo", "--seed", seed).exit_code == 2


# --- recipe and inspect


def test_the_recipe_printed_is_valid_and_complete(tmp_path: Path) -> None:
    found = invoke("recipe")
    assert found.exit_code == 0
    path = tmp_path / "recipe.yaml"
    path.write_text(found.stdout)
    plan = load_recipe(path)
    assert plan.target is not None
    assert plan.stages.prune is not None
    assert plan.stages.quantize is not None
    commented = found.stdout.replace("# train:", "train:").replace("# example_in", "example_in")
    path.write_text(commented)
    assert load_recipe(path).stages.train is not None
    assert load_recipe(path).example_inputs == "make_inputs"


def test_the_recipe_printed_runs(tmp_path: Path) -> None:
    text = invoke("recipe").stdout
    source = SOURCE.replace("nn.Linear(8, 24)", "nn.Linear(8, 48)")
    text = text.replace("epochs: 15", "epochs: 1").replace("Linear(24, 24)", "Linear(48, 24)")
    write_recipe(tmp_path, text, source.replace("nn.Linear(24, 24)", "nn.Linear(48, 24)"))
    (tmp_path / "net.py").rename(tmp_path / "my_network.py")
    found = invoke("compress", tmp_path / "recipe.yaml", "--quiet")
    assert found.exit_code == 0, found.output
    assert len(figures(tmp_path / "compressed")) == 4


def test_inspect_lists_tensors(tmp_path: Path) -> None:
    path = save(nn.Linear(3, 2), tmp_path / "net.safetensors")
    found = invoke("inspect", path)
    assert found.exit_code == 0
    assert "weight" in found.stdout
    assert "2x3" in found.stdout


@pytest.mark.parametrize("name", ["missing.safetensors", "text.safetensors", "."])
def test_inspect_refuses_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    found = invoke("inspect", tmp_path / name)
    assert found.exit_code == 1
    assert found.stderr.startswith("rarefy: load(")
    assert "Traceback" not in found.output


# --- compress, from end to end


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that nothing interrupted, as a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, command("compress", write_recipe(folder))


def test_compress_from_end_to_end(whole: tuple[Path, Any]) -> None:
    folder, found = whole
    assert found.returncode == 0, found.stderr
    out = folder / "compressed"
    assert found.stdout.strip().endswith(str(out / "report.html"))
    assert [row[0] for row in figures(out)] == ["teacher", "pruned", "distilled", "quantized"]
    assert all(name in found.stdout for name in ("teacher", "pruned", "distilled", "quantized"))
    assert "accuracy" in found.stderr  # progress
    assert "Traceback" not in found.stderr
    assert "Warning" not in found.stderr
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert left == {"compressed", "net.py", "recipe.yaml"}


def test_a_run_that_is_stopped_continues(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """Killed, then interrupted by Ctrl-C, then left alone."""
    recipe, out = write_recipe(tmp_path), tmp_path / "compressed"
    for name, status, options in (("SIGKILL", -signal.SIGKILL, ()), ("SIGINT", 130, ["--resume"])):
        found = command("compress", recipe, *options, OUT=str(out), AFTER="pruned", STOP=name)
        assert found.returncode == status, found.stderr
        assert list(json.loads((out / "run.json").read_text())["stages"]) == ["teacher", "pruned"]
    assert "Traceback" not in found.stderr
    assert "--resume continues after the last complete stage" in found.stderr
    resumed = invoke("compress", recipe, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "teacher: complete in" in resumed.stderr
    assert "pruned: complete in" in resumed.stderr
    assert "distilled: complete in" not in resumed.stderr
    assert tensors(out) == tensors(whole[0] / "compressed")
    assert figures(out) == figures(whole[0] / "compressed")
    assert not list(out.glob(".*"))


def test_out_quiet_and_a_second_run(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, SHORT_RECIPE), tmp_path / "with [brackets]"
    found = invoke("compress", recipe, "--out", out, "--quiet")
    assert found.exit_code == 0, found.output
    assert found.stderr == ""
    assert found.stdout.strip().endswith(str(out / "report.html"))
    assert not (tmp_path / "compressed").exists()
    before = {path: path.read_bytes() for path in out.iterdir()}

    again = invoke("compress", recipe, "--out", out)
    assert again.exit_code == 1
    assert "holds an earlier run" in again.stderr
    assert "--resume" in again.stderr
    assert "--overwrite" in again.stderr
    assert before == {path: path.read_bytes() for path in out.iterdir()}

    other = write_recipe(tmp_path, SHORT_RECIPE + "seed: 1\n")
    refused = invoke("compress", other, "--out", out, "--resume")
    assert refused.exit_code == 1
    assert "other options or another seed" in refused.stderr
    both = invoke("compress", recipe, "--out", out, "--resume", "--overwrite")
    assert both.exit_code == 2
    assert before == {path: path.read_bytes() for path in out.iterdir()}

    write_recipe(tmp_path, SHORT_RECIPE)
    resumed = invoke("compress", recipe, "--out", out, "--resume")  # the path is no markup
    assert resumed.exit_code == 0, resumed.output
    assert f"teacher: complete in {out}, taken from there" in resumed.stderr
    replaced = invoke("compress", other, "--out", out, "--overwrite", "--quiet")
    assert replaced.exit_code == 0, replaced.output


# --- errors


def replaced(old: str, new: str) -> str:
    assert old in SOURCE
    return SOURCE.replace(old, new)


LINEAR = "nn.Linear(24, 3)\n    )"


@pytest.mark.parametrize(
    ("recipe", "source", "status", "expected"),
    [
        (SHORT_RECIPE.replace("net.py", "nets.py"), SOURCE, 2, ["nets.py", "there is no file"]),
        (SHORT_RECIPE.replace("macs", "mcas"), SOURCE, 2, ["recipe.yaml:4", "mean 'macs'"]),
        (SHORT_RECIPE.replace("0.5", "1.5"), SOURCE, 2, ["recipe.yaml:4", "stages.prune.macs"]),
        (
            SHORT_RECIPE,
            replaced("make_model():\n", "make_model():\n    torch.load('weights.pt')\n"),
            2,
            ["make_model() in net.py", "FileNotFoundError", "weights.pt"],
        ),
        (SHORT_RECIPE, replaced(", held_out, held_out", ", [], held_out"), 2, ["'val'", "no exam"]),
        (SHORT_RECIPE, replaced("return Train(", "yield Train("), 2, ["returned a generator"]),
        (SHORT_RECIPE, replaced("randn(150, 8", "randn(150, 9"), 2, ["does not run", "(32, 9)"]),
        (SHORT_RECIPE, replaced("argmax(1)", "argmax(1) + 1"), 2, ["label 3 is none", "0 to 2"]),
        (
            SHORT_RECIPE,
            replaced(LINEAR, LINEAR[:-1] + ").requires_grad_(False).apply(break_it)")
            + "def break_it(module):\n    for p in module.parameters(): p.data.fill_(torch.nan)\n",
            2,
            ["0.weight", "NaN"],
        ),
        (
            RECIPE.replace("lr: 0.05}\n  prune", "lr: 1e30}\n  prune"),
            SOURCE,
            1,
            ["train, epoch 1", "the loss is", "Lower lr"],
        ),
        (
            SHORT_RECIPE,
            SOURCE.replace("nn.ReLU(),", "Strange(),", 1) + "class Strange(nn.Module):\n"
            "    def forward(self, x): return x if float(x.sum()) > 0 else -x\n",
            1,
            ["torch.export cannot follow", "torch.where"],
        ),
        (SHORT_RECIPE.replace("0.5", "1e-9"), SOURCE, 2, ["macs"]),
    ],
    ids=(
        "file misspelt value weights empty generator shape labels nan diverges export budget"
    ).split(),
)
def test_errors_say_where_and_what(
    tmp_path: Path, recipe: str, source: str, status: int, expected: list[str]
) -> None:
    found = invoke("compress", write_recipe(tmp_path, recipe, source), "--quiet")
    assert found.exit_code == status, found.output
    assert found.stderr.startswith("rarefy: ")
    assert found.stdout == ""
    for text in expected:
        assert text in found.stderr
    assert "Traceback" not in found.stderr
    assert "unexpected" not in found.stderr
    assert not (tmp_path / "compressed" / "report.json").exists()


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    found = invoke("compress", tmp_path / "missing.yaml")
    assert found.exit_code == 2
    assert "there is no such file" in found.stderr


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = write_recipe(tmp_path, SHORT_RECIPE)
    found = invoke("compress", recipe, "--out", tmp_path / "file" / "out")
    assert found.exit_code == 1
    assert "cannot be written" in found.stderr
    assert "--out" in found.stderr


def test_debug_shows_the_traceback_and_keeps_the_status(tmp_path: Path) -> None:
    found = invoke("compress", tmp_path / "missing.yaml", "--debug")
    assert found.exit_code == 2
    assert "Traceback" in found.stderr
    assert "RecipeError" in found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith("rarefy: ")


@pytest.mark.parametrize("debug", [False, True])
def test_errors_that_nobody_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("[/red] division")

    monkeypatch.setattr(rarefy.pipeline, "compress", fails)
    options = ["--debug"] if debug else []
    found = invoke("compress", write_recipe(tmp_path, SHORT_RECIPE), *options)
    assert found.exit_code == 1
    assert "unexpected ZeroDivisionError: [/red] division" in found.stderr
    assert ("Traceback" in found.stderr) is debug
    assert ("--debug" in found.stderr) is not debug


def test_a_recipe_runs_in_its_own_folder_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_recipe(tmp_path, SHORT_RECIPE)
    monkeypatch.chdir(elsewhere)
    before = torch.get_rng_state()
    assert invoke("compress", Path("..", "recipe.yaml"), "--quiet").exit_code == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "compressed" / "report.html").exists()
    assert not list(elsewhere.iterdir())


def test_warnings_are_sentences_without_a_line_of_the_program() -> None:
    plain = warnings.formatwarning
    with _guarded(False):
        text = warnings.formatwarning("this is so", RuntimeWarning, __file__, 1)
        theirs = warnings.formatwarning("this is so", UserWarning, __file__, 1)
    with _guarded(True):
        whole = warnings.formatwarning("this is so", RuntimeWarning, __file__, 1)
    assert text == "rarefy: this is so\n"
    assert "test_cli.py" in theirs
    assert "test_cli.py" in whole
    assert warnings.formatwarning is plain
