"""Latencies are kept between runs, and a file that is damaged or foreign does no harm."""

import json
import tempfile
from pathlib import Path

import pytest

from rarefy.deployment.cache import Cache, cache_folder
from rarefy.graph.layer import Layer

LAYERS = [Layer("matmul", 8, n, times=2) for n in (4, 8, 16)]


class Meter:
    """Measures 1, 2, 3, ... and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Layer] = []

    def __call__(self, layers: list[Layer]) -> list[float]:
        self.asked += layers
        return [float(layer.outer) for layer in layers]


def cache(folder: Path, runtime: str = "onnxruntime 1", threads: int = 1) -> Cache:
    return Cache.of(runtime, threads, folder)


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    first, second = Meter(), Meter()
    assert cache(tmp_path).get(LAYERS[:2], first) == {LAYERS[0]: 4.0, LAYERS[1]: 8.0}
    assert cache(tmp_path).get(LAYERS + LAYERS, second) == dict(
        zip(LAYERS, (4, 8, 16), strict=True)
    )
    assert (first.asked, second.asked) == (LAYERS[:2], LAYERS[2:])


@pytest.mark.parametrize("other", [("onnxruntime 2", 1), ("onnxruntime 1", 2)])
def test_another_version_or_number_of_threads_is_measured_anew(tmp_path: Path, other) -> None:
    cache(tmp_path).get(LAYERS, Meter())
    meter = Meter()
    cache(tmp_path, *other).get(LAYERS, meter)
    assert meter.asked == LAYERS


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, '{"environment": [], "ms": {}}', '{"environment": 1}'],
)
def test_a_damaged_file_is_replaced(tmp_path: Path, text: str) -> None:
    own = cache(tmp_path)
    own.path.write_text(text)
    assert own.get(LAYERS[:1], Meter()) == {LAYERS[0]: 4.0}
    meter = Meter()
    own.get(LAYERS[:1], meter)
    assert not meter.asked


@pytest.mark.parametrize("ms", ["fast", None, 0, -1, float("nan")])
def test_figures_that_are_none_are_measured_again(tmp_path: Path, ms: object) -> None:
    own = cache(tmp_path)
    own.get(LAYERS[:1], Meter())
    held = json.loads(own.path.read_text())
    own.path.write_text(json.dumps({**held, "ms": dict.fromkeys(held["ms"], ms)}))
    assert own.get(LAYERS[:1], Meter()) == {LAYERS[0]: 4.0}


def test_what_another_process_added_meanwhile_is_kept(tmp_path: Path) -> None:
    def slow(layers: list[Layer]) -> list[float]:
        cache(tmp_path).get(LAYERS[2:], Meter())
        return Meter()(layers)

    cache(tmp_path).get(LAYERS[:1], slow)
    meter = Meter()
    cache(tmp_path).get([LAYERS[0], LAYERS[2]], meter)
    assert not meter.asked


def test_a_place_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cache(tmp_path / "file").get(LAYERS[:1], Meter()) == {LAYERS[0]: 4.0}


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAREFY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rarefy"
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_users_without_a_home_have_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("RAREFY_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() == Path(tempfile.gettempdir()) / "rarefy"
