"""Recipes: what is accepted, what is refused and where, and what is imported when."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rarefy.errors import DataError, InputError, RecipeError
from rarefy.recipe import (
    PruneStage,
    QuantizeStage,
    Recipe,
    SparsifyStage,
    TargetOptions,
    load_recipe,
    resolve,
)
from rarefy.schemes import Half, Int8, WeightOnly
from rarefy.types import Budget, Limit, Target

NAMES = "source: net.py\nmodel: make_model\ndata: make_data\n"

FULL = """\
source: net.py
model: make_model
data: make_data
example_inputs: make_inputs
seed: 3
out: small
target: {speedup: 2, size: 8.5, max_drop: 0.01}
stages:
  train: {epochs: 2, lr: 1e-1}
  prune:
    macs: 0.5
    criterion: magnitude
    exclude: [head, "stage1.*"]
    round_to: 8
  repair: {samples: 64}
  distill: {epochs: 3, lr: 0.05, temperature: 2, label_weight: 0}
  quantize: {int8: {observer: minmax}}
"""

MODULE = """\
import torch
from torch import nn

def make_model():
    return nn.Linear(3, 2)

def make_data():
    batch = (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    return {"train": [batch], "val": [batch], "test": [batch]}

def make_inputs():
    return torch.zeros(1, 3)

answer = 42
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe and the module beside it; returns the recipe's path."""

    def both(recipe: str | bytes, module: str | None = None) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(recipe.encode() if isinstance(recipe, str) else recipe)
        if module is not None:
            (tmp_path / "net.py").write_text(module)
        return path

    return both


def problems(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


# --- what is accepted


def test_a_full_recipe_is_read(write: Write, tmp_path: Path) -> None:
    recipe = load_recipe(write(FULL))
    assert recipe.stages.train is not None
    assert recipe.stages.train.lr == 0.1
    assert recipe.stages.prune.budget() == Budget(macs=0.5, round_to=8)
    assert recipe.stages.prune.exclude == ("head", "stage1.*")
    assert recipe.stages.quantize is not None
    assert recipe.stages.quantize.scheme() == Int8(observer="minmax")
    assert recipe.target is not None
    assert recipe.target.target() == Target(speedup=2, size=8.5, max_drop=0.01)
    assert (recipe.seed, recipe.output) == (3, tmp_path / "small")


def test_lists_of_names_are_taken_in_python() -> None:
    for stage in (
        PruneStage(macs=0.5, exclude=["head"]),
        SparsifyStage(sparsity=0.5, exclude=["head"]),
    ):
        assert stage.exclude == ("head",)
    with pytest.raises(ValidationError, match="valid string"):
        PruneStage(macs=0.5, exclude=[0])


def test_every_kind_of_budget_with_limits_of_layers_is_read(write: Write) -> None:
    for kind in ("params", "bytes", "latency"):
        prune = f"{kind}: 0.5, round_to: auto, layers: {{stem: 0.25, 'b.*': {{min_keep: 16}}}}"
        recipe = load_recipe(write(f"{NAMES}stages: {{prune: {{{prune}}}}}\n"))
        assert recipe.stages.prune is not None
        layers = {"stem": 0.25, "b.*": Limit(min_keep=16)}
        assert recipe.stages.prune.budget() == Budget(**{kind: 0.5}, round_to="auto", layers=layers)


def test_three_names_are_enough(write: Write) -> None:
    recipe = load_recipe(write(NAMES))
    assert recipe.stages.train is None
    assert recipe.stages.prune is None  # left to the target, or to half the MACs
    assert recipe.stages.repair is not None
    assert recipe.stages.distill is not None
    assert recipe.stages.quantize is not None


def test_stages_can_be_left_out(write: Write) -> None:
    recipe = load_recipe(
        write(NAMES + "stages: {train: true, repair: false, distill: no, quantize: off}\n")
    )
    assert recipe.stages.train is not None
    assert recipe.stages.repair is None
    assert recipe.stages.distill is None
    assert recipe.stages.quantize is None


def test_a_recipe_is_frozen(write: Write) -> None:
    recipe = load_recipe(write(NAMES))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_a_byte_order_mark_is_harmless(write: Write) -> None:
    assert load_recipe(write(b"\xef\xbb\xbf" + NAMES.encode())).source == "net.py"


@pytest.mark.parametrize(
    ("mirror", "option", "extra"),
    [
        # layers are spelled otherwise
        (PruneStage, Budget, {"criterion", "exclude", "layers", "structure"}),
        (TargetOptions, Target, set()),
    ],
)
def test_options_mirror_their_values(
    mirror: type[PruneStage], option: type[Budget], extra: set[str]
) -> None:
    """A field or default that changes in one place and not in the other is found here."""
    fields = {f.name: f.default for f in dataclasses.fields(option) if f.name not in extra}
    mirrored = {n: f.default for n, f in mirror.model_fields.items() if n not in extra}
    assert mirrored == fields


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("{}", Int8()),
        ("{int8: {smooth: null, skip: [head]}}", Int8(smooth=None, skip=("head",))),
        ("{weights: {bits: 4, group: 32}}", WeightOnly(bits=4, group=32)),
        ("{weights: {bits: 1, method: palette}}", WeightOnly(bits=1, method="palette")),
        ("{half: {}}", Half()),
    ],
)
def test_the_stage_of_quantization_holds_a_scheme(write: Write, text: str, scheme: Int8) -> None:
    stage = load_recipe(write(f"{NAMES}stages: {{quantize: {text}}}\n")).stages.quantize
    assert stage is not None
    assert stage.scheme() == scheme
    name = {Int8: "int8", WeightOnly: "weights", Half: "half"}[type(scheme)]
    assert QuantizeStage(**{name: scheme}).scheme() == scheme


