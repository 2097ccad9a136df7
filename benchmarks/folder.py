"""The folder of data and pretrained networks beside the checkout that some benchmarks need.

It is not part of rarefy. Where it is absent, benchmarks say so and stop.
"""

import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def loaders() -> ModuleType:
    """The folder's own loading module; exits with a message where there is none."""
    if not (FOLDER / "load.py").is_file():
        sys.exit(f"skipped: the benchmark data are not in {FOLDER}")
    sys.path.insert(0, str(FOLDER))
    import load  # type: ignore[import-not-found]

    module: ModuleType = load
    return module
