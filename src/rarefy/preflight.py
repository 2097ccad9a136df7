"""What is checked before a run starts: that the network runs on the data, and gives logits for it.

All that would otherwise arise as an error of PyTorch in the middle of a run, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from rarefy.batches import (
    batch_size,
    batches,
    call,
    check_rereadable,
    evaluating,
    logits,
    take,
    tensors,
)
from rarefy.distillation.losses import IGNORE, label_dim
from rarefy.errors import DataError, InputError
from rarefy.paths import wrapped_at
from rarefy.recipe.options import Stages
from rarefy.schemes import Int8
from rarefy.types import Data, Inputs, Target, check_network


def check_options(stages: object, target: object, seed: object) -> None:
    """Refuse options of the wrong type, and seeds that no generator takes.

    Raises:
        InputError: names the option.
    """
    for name, value, kind in (("stages", stages, Stages), ("target", target, Target | None)):
        if not isinstance(value, kind):
            what = f"a {type(value).__name__} is no {name.capitalize()}"
            remedy = f"Write {name}=rarefy.{name.capitalize()}(...)"
            raise InputError(f"compress({name})", what, remedy)
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        what = "a seed is a whole number, at least 0 and below 2**32"
        raise InputError(f"compress(seed={seed!r})", what, "Write seed=0")


def check_model(model: nn.Module) -> None:
    """Refuse what is no plain network with weights.

    Raises:
        InputError: it is no module, a wrapper around one, or not initialized.
    """
    where = "compress(model)"
    check_network(model, where)
    inner = wrapped_at(model)
    if inner is not None:
        what = f"{type(model).__name__} is a wrapper around the network"
        raise InputError(where, what, f"Give the network inside it: model.{inner}")
    lazy = UninitializedParameter | UninitializedBuffer
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, lazy):
            what = f"{path} is not initialized, being of a lazy module"
            raise InputError(where, what, "Call the network once on a batch first")


def check_precision(model: nn.Module, stages: Stages) -> None:
    """Refuse weights that a later stage cannot work with, before the stages ahead of it ran.

    Raises:
        InputError: int8 is asked of a network in another precision than float32, or training of one
            whose parameters are all frozen.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    other = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32})
    if stages.quantize is not None and isinstance(stages.quantize.scheme(), Int8) and other:
        what = f"its weights are {', '.join(other)}, and int8 is made from float32"
        raise InputError("compress(model)", what, "Call model.float(), or leave quantize out")
    trains = stages.train is not None or stages.distill is not None
    if trains and not any(p.requires_grad for p in model.parameters()):
        what = "all its parameters are frozen, and training was asked for"
        remedy = "Call model.requires_grad_(True), or leave train and distill out"
        raise InputError("compress(model)", what, remedy)


def first_inputs(data: Data, where: str, examples: int) -> Inputs:
    """A few examples of the first batch.

    Raises:
        DataError: the data are empty, or can be read only once.
    """
    return take(_first(data, where)[0], examples)


def check_data(
    model: nn.Module, data: Data, where: str, *, labelled: bool = True, soft: bool = False
) -> None:
    """Refuse data that the network cannot be called with or that its answers do not fit.

    The first batch stands for all.

    Args:
        model: the network.
        data: batches.
        where: of the data, for messages.
        labelled: whether targets are needed.
        soft: whether targets may be probabilities of the shape of the logits.

    Raises:
        InputError: the network does not run, or returns no finite logits.
        DataError: the data are empty, can be read only once, or have no or impossible targets.
    """
    inputs, targets = _first(data, where)
    where = f"{where}, first batch"
    answers = check_inputs(model, inputs, where)
    if targets is None and not labelled:
        return
    if not isinstance(targets, Tensor):
        what = "it has no targets" if targets is None else f"its targets are no tensor: {targets!r}"
        raise DataError(where, what[:200], "Yield (inputs, targets) with a tensor of class indices")
    if not (soft and targets.is_floating_point() and targets.shape == answers.shape):
        _check_targets(answers, targets, where)


def check_inputs(model: nn.Module, inputs: Inputs, where: str) -> Tensor:
    """Run the network on inputs, and on one example of them alone; returns its logits.

    Raises:
        InputError: it does not run, or returns no finite logits.
    """
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        what = f"inputs are a {type(inputs).__name__}"
        raise InputError(where, what, "Give a tensor, a tuple of arguments or a mapping of them")
    answers = _answers(model, inputs, where)
    if batch_size(inputs) > 1:
        _answers(model, take(inputs, 1), f"{where}, one example alone")
    return answers


def _first(data: Data, where: str) -> tuple[Inputs, Tensor | None]:
    check_rereadable(data, where)
    return next(batches(data, where))


def _answers(model: nn.Module, inputs: Inputs, where: str) -> Tensor:
    try:
        with evaluating(model):
            outputs = call(model, inputs)
    except Exception as error:
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors(inputs))
        raise InputError(
            where,
            f"the network does not run on it ({shapes.replace('torch.', '')}): "
            f"{type(error).__name__}: {str(error).strip()[:500]}",
            "Give inputs of the shape and dtype that its forward takes, for any number of examples",
        ) from error
    answers = logits(outputs)
    if answers.ndim != 2:
        raise InputError(
            where,
            f"the network answers with shape {tuple(answers.shape)}",
            "compress() measures top-1 accuracy of logits (batch, classes); for others call "
            "prune(), distill() and quantize() one by one",
        )
    if not bool(torch.isfinite(answers).all()):
        remedy = "Check the data and the network's weights and buffers for NaN"
        raise InputError(where, "the network answers NaN or infinity", remedy)
    return answers


def _check_targets(answers: Tensor, targets: Tensor, where: str) -> None:
    classes = answers.shape[label_dim(where, answers, targets)]
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise DataError(where, f"its targets are {targets.dtype}", "Give integer class indices")
    wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= classes))]
    if len(wrong):
        raise DataError(
            where,
            f"label {int(wrong[0])} is none of the network's {classes} classes",
            f"Number the classes from 0 to {classes - 1}",
        )
