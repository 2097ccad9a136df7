"""Make a trained PyTorch network smaller and faster, and prove it.

The names below are the whole public face. Functions return plain ``nn.Module`` objects or frozen
values and never change what they are given. A name is imported when it is first used, so that
``import rarefy`` and ``rarefy --help`` take no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rarefy import errors as errors
    from rarefy import metrics as metrics
    from rarefy.deployment.export import export as export
    from rarefy.deployment.measure import measure as measure
    from rarefy.distillation import losses as losses
    from rarefy.distillation import soft_labels as soft_labels
    from rarefy.distillation.pairing import pairs as pairs
    from rarefy.distillation.soft_labels.read import SoftLabels as SoftLabels
    from rarefy.distillation.soft_labels.write import write_soft_labels as write_soft_labels
    from rarefy.distillation.taps import taps as taps
    from rarefy.gains import quantize as quantize
    from rarefy.graph.trace import trace as trace
    from rarefy.measured import prune as prune
    from rarefy.pipeline import compress as compress
    from rarefy.pruning.gradual import GradualPruning as GradualPruning
    from rarefy.pruning.gradual import GradualUnits as GradualUnits
    from rarefy.pruning.repair import repair as repair
    from rarefy.pruning.scoring import criteria as criteria
    from rarefy.pruning.scoring.curves import Sensitivity as Sensitivity
    from rarefy.pruning.scoring.movement import Movement as Movement
    from rarefy.pruning.sensitivity import sensitivity as sensitivity
    from rarefy.pruning.sparsity import patterns as patterns
    from rarefy.pruning.sparsity import regularize as regularize
    from rarefy.pruning.sparsity.masks import hold as hold
    from rarefy.pruning.sparsity.masks import rewind as rewind
    from rarefy.recipe.options import Stages as Stages
    from rarefy.schemes import Half as Half
    from rarefy.schemes import Int8 as Int8
    from rarefy.schemes import WeightOnly as WeightOnly
    from rarefy.storage.contents import inspect as inspect
    from rarefy.storage.format import load as load
    from rarefy.storage.format import load_tensor as load_tensor
    from rarefy.storage.format import save as save
    from rarefy.students import student as student
    from rarefy.training import teachers as teachers
    from rarefy.training.distill import distill as distill
    from rarefy.training.evaluate import evaluate as evaluate
    from rarefy.training.train import train as train
    from rarefy.types import Budget as Budget
    from rarefy.types import Limit as Limit
    from rarefy.types import Target as Target

_HOME = {
    "Budget": "rarefy.types",
    "GradualPruning": "rarefy.pruning.gradual",
    "GradualUnits": "rarefy.pruning.gradual",
    "Half": "rarefy.schemes",
    "Int8": "rarefy.schemes",
    "Limit": "rarefy.types",
    "Movement": "rarefy.pruning.scoring.movement",
    "Sensitivity": "rarefy.pruning.scoring.curves",
    "SoftLabels": "rarefy.distillation.soft_labels.read",
    "Stages": "rarefy.recipe.options",
    "Target": "rarefy.types",
    "WeightOnly": "rarefy.schemes",
    "compress": "rarefy.pipeline",
    "distill": "rarefy.training.distill",
    "evaluate": "rarefy.training.evaluate",
    "export": "rarefy.deployment.export",
    "hold": "rarefy.pruning.sparsity.masks",
    "inspect": "rarefy.storage.contents",
    "load": "rarefy.storage.format",
    "load_tensor": "rarefy.storage.format",
    "measure": "rarefy.deployment.measure",
    "pairs": "rarefy.distillation.pairing",
    "prune": "rarefy.measured",
    "quantize": "rarefy.gains",
    "repair": "rarefy.pruning.repair",
    "rewind": "rarefy.pruning.sparsity.masks",
    "save": "rarefy.storage.format",
    "sensitivity": "rarefy.pruning.sensitivity",
    "student": "rarefy.students",
    "taps": "rarefy.distillation.taps",
    "trace": "rarefy.graph.trace",
    "train": "rarefy.training.train",
    "write_soft_labels": "rarefy.distillation.soft_labels.write",
}
_MODULES = {
    "criteria": "rarefy.pruning.scoring.criteria",
    "errors": "rarefy.errors",
    "losses": "rarefy.distillation.losses",
    "metrics": "rarefy.metrics",
    "patterns": "rarefy.pruning.sparsity.patterns",
    "regularize": "rarefy.pruning.sparsity.regularize",
    "soft_labels": "rarefy.distillation.soft_labels",
    "teachers": "rarefy.training.teachers",
}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'rarefy' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
