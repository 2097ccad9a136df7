"""Masks: which weights are zero, kept so through training.

A mask is no part of a network. Its weights are plain parameters that hold exact zeros, so that
``state_dict``, ``deepcopy`` and files know nothing of masks; after every optimizer step the zeros
are written again, which undoes whatever momentum, weight decay or Adam's moments added.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.copies import copied
from rarefy.errors import InputError
from rarefy.paths import unwrapped, within_wrappers
from rarefy.types import check_network


class Masks(Mapping[str, Tensor]):
    """Path of a parameter -> boolean tensor of its shape, True where the weight stays.

    Paths are those of the network itself, also where it is given in a wrapper (``torch.compile``,
    ``DataParallel``, ``AveragedModel``).

    Args:
        keep: the masks; numbers count as True where they are not zero.

    Raises:
        InputError: it is no mapping from paths to tensors.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
        >>> Masks.of(layer)["weight"]
        tensor([[False,  True]])
    """

    def __init__(self, keep: Mapping[str, Tensor]) -> None:
        wrong: list[Any] = (
            [keep] if not isinstance(keep, Mapping)
            else [value for value in keep.values() if not isinstance(value, Tensor)]
        )  # fmt: skip
        if wrong:
            raise InputError(
                "masks",
                f"a {type(wrong[0]).__name__} was given",
                "Give path of a parameter -> tensor of its shape, True where the weight stays",
            )
        self._keep = {path: mask.bool() for path, mask in keep.items()}

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """The masks of a network: where its weights are zero now.

        Of what :func:`~rarefy.pruning.prune.prune` made sparse, the weights that it pruned;
        otherwise all weights of two or more dimensions that hold a zero.
        """
        network = unwrapped(model)
        record = getattr(model, "sparsified", getattr(network, "sparsified", None))
        pruned = None if record is None else {within_wrappers(path) for path in record.zeros}
        return cls(
            {
                path: parameter.detach() != 0
                for path, parameter in network.named_parameters()
                if (parameter.ndim > 1 if pruned is None else within_wrappers(path) in pruned)
                and bool((parameter == 0).any())
            }
        )

    def apply(self, model: nn.Module) -> None:
        """Set to zero what does not stay, in place. Parameters without a mask are left alone.

        Raises:
            InputError: a mask has another shape than the parameter, or no mask is of a parameter.
        """
        with torch.no_grad():
            for parameter, keep in self.pairs(model):
                parameter.masked_fill_(~keep, 0.0)

    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters of a network that have a mask, each with its mask on the same device.

        Raises:
            InputError: a mask has another shape than the parameter, or no mask is of a parameter.
        """
        found = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        if self._keep and not self._keep.keys() & found.keys():
            raise InputError(
                "masks",
                f"no parameter of {type(model).__name__} has a mask; the masks are of "
                f"{', '.join(list(self._keep)[:3])}",
                f"Give the network itself, not a wrapper of it{_near(self._keep, found)}",
            )
        for path, keep in self._keep.items():
            parameter = found.get(path)
            if parameter is None:
                continue
            if keep.shape != parameter.shape:
                raise InputError(
                    f"masks[{path!r}]",
                    f"shape {tuple(keep.shape)} for a parameter of {tuple(parameter.shape)}",
                    "Take the masks of this network: Masks.of(model)",
                )
            yield parameter, keep.to(parameter.device)

    def __getitem__(self, path: str) -> Tensor:
        return self._keep[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keep)

    def __len__(self) -> int:
        return len(self._keep)


