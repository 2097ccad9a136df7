"""Files that are attacked."""

from pathlib import Path
from typing import Any

import pytest

from forging import MODELS
from rarefy.storage.format import save


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, bytes, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    path = save(MODELS[request.param](), folder / "a.safetensors")
    return request.param, path.read_bytes(), folder / "attacked.safetensors"
