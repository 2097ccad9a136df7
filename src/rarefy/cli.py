"""The commands: ``rarefy demo``, ``compress``, ``recipe``, ``inspect``, ``bench`` and
``soft-labels``."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from rarefy import __version__
from rarefy.errors import InputError, RarefyError

# Threads that wait by spinning take the cores from whoever else needs them: training beside other
# work becomes several times slower. This must be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="rarefy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a trained PyTorch network smaller and faster, and prove it.",
)

soft_labels = typer.Typer(
    no_args_is_help=True, help="Look at the stored answers of a teacher, and recompute some."
)
app.add_typer(soft_labels, name="soft-labels")

Out = Annotated[Path | None, typer.Option(help="Folder for the artifacts and the report.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the folder after its last stage.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def demo(
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**32 - 1)] = 0,
    debug: Debug = False,
) -> None:
    """Do the main job on real handwritten digits: two to three minutes on two cores.

    Trains a ResNet-20, halves its computation, retrains it on the teacher's soft labels, quantizes
    it to int8, and writes report.html with what was measured.
    """
    with _guarded(debug):
        from rarefy.tasks.demo import run

        result = run(out or Path("rarefy-demo"), resume, overwrite, seed, progress=not quiet)
        _show(result.report, result.folder)


@app.command()
def compress(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress your own network as a recipe says.

    A recipe names a Python file, the functions in it that return the network and the data, and
    the stages with their options. `rarefy recipe` prints one to start from.
    """
    with _guarded(debug):
        from rarefy.pipeline import compress as run
        from rarefy.recipe import load_recipe, resolve

        plan = load_recipe(recipe)
        job = resolve(plan)
        result = run(
            job.model,
            train=job.train,
            val=job.val,
            test=job.test,
            example_inputs=job.example_inputs,
            target=plan.target.target() if plan.target else None,
            stages=plan.stages,
            out=out or plan.output,
            title=f"{type(job.model).__name__} ({recipe.name})",
            seed=plan.seed,
            resume=resume,
            overwrite=overwrite,
            progress=not quiet,
        )
        _show(result.report, result.folder)


@app.command()
def recipe() -> None:
    """Print a commented recipe to start from."""
    text = resources.files("rarefy").joinpath("recipe/example.yaml").read_text(encoding="utf-8")
    typer.echo(text, nl=False)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A file written by rarefy.")], debug: Debug = False
) -> None:
    """Show what a saved network holds, tensor by tensor."""
    with _guarded(debug):
        from rarefy.storage.contents import inspect as contents

        typer.echo(str(contents(file)))


@app.command()
def bench(
    files: Annotated[
        list[Path], typer.Argument(help="ONNX, .pt2 or .pte files; the first is the baseline.")
    ],
    runtime: Annotated[
        str,
        typer.Option(
            help="onnxruntime or openvino; for .pt2 files eager or compile; for .pte executorch."
        ),
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="Threads of the runtime.", min=1)] = 1,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="1x3x224x224, or name=1x3x224x224; once for each input."),
    ] = None,
    calls: Annotated[int, typer.Option(help="Timed calls of each file.", min=1)] = 200,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Compare the speed, size and memory of any ONNX, .pt2 or .pte files, called in turn.

    Inputs are made from the shapes that the files declare; sizes that they leave open are 1 where
    --shape does not give them.
    """
    with _guarded(debug):
        from rarefy.deployment.bench import bench as run
        from rarefy.reporting.bench import bench_json, bench_table

        found = run(
            files,
            runtime=runtime,
            threads=threads,
            shapes=shape or (),
            calls=calls,
            memory=memory,
        )
        if as_json:
            typer.echo(bench_json(found))
        else:
            Console().print(bench_table(found))


Store = Annotated[Path, typer.Argument(help="A folder written by write_soft_labels.")]


@soft_labels.command("inspect")
def inspect_soft_labels(path: Store, debug: Debug = False) -> None:
    """Show what a store holds: teacher, examples, form, size."""
    with _guarded(debug):
        from rarefy.distillation.soft_labels.read import SoftLabels

        typer.echo(str(SoftLabels(path).manifest))


@soft_labels.command()
def verify(
    path: Store,
    job: Annotated[
        str, typer.Option(help="file.py:function, which returns (teacher, data) as they were.")
    ],
    samples: Annotated[int, typer.Option(help="How many records to recompute.", min=1)] = 64,
    tolerance: Annotated[float, typer.Option(help="The largest error that passes.", min=0)] = 5e-3,
    debug: Debug = False,
) -> None:
    """Recompute a sample of the records, and report the largest error."""
    with _guarded(debug):
        from rarefy.distillation.soft_labels.read import SoftLabels
        from rarefy.recipe.job import teacher_and_data

        labels = SoftLabels(path)
        error = labels.verify(*teacher_and_data(job), samples=samples)
        typer.echo(f"{min(samples, labels.manifest.rows)} records: largest error {error:.2g}")
        if not error <= tolerance:
            _fail(f"{path}: the error is above the tolerance of {tolerance:g}", 1)


@contextmanager
def _guarded(debug: bool) -> Iterator[None]:
    """Errors as one sentence without traceback, unless asked for; exit status 1, 2 or 130.

    So are rarefy's warnings: no line of a program is the user's here.
    """
    held = warnings.formatwarning

    def sentence(message: Warning | str, category: type[Warning], *where: Any) -> str:
        plain = category is RuntimeWarning and not debug
        return f"rarefy: {message}\n" if plain else held(message, category, *where)

    warnings.formatwarning = sentence  # type: ignore[assignment]
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; --resume continues after the last complete stage", 130)
    except typer.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - the last line before the user: all are told
        if debug:
            traceback.print_exc()
        if isinstance(error, RarefyError):
            _fail(str(error), 2 if isinstance(error, InputError) else 1)
        hint = "" if debug else ". Run with --debug for the traceback"
        _fail(f"unexpected {type(error).__name__}: {error}{hint}", 1)
    finally:
        warnings.formatwarning = held


def _fail(text: str, status: int) -> NoReturn:
    Console(stderr=True).print(f"rarefy: {text}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(status)


def _show(report: object, folder: Path) -> None:
    from rarefy.reporting.summary import terminal
    from rarefy.types import Report

    assert isinstance(report, Report)
    console = Console()
    console.print(terminal(report))
    console.print(f"\n{folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"rarefy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