def test_blocks_and_units_as_a_recipe_names_them(write: Write) -> None:
    text = NAMES + "stages: {{prune: {{{}, structure: {}}}}}\n"
    alone = load_recipe(write(text.format("blocks: 2", "depth"))).stages.prune
    both = load_recipe(write(text.format("macs: 0.5", "[channel, depth]"))).stages.prune
    assert alone is not None
    assert both is not None
    assert (alone.structure, alone.budget()) == ("depth", Budget(blocks=2))
    assert both.structure == ("channel", "depth")


@pytest.mark.parametrize(
    ("options", "informed"),
    [({}, True), ({"criterion": "magnitude"}, False), ({"criterion": "taylor"}, True),
     ({"criterion": "magnitude", "structure": "depth"}, True)],
)  # fmt: skip
def test_what_is_chosen_on_examples(options: dict[str, str], informed: bool) -> None:
    assert PruneStage(macs=0.5, **options).informed is informed


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "+1e-3", ".1e-2", "0.001", "10.e-4"])
def test_numbers_as_people_write_them(write: Write, number: str) -> None:
    recipe = load_recipe(write(NAMES + f"stages: {{train: {{lr: {number}}}}}\n"))
    assert recipe.stages.train is not None
    assert recipe.stages.train.lr == pytest.approx(1e-3)


# --- what is refused, and where


def test_a_misspelt_key_is_named_with_its_line(write: Write) -> None:
    text = problems(write(FULL.replace("macs:", "mcas:")))
    assert "recipe.yaml:11: stages.prune.mcas: unknown key; did you mean 'macs'?" in text


