"""A network as a ``.pt2`` file, the form of ``torch.export``, which PyTorch itself runs."""

from __future__ import annotations

import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rarefy.deployment.decoding import store_codes
from rarefy.deployment.proof import Run, outputs
from rarefy.deployment.refusals import unwritable
from rarefy.deployment.tracing import WAYS, Traced, quiet, trace
from rarefy.errors import FormatError, InputError, first_line
from rarefy.storage.adapt import held
from rarefy.storage.grids import quantized_weights
from rarefy.types import Inputs

SUFFIX = ".pt2"


class ProgramFile:
    """A traced network in the form of ``torch.export``.

    Args:
        model: the network, in eval mode.
        source: what was traced: the network, or its graph.
        traced: its program, which is changed in place.
        inputs: the examples.
    """

    def __init__(self, model: nn.Module, source: nn.Module, traced: Traced, inputs: Inputs) -> None:
        self.source, self.program = source, traced.program
        self.program.example_inputs = None  # whatever is exported, its examples are not
        found = held(model)
        store_codes(self.program, quantized_weights(model, found), found)
        _own_memory(self.program.state_dict)
        _own_memory(self.program.constants)

    @staticmethod
    def require(check: bool) -> None:
        """Nothing beside PyTorch is needed."""

    @staticmethod
    def trace(model: nn.Module, inputs: Inputs, ways: tuple[bool, ...] = WAYS) -> Traced:
        """The program of a network; the batch is free in the ways to try, in this order."""
        return trace(model, inputs, ways)

    def save(self, path: Path) -> None:
        """Write the file.

        PyTorch writes into memory: where a disk is full, its writer of files ends the process.

        Raises:
            ExportError: an operator or a constant of the network has no form in it.
        """
        content = BytesIO()
        try:
            with quiet():
                torch.export.save(self.program, content)
        except Exception as error:
            raise unwritable(self.source, self.program, error, SUFFIX) from error
        path.write_bytes(content.getbuffer())

    def open(self, path: Path) -> Run:
        """The file in PyTorch.

        Raises:
            FormatError: it cannot be loaded.
        """
        return partial(outputs, load_program(path))


def _own_memory(state: dict[str, Any]) -> None:
    """Copy tensors that are parts of larger ones, of which a file would hold the whole."""
    made: dict[int, Tensor] = {}
    for path, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.untyped_storage().nbytes() <= tensor.nbytes:
            continue
        if id(tensor) not in made:
            copy = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        state[path] = made[id(tensor)]


# --- reading -----------------------------------------------------------------------------------


class Program(nn.Module):
    """A loaded program as a module like others: the one of ``torch.export`` refuses ``eval()``.

    Args:
        program: what ``torch.export.load`` returned.
        name: of the file.
    """

    def __init__(self, program: ExportedProgram, name: str) -> None:
        super().__init__()
        self.name = name
        self._held = (program.module(),)  # in a tuple, where train() and eval() do not reach it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, with the arguments that it was exported with."""
        return self._held[0](*args, **kwargs)


def read_program(path: Path) -> ExportedProgram:
    """The program in a file. PyTorch unpickles parts of such files: read only those you trust.

    Raises:
        InputError: there is no such file.
        FormatError: it holds no program that this PyTorch can load.
    """
    if not path.is_file():
        raise InputError(str(path), "there is no such file", "Export the network first")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive")
        with quiet():
            return torch.export.load(path)
    except Exception as error:
        raise FormatError(
            str(path),
            f"PyTorch {torch.__version__} cannot load it: {first_line(error)}",
            "Export it again with this PyTorch; import first what registers its custom operators",
        ) from error


def load_program(path: Path) -> Program:
    """A ``.pt2`` file as a module.

    Raises:
        InputError: there is no such file.
        FormatError: it holds no program that this PyTorch can load.
    """
    return Program(read_program(path), path.name)
