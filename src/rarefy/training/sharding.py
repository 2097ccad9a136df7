"""Which objective takes the steps: the one that every process holds, or its copy in shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.batches import map_tensors, tensors
from rarefy.copies import copied
from rarefy.errors import InputError, RarefyError, first_line
from rarefy.graph.model import GraphModel
from rarefy.process import of_the_first
from rarefy.training.networks import tensors_of
from rarefy.training.objective import Objective
from rarefy.training.teachers import Aside

if TYPE_CHECKING:
    from accelerate import Accelerator


def spread(objective: Objective, where: str, accelerator: Accelerator) -> Whole:
    """An objective as Accelerate is configured to hold it.

    Raises:
        InputError: it is configured for what the training loop cannot do.
    """
    kind = str(accelerator.distributed_type.value)
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        name = "FSDP 1" if kind == "FSDP" else kind
        raise InputError(
            f"{where}()",
            f"Accelerate is configured for {name}, which it does not train with",
            "Configure FSDP with fsdp_version: 2, or processes that each hold the network",
        )
    made = Shards if kind == "FSDP" else Whole
    return made(objective, where, accelerator)


class Whole:
    """An objective that every process holds, and that takes the steps itself.

    Args:
        objective: what is trained.
        where: the call that errors name.
        accelerator: whose configuration says how it is held.

    Attributes:
        running: what Accelerate is given, and takes the steps.
    """

    def __init__(self, objective: Objective, where: str, accelerator: Accelerator) -> None:
        self.running, self.where, self.accelerator = objective, where, accelerator

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """While Accelerate prepares what is running.

        Raises:
            InputError: the network cannot be held so.
        """
        try:
            yield
        except Exception as error:
            if self.accelerator.num_processes == 1:
                raise
            raise InputError(
                f"{self.where}(model)",
                f"processes cannot share it: {first_line(error)}",
                "Train in one process, or give parameters and buffers types that they send",
            ) from error

    @contextmanager
    def stepping(self, first: bool) -> Iterator[None]:
        """While what is running finds the gradients of a step.

        Raises:
            InputError: the network cannot be held so.
        """
        try:
            yield
        except RuntimeError as error:
            if "mark a variable ready only once" not in str(error):
                raise
            raise InputError(
                f"{self.where}(model)",
                f"processes cannot average its gradients: {first_line(error)}",
                "Write checkpoint(..., use_reentrant=False) where the network recomputes "
                "activations, and compute what parameters take part in within its forward",
            ) from error

    def align(self) -> None:
        """Before a step: buffers that it reads are those of the first process."""

    def gather(self) -> None:
        """The objective gets the values of what is running; all processes take part."""

    def scatter(self) -> None:
        """What is running gets the values of the objective."""

    def pass_gradients(self) -> None:
        """What is running gets, beside its own, the gradients that the objective has."""


class Shards(Whole):
    """An objective whose copy FSDP spreads over the processes.

    FSDP changes for good the modules that it spreads, and their parameters are whole only while
    they run. So a copy is spread and takes the steps, and what evaluates, saves, follows or is
    returned is the objective: one more copy of the weights on every process, where FSDP saves the
    gradients and the state of the optimizer. What only answers (:class:`Aside`) is in both.

    Args:
        objective: what is trained; it gets the first process's values on all of them.
        where: the call that errors name.
        accelerator: whose configuration says how to spread.
    """

    def __init__(self, objective: Objective, where: str, accelerator: Accelerator) -> None:
        from accelerate.utils import AutocastKwargs

        self.objective = objective
        for _, tensor in tensors_of(objective):
            of_the_first([tensor], accelerator)
        running = copied(objective, {id(m): m for m in objective.modules() if isinstance(m, Aside)})
        # Casts are not kept, for they are as large as what FSDP spares.
        autocast = accelerator.autocast(AutocastKwargs(cache_enabled=False))
        running.forward = autocast(running.forward)  # type: ignore[method-assign]
        # Where the configuration names no classes to wrap, Accelerate asks the network.
        classes = getattr(objective.network, "_no_split_modules", None)
        running._no_split_modules = classes  # type: ignore[assignment]
        super().__init__(running, where, accelerator)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Accelerate's plugin is set to what the copy needs, and put back.

        Raises:
            InputError: FSDP refuses the network.
        """
        plugin = self.accelerator.state.fsdp_plugin
        # The copy is on every process, and a policy of FSDP's would cast BatchNorms, too.
        ours = {"cpu_ram_efficient_loading": False, "mixed_precision_policy": None}
        if any(isinstance(module, GraphModel) for module in self.running.modules()):
            # It reads the parameters of its layers itself: they are whole only in one piece.
            ours |= {"auto_wrap_policy": None, "activation_checkpointing": False}
        kept = {name: getattr(plugin, name) for name in ours}
        try:
            vars(plugin).update(ours)
            yield
        except Exception as error:
            raise InputError(
                f"{self.where}(model)",
                f"FSDP does not take it: {first_line(error)}",
                "Configure processes that each hold the network: accelerate launch --multi_gpu",
            ) from error
        finally:
            vars(plugin).update(kept)

    @contextmanager
    def stepping(self, first: bool) -> Iterator[None]:
        """Much of what FSDP refuses it finds in the first step.

        Raises:
            InputError: that step fails.
        """
        try:
            yield
        except Exception as error:
            if not first or isinstance(error, RarefyError):
                raise
            raise InputError(
                f"{self.where}(model)",
                f"the first step in shards fails: {first_line(error)}",
                "Configure FSDP without an auto_wrap_policy, or processes that each hold the "
                "network (accelerate launch --multi_gpu); where these fail, too, it is no matter "
                "of shards",
            ) from error

    def align(self) -> None:
        """The copy's buffers are those of the first process, as in PyTorch's own wrapper."""
        of_the_first(self.running.buffers(), self.accelerator)

    @torch.no_grad()
    def gather(self) -> None:
        """The objective gets the values of the shards, and buffers of the first process."""
        for own, shard in self._pairs():
            own.copy_(gathered(shard))
        of_the_first(self.objective.buffers(), self.accelerator)

    @torch.no_grad()
    def scatter(self) -> None:
        """The shards get the values of the objective."""
        for own, shard in self._pairs():
            shard.copy_(spread_like(own, shard))

    @torch.no_grad()
    def pass_gradients(self) -> None:
        """The shards get, beside their own, the gradients of a penalty on the objective."""
        pairs = zip(self.objective.parameters(), self.running.parameters(), strict=True)
        for own, shard in pairs:
            if own.grad is not None:
                grad, own.grad = spread_like(own.grad, shard), None
                shard.grad = grad if shard.grad is None else shard.grad + grad

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of the objective, and what is running of it."""
        pairs = zip(tensors_of(self.objective), tensors_of(self.running), strict=True)
        return ((own, shard) for (_, own), (_, shard) in pairs)


# --- tensors in shards, told by their methods: PyTorch's module of them is slow to import ---------


def gathered(value: Any) -> Tensor:
    """A tensor whole; all processes take part."""
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found


def spread_like(value: Tensor, other: Any) -> Tensor:
    """A whole tensor, equal on all processes, in the shards of another of its shape."""
    if hasattr(other, "full_tensor") and value.shape == other.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
    return value


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that an optimizer says of its state, its tensors whole."""
    held: dict[str, Any] = map_tensors(gathered, optimizer.state_dict())
    return held


def set_optimizer_state(optimizer: torch.optim.Optimizer, held: Mapping[str, Any]) -> None:
    """Put back what :func:`optimizer_state` gave."""
    numbered = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    each = held.get("state")
    state = {
        number: map_tensors(partial(spread_like, other=numbered.get(number)), value)
        for number, value in (each.items() if isinstance(each, Mapping) else ())
    }
    optimizer.load_state_dict({**held, "state": state} if state else dict(held))
    for number, parameter in numbered.items():
        # PyTorch gives floats the parameter's type, and counts, too.
        pairs = zip(
            tensors(optimizer.state.get(parameter)), tensors(state.get(number)), strict=False
        )
        for loaded, exact in pairs:
            if loaded.dtype != exact.dtype and loaded.shape == exact.shape:
                loaded.data = exact.to(loaded.device)