def test_all_problems_are_listed_at_once_in_order(write: Write) -> None:
    text = problems(
        write(
            "source: net.py\n"
            "modle: make_model\n"
            "seed: -1\n"
            "target: {speedup: 0.5, size: big}\n"
            "stages:\n"
            "  train: {epochs: 1.5, lr: 0}\n"
            "  prune:\n"
            "    macs: 1.5\n"
            "    scope: everywhere\n"
            "    round_to: 0\n"
            "  quantize:\n"
            "    int8: {observer: magic, bitts: 3}\n"
            "  distil: {}\n"
        )
    )
    lines = [line.strip() for line in text.splitlines()]
    starts = [
        "recipe.yaml:1: data: is missing",
        "recipe.yaml:1: model: is missing",
        "recipe.yaml:2: modle: unknown key; did you mean 'model'?",
        "recipe.yaml:3: seed: must be at least 0, not -1",
        "recipe.yaml:4: target.size: must be a number, not big",
        "recipe.yaml:4: target.speedup: a target factor is at least 1",
        "recipe.yaml:6: stages.train.epochs: must be a whole number, not 1.5",
        "recipe.yaml:6: stages.train.lr: must be above 0, not 0",
        "recipe.yaml:8: stages.prune.macs: a budget is the share of the original",
        "recipe.yaml:9: stages.prune.scope: unknown scope",
        "recipe.yaml:10: stages.prune.round_to: round_to must be at least 1",
        "recipe.yaml:12: stages.quantize.int8.bitts: unknown key; known keys are observer",
        "recipe.yaml:12: stages.quantize.int8.observer: unknown observer",
        "recipe.yaml:13: stages.distil: unknown key; did you mean 'distill'?",
    ]
    assert f"{len(starts)} problems" in lines[0]
    for start, line in zip(starts, lines[1:], strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("- source\n", "not a mapping"),
        ("net.py\n", "not a mapping"),
        ("source: [\n", "not valid YAML"),
        ("source: a\x00b\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML"),
        (NAMES + "seed: 1\nseed: 2\n", "recipe.yaml:5: seed: given twice, first on line 4"),
        (NAMES + "? [a, b]\n: 1\n", "recipe.yaml:4: a key must be a word"),
        (NAMES + "seed: 2026-13-45\n", "recipe.yaml:4: seed: cannot read the value"),
        (NAMES + "seed: true\n", "seed: must be a whole number, not True"),
        (NAMES + "seed: '1'\n", "seed: must be a whole number, not '1'"),
        (NAMES + f"seed: {2**32}\n", "seed: must be below 4294967296"),
        (NAMES + "out: ''\n", "out: must not be empty"),
        (NAMES + 'out: "a\\eb"\n', "out: must not hold control characters"),
        (NAMES + "target: 8\n", "target: must be a mapping of options, not 8"),
        (NAMES + "target: {size: .inf}\n", "target.size: must be finite, not inf"),
        (NAMES + "target: {size: .nan}\n", "target.size: must be finite, not nan"),
        (NAMES + "stages:\n", "recipe.yaml:4: stages: must be a mapping of options"),
        (NAMES + "stages: {repair: }\n", "stages.repair: is empty; write false"),
        (NAMES + "stages: {prune: {macs: 1, criterion: magic}}\n", "prune.criterion: "),
        (NAMES + "stages: {prune: {macs: 1, structure: '2:4'}}\n", "stages.prune.structure"),
        (
            NAMES + "stages: {prune: {blocks: 2}}\n",
            "stages.prune: a number of blocks can be removed only where nothing else is",
        ),
        (
            NAMES + "stages: {prune: {sparsity: 0.5, structure: [channel, depth]}}\n",
            "stages.prune: blocks go by what they save",
        ),
        (NAMES + "stages: {prune: {}}\n", "stages.prune: exactly one of macs, params"),
        (NAMES + "stages: {prune: {macs: 0.5, params: 0.5}}\n", "exactly one of macs, params"),
        (NAMES + "stages: {prune: {macs: 1, exclude: a}}\n", "exclude: must be a list"),
        (NAMES + "stages: {prune: {latency: 2}}\n", "stages.prune.latency: a budget is the share"),
        (NAMES + "stages: {prune: {macs: 1, layers: {a: {min_keep: 0}}}}\n", "at least 1"),
        (NAMES + "stages: {prune: {macs: 1, layers: {a: 1.5}}}\n", "at least 0 and below 1"),
        (
            NAMES + "stages: {prune: {macs: 1, exclude: [a, 2]}}\n",
            "stages.prune.exclude.1: must be",
        ),
        (NAMES + "stages: {distill: {label_weight: 1.5}}\n", "label_weight: must be at most 1"),
        (NAMES + "stages: {distill: {temperature: 0}}\n", "temperature: must be above 0"),
        (NAMES + "stages: {quantize: {int8: {percentile: 0.2}}}\n", "the share of values kept"),
        (
            NAMES + "stages: {quantize: {weights: {bits: 9}}}\n",
            "quantize.weights.bits: a weight has",
        ),
        (
            NAMES + "stages: {quantize: {half: {dtype: fp8}}}\n",
            "quantize.half.dtype: unknown dtype",
        ),
        (NAMES + "stages: {quantize: {int8: {}, half: {}}}\n", "at most one of int8, weights"),
        (NAMES + "stages: {quantize: {half: {}, epochs: 1}}\n", "epochs are for int8"),
    ],
)
def test_bad_recipes_are_refused_with_their_place(write: Write, recipe: str, expected: str) -> None:
    assert expected in problems(write(recipe))


