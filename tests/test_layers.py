"""The one-way flow of data: a stage imports only stages above it."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import rarefy

ROOT = Path(rarefy.__file__).parent

STAGES = [
    {"errors"},
    {"types", "schedules", "files", "environment", "progress", "process", "drawing"},
    {"batches", "schemes"},
    {"paths", "grid"},
    {"copies"},
    {"graph"},
    {"distillation"},
    {"pruning"},
    {"students"},
    {"metrics"},
    {"training"},
    {"quantization"},
    {"storage"},
    {"deployment"},
    {"measured"},
    {"gains"},
    {"reporting", "run_folder", "recipe", "preflight", "search"},
    {"stages"},
    {"pipeline"},
    {"integrations", "tasks"},
    {"cli"},
]
"""Rooms of the house from top to bottom; a room imports from itself and from rooms above it."""

RANK = {room: rank for rank, rooms in enumerate(STAGES) for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
OPTIONAL = (
    "onnx onnxruntime onnxscript openvino executorch sklearn transformers timm accelerate "
    "torchvision lightning"
).split()
GRAPH = (
    "declarations program memory model allowed serialize labels flow editor equations rules zeros "
    "ops groups resolution convert capture resting count blocks stubs constants trace stacks layer"
).split()
LOSSES = (
    "arithmetic base layouts labels responses generation outputs speech projectors features "
    "relations contrastive dense transformers"
).split()
PRUNING = (
    "plan checks lengths running scoring structure selection sparsity repairing repair "
    "journal sensitivity narrow shorten request prune gradual"
).split()
TRAINING = (
    "options networks record average stored teachers terms objective job shares evaluate identity "
    "checkpoint tracking sharding steps loop train distill"
).split()

QUANTIZATION = (
    "affine fold splitting placement observers calibration scaling insertion dynamic "
    "bias summary mixed palette rounding readers weights own_class weight_only quantize"
).split()
DEPLOYMENT = (
    "cache ratios rounds modules executorch_session runtimes refusals tracing proof translations "
    "torchlib rewrite counts rounded look_ups recurrent onnx_file editing decoding program_file "
    "xnnpack executorch_file export opening memory measure bench timing"
).split()
STORAGE = (
    "frames ans streams pack codes index adapt grids container layout reading contents writing "
    "format"
).split()
SOFT_LABELS = (
    "seeds records hashes shards manifest views source sequences answers verify read write"
).split()
ORDERS = {
    "graph": GRAPH,
    "pruning": PRUNING,
    "quantization": QUANTIZATION,
    "distillation.losses": LOSSES,
    "distillation.soft_labels": SOFT_LABELS,
    "training": TRAINING,
    "storage": STORAGE,
    "deployment": DEPLOYMENT,
}


def imports(file: Path) -> set[str]:
    """Names of rarefy's modules that a file imports anywhere, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rarefy":
            assert node.level == 0
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("rarefy")}
    return {name.removeprefix("rarefy.") for name in found} - {"__version__"}


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_has_its_place() -> None:
    assert {room(file) for file in FILES} <= set(RANK)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_stage_imports_only_stages_above_it(file) -> None:
    own = room(file)
    rooms = {name.split(".")[0] for name in imports(file)} - {own}
    lower = {name for name in rooms if RANK[name] > RANK[own]}
    beside = {name for name in rooms if RANK[name] == RANK[own] and name != "types"}
    assert not lower
    if own not in ("recipe", "reporting", "run_folder", "search", "preflight"):
        assert not beside


@pytest.mark.parametrize("package", ORDERS)
def test_files_of_a_stage_form_no_circle(package) -> None:
    order, folder = ORDERS[package], ROOT.joinpath(*package.split("."))
    for file in folder.rglob("*.py"):
        own = file.relative_to(folder).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(file):
            other = name.removeprefix(f"{package}.").split(".")[0]
            if name.startswith(f"{package}.") and other in order and other != own:
                assert order.index(other) < order.index(own), (file.name, name)


def test_no_files_import_each_other_in_a_circle() -> None:
    module = {f: "rarefy." + ".".join(f.relative_to(ROOT).with_suffix("").parts) for f in FILES}
    known = {name.removesuffix(".__init__") for name in module.values()}
    needs = {
        own: {
            target
            for name in imports(file)
            for target in (f"rarefy.{name}", f"rarefy.{name}".rpartition(".")[0])
            if target in known and target != own
        }
        for file, own in module.items()
    }
    assert len(list(graphlib.TopologicalSorter(needs).static_order())) >= len(needs)


def test_only_the_command_line_knows_the_tasks() -> None:
    users = {
        room(f) for f in FILES if any(n.startswith(("tasks", "integrations")) for n in imports(f))
    }
    assert users <= {"cli", "tasks", "integrations"}


def test_importing_loads_nothing_optional() -> None:
    code = f"import sys, rarefy; print([m for m in {OPTIONAL} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"
    assert not found.stderr