def _near(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(next(iter(wanted)), list(found), 1)
    return f" (did you mean {near[0]}?)" if near else ""


class Hold:
    """Keeps weights at zero; made by :func:`hold`."""

    def __init__(self, model: nn.Module, masks: Masks | None) -> None:
        self.model, self.masks = model, Masks.of(model) if masks is None else masks
        self._given = masks is not None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __call__(self, model: nn.Module | None = None) -> None:
        """Set the weights to zero again: of the network that was held, or of a copy of it."""
        self.masks.apply(self.model if model is None else model)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on later: the masks."""
        return {"masks": dict(self.masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.masks = Masks(state["masks"])

    def resume(self, model: nn.Module, step: int) -> None:
        """Go on without a state: with what is zero in the network now, or the masks given."""
        if not self._given:
            self.masks = Masks.of(model)

    def attach(self, optimizer: torch.optim.Optimizer) -> Hold:
        """Do so after every step of an optimizer, until :meth:`detach`.

        Copies of the optimizer do not have it, as ``copy.deepcopy`` leaves hooks out.

        Raises:
            InputError: the optimizer takes no hooks.
        """
        try:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self()))
        except AttributeError as error:
            raise InputError(
                f"hold(model).attach({type(optimizer).__name__})",
                "it takes no hooks after its steps",
                "Attach to the optimizer inside it, before it is wrapped, or call what hold gives "
                "after every step",
            ) from error
        return self

    def detach(self) -> None:
        """Leave all optimizers as they were."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def hold(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Hold:
    """Keep weights that are zero now at exactly zero while a network is trained.

    In a loop of one's own, either call it after every step, or attach it to the optimizer::

        again = hold(model)
        ...
        optimizer.step(); again()

        with hold(model).attach(optimizer):
            ...

    In rarefy's loop: ``train(model, data, after_step=hold(model))``. For Lightning and
    transformers see :mod:`rarefy.integrations`. Gradients of the zeros are left alone, for methods
    that look at them.

    Args:
        model: the sparse network. Frozen parameters are held, too; shared ones once.
        masks: what stays (:class:`Masks`); None for :meth:`Masks.of` the network.

    Raises:
        InputError: the model is no network, or the masks are no tensors by path.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
        >>> again = hold(layer)
        >>> _ = layer.weight.data.add_(1)
        >>> again()
        >>> layer.weight.tolist()
        [[0.0, 2.0]]
    """
    check_network(model, "hold(model)")
    return Hold(model, None if masks is None else Masks(masks))


def rewind(
    model: nn.Module, state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The network as it was at an earlier time, with the zeros of now: a lottery ticket.

    Frankle and Carbin 2019 (https://arxiv.org/abs/1803.03635) rewind to the initial weights,
    Frankle et al. 2020 (https://arxiv.org/abs/1912.05671) to those after a few hundred steps.
    Iterative magnitude pruning is a loop::

        start, schedule = copy.deepcopy(model.state_dict()), Iterative(final=0.9, rounds=5)
        for number in range(5):
            trained = train(model, data, after_step=hold(model))
            sparse = prune(trained, x, Budget(sparsity=schedule(number)), structure="weight")
            model = rewind(sparse, start)

    Args:
        model: the sparse network; it is not changed.
        state: an earlier ``state_dict`` of it, buffers included, or of the network in its wrapper.
        masks: what stays (:class:`Masks`); None for :meth:`Masks.of` the network.

    Returns:
        A new network.

    Raises:
        InputError: the state is not one of this network, or the masks are no tensors by path.
    """
    check_network(model, "rewind(model)")
    kept = Masks.of(model) if masks is None else Masks(masks)
    found = copied(model)
    try:
        same = isinstance(state, Mapping) and set(state) == set(found.state_dict())
        (found if same else unwrapped(found)).load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            "rewind(state)",
            f"it is not a state of this network: {str(error).splitlines()[-1].strip()}",
            "Give copy.deepcopy(model.state_dict()) of an earlier time",
        ) from error
    kept.apply(found)
    return found


def sparsity(model: nn.Module) -> float:
    """Share of zeros among the weights of two or more dimensions."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    total = sum(p.numel() for p in weights)
    return sum(int((p == 0).sum()) for p in weights) / total if total else 0.0