def test_a_long_list_of_problems_is_cut(write: Write) -> None:
    text = problems(write(NAMES + "".join(f"key{i}: 1\n" for i in range(500))))
    assert "500 problems" in text
    assert "and 480 more" in text


def test_files_that_are_no_recipes(write: Write, tmp_path: Path) -> None:
    assert "there is no such file" in problems(tmp_path / "missing.yaml")
    assert "not a file" in problems(tmp_path)
    assert "not UTF-8" in problems(write(b"source: \xff\xfe\n"))
    assert "larger than 64 KiB" in problems(write(NAMES + "#" * 70_000))


# --- attacks

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (LAUGHS, "anchors and aliases"),
        ("a: &a\n  b: *a\n", "anchors and aliases"),
        ("defaults: &d {seed: 1}\n<<: *d\n", "anchors and aliases"),
        ("source: !!python/object/apply:os.system ['touch owned']\n", "is not allowed"),
        ("source: !!python/name:os.system\n", "is not allowed"),
        ("source: !!str net.py\n", "is not allowed"),
        ("a: !!binary aGVsbG8=\n", "is not allowed"),
        ("!!map {a: 1}\n", "is not allowed"),
        ("%TAG ! tag:yaml.org,2002:python/\n---\n!object:os.system {}\n", "is not allowed"),
        ("a: " + "[" * 20_000, "nested more than"),
        ("[\n" * 20_000, "nested more than"),
        ("- " * 20_000, "nested more than"),
        ("seed: " + "9" * 60_000, "cannot read the value"),
        ("<<: {source: net.py}\n", "unknown key"),
        ("a: =\n", "cannot read the value"),
    ],
)
def test_attacks_on_the_parser_are_refused_quickly(
    write: Write, tmp_path: Path, recipe: str, expected: str
) -> None:
    start = time.process_time()
    text = problems(write(recipe))
    assert time.process_time() - start < 5
    assert expected in text
    assert len(text) < 5_000
    assert not (tmp_path / "owned").exists()


def test_messages_hold_no_terminal_escapes(write: Write) -> None:
    text = problems(write(NAMES + '"\\e[31mred": 1\nseed: "\\e[2J"\n'))
    assert "\x1b" not in text


@pytest.mark.parametrize(
    "name",
    ["os.system", "__import__", "lambda", "f()", "make model", "", "a;b", "__class__", "x[0]"],
)
def test_functions_are_plain_names(write: Write, name: str) -> None:
    for key in ("model", "data", "example_inputs"):
        lines = {"source": "net.py", "model": "make_model", "data": "make_data", key: f"'{name}'"}
        recipe = "".join(f"{k}: {v}\n" for k, v in lines.items())
        assert f"{key}: must be the plain name of a function" in problems(write(recipe))


@pytest.mark.parametrize(
    "source", ["net.txt/..", "os;x", "a..b", "a.b()", "", "__main__", "net.py x", "http://x/y"]
)
def test_sources_are_files_or_modules(write: Write, source: str) -> None:
    assert "source: must be a file" in problems(write(NAMES.replace("net.py", f"'{source}'")))


