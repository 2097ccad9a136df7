"""Recipes: a YAML file that names a network, its data and the stages of a compression.

A recipe is read in two steps. :func:`load_recipe` reads and checks the whole file and imports
nothing; :func:`resolve` then imports the one module that the recipe names and calls the functions
that it names. Everything that is wrong with a recipe is reported at once, each with its line.
"""

from rarefy.recipe.job import Job, resolve
from rarefy.recipe.options import (
    DistillStage,
    PruneStage,
    QuantizeStage,
    Recipe,
    RepairStage,
    SparsifyStage,
    Stages,
    TargetOptions,
    TrainStage,
)
from rarefy.recipe.reading import load_recipe

__all__ = [
    "DistillStage",
    "Job",
    "PruneStage",
    "QuantizeStage",
    "Recipe",
    "RepairStage",
    "SparsifyStage",
    "Stages",
    "TargetOptions",
    "TrainStage",
    "load_recipe",
    "resolve",
]
