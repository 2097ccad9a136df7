"""Make a trained PyTorch network smaller and faster, and prove it.

The names below are the whole public face. Functions return plain ``nn.Module`` objects or frozen
values and never change what they are given.
"""

__version__ = "0.1.0"

from rarefy import errors
from rarefy.deployment.export import export
from rarefy.deployment.measure import measure
from rarefy.distillation import losses
from rarefy.graph.trace import trace
from rarefy.pipeline import compress
from rarefy.pruning.prune import prune
from rarefy.pruning.repair import repair
from rarefy.quantization.quantize import quantize
from rarefy.recipe.options import Stages
from rarefy.storage.format import inspect, load, save
from rarefy.training import distill, evaluate, train
from rarefy.types import Budget, Int8, Target

__all__ = [
    "Budget",
    "Int8",
    "Stages",
    "Target",
    "compress",
    "distill",
    "errors",
    "evaluate",
    "export",
    "inspect",
    "load",
    "losses",
    "measure",
    "prune",
    "quantize",
    "repair",
    "save",
    "trace",
    "train",
]