def test_nothing_is_imported_before_the_recipe_is_valid(write: Write, tmp_path: Path) -> None:
    module = "open(__file__ + '.ran', 'w').close()\n" + MODULE
    path = write(NAMES + "sed: 0\n", module)
    problems(path)
    assert not (tmp_path / "net.py.ran").exists()
    write(NAMES)
    recipe = load_recipe(path)
    assert not (tmp_path / "net.py.ran").exists()
    resolve(recipe)
    assert (tmp_path / "net.py.ran").exists()


# --- resolving


def test_a_recipe_becomes_a_job(write: Write) -> None:
    job = resolve(load_recipe(write(FULL, MODULE)))
    assert isinstance(job.model, nn.Linear)
    assert isinstance(job.example_inputs, torch.Tensor)
    assert job.example_inputs.shape == (1, 3)
    assert len(list(job.train)) == 1


def test_example_inputs_default_to_the_first_training_batch(write: Write) -> None:
    job = resolve(load_recipe(write(NAMES, MODULE)))
    assert isinstance(job.example_inputs, torch.Tensor)
    assert job.example_inputs.shape == (4, 3)


def test_models_follow_the_seed_and_global_state_is_left_alone(write: Write) -> None:
    recipe = load_recipe(write(NAMES, MODULE))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    path = list(sys.path)
    first, second = resolve(recipe).model, resolve(recipe).model
    assert torch.rand(1) == expected
    assert sys.path == path
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    assert torch.equal(first.weight, second.weight)


def test_a_source_may_import_its_neighbors_and_hold_dataclasses(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "neighbor_of_net.py").write_text("width = 7\n")
    module = MODULE.replace("nn.Linear(3, 2)", "nn.Linear(3, Options().width)") + (
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from neighbor_of_net import width as w\n"
        "@dataclasses.dataclass\n"
        "class Options:\n"
        "    width: int = w\n"
    )
    module = "from __future__ import annotations\n" + module.replace(
        "from __future__ import annotations\n", ""
    )
    try:
        job = resolve(load_recipe(write(NAMES, module)))
    finally:
        sys.modules.pop("neighbor_of_net", None)
    assert isinstance(job.model, nn.Linear)
    assert job.model.out_features == 7


def test_a_file_shadows_no_module(write: Write, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(MODULE)
    import json

    resolve(load_recipe(write(NAMES.replace("net.py", "json.py"))))
    assert sys.modules["json"] is json


def test_a_dotted_module_is_imported(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "place" / "nets_of_test"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "small.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "place"))
    try:
        job = resolve(load_recipe(write(NAMES.replace("net.py", "nets_of_test.small"))))
    finally:
        for name in ("nets_of_test", "nets_of_test.small"):
            sys.modules.pop(name, None)
    assert isinstance(job.model, nn.Linear)


@pytest.mark.parametrize(
    ("module", "expected", "cause"),
    [
        (None, "there is no file", None),
        ("def (", "cannot be imported: SyntaxError", SyntaxError),
        ("import no_such_module_x", "cannot be imported: ModuleNotFoundError", ModuleNotFoundError),
        ("raise SystemExit(3)", "cannot be imported: SystemExit", SystemExit),
        ("1 / 0", "cannot be imported: ZeroDivisionError", ZeroDivisionError),
        (MODULE.replace("make_model", "make_modle"), "Did you mean make_modle", None),
        (MODULE.replace("def make_model", "make_model = 3\ndef f"), "not a function", None),
        (MODULE.replace("make_data()", "make_data(n)"), "raised TypeError", TypeError),
        (MODULE.replace("nn.Linear(3, 2)", "1 / 0"), "raised ZeroDivisionError", ZeroDivisionError),
        (MODULE.replace("nn.Linear(3, 2)", "exit(1)"), "raised SystemExit", SystemExit),
        (MODULE.replace("nn.Linear(3, 2)", "None"), "returned a NoneType", None),
        (MODULE.replace("nn.Linear(3, 2)", "nn.Linear"), "returned a type", None),
    ],
)
def test_faults_of_the_module_are_named(
    write: Write, module: str | None, expected: str, cause: type[BaseException] | None
) -> None:
    recipe = load_recipe(write(NAMES, module))
    with pytest.raises(RecipeError) as caught:
        resolve(recipe)
    assert expected in str(caught.value)
    assert "net.py" in str(caught.value)
    assert type(caught.value.__cause__) is (cause or type(None))


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("None", "returned a NoneType"),
        ("[[batch], [batch]]", "returned a list of 2"),
        ("{'train': [batch], 'validation': [batch]}", "lacks 'val' and 'test'"),
        ("([batch], [], [batch])", "no example"),
        ("([batch], None, [batch])", "not an iterable"),
        ("([batch], iter([batch]), [batch])", "only once"),
        ("([batch], [batch[0]], [batch])", "'val' have no targets"),
        ("([3], [batch], [batch])", "a batch is a int"),
    ],
)
def test_data_that_cannot_be_used_are_named(write: Write, returned: str, expected: str) -> None:
    module = MODULE.replace('{"train": [batch], "val": [batch], "test": [batch]}', returned)
    recipe = load_recipe(write(NAMES, module))
    with pytest.raises(DataError) as caught:
        resolve(recipe)
    assert expected in str(caught.value)
    assert "make_data() in net.py" in str(caught.value)


def test_unlabelled_training_data_serve_a_trained_network(write: Write) -> None:
    module = MODULE.replace('"train": [batch]', '"train": [batch[0]]')
    assert resolve(load_recipe(write(NAMES, module))).train
    with pytest.raises(DataError, match="'train' have no targets"):
        resolve(load_recipe(write(NAMES + "stages: {train: true}\n")))


def test_errors_while_reading_data_are_named(write: Write) -> None:
    module = MODULE + (
        "class Broken:\n"
        "    def __iter__(self):\n"
        "        yield torch.zeros(2, 3) / 'x'\n"
        "def make_data():\n"
        "    return Broken(), Broken(), Broken()\n"
    )
    with pytest.raises(RecipeError, match=r"reading 'train' raised TypeError"):
        resolve(load_recipe(write(NAMES, module)))


def test_example_inputs_of_the_wrong_type_are_named(write: Write) -> None:
    module = MODULE.replace("torch.zeros(1, 3)\n", "'image'\n")
    with pytest.raises(RecipeError, match=r"make_inputs\(\) in net.py: returned a str"):
        resolve(load_recipe(write(FULL, module)))


def test_recipe_errors_are_input_errors() -> None:
    assert issubclass(RecipeError, InputError)
    assert Recipe.model_config["extra"] == "forbid"


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("{sparsity: 0.9}", Budget(sparsity=0.9)),
        ("{sparsity: 0.9, scope: local}", Budget(sparsity=0.9, scope="local")),
        ('{structure: "2:4"}', None),
    ],
)
def test_weights_can_be_set_to_zero(write: Write, text: str, budget: Budget | None) -> None:
    stage = load_recipe(write(f"{NAMES}stages: {{sparsify: {text}}}\n")).stages.sparsify
    assert stage is not None
    assert stage.budget() == budget
    assert stage.informed
    assert load_recipe(write(NAMES)).stages.sparsify is None
    off = load_recipe(write(f"{NAMES}stages: {{sparsify: false}}\n"))
    assert off.stages.sparsify is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{sparsity: 1.5}", "sparsity"),
        ("{}", "sparsity"),
        ("true", "sparsity"),
        ('{structure: "2:4", sparsity: 0.9}', "2:4"),
        ("{structure: channel, sparsity: 0.5}", "channel"),
        ("{sparsity: 0.5, criterion: sparsegtp}", "sparsegpt"),
        ("{sparsity: 0.5, scope: all}", "scope"),
        ("{sparsity: 0.5, samples: 0}", "samples"),
    ],
)
def test_weights_that_cannot_be_set_to_zero(write: Write, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_recipe(write(f"{NAMES}stages: {{sparsify: {text}}}\n"))
