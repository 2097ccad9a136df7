"""What all tests share: one thread, the same random numbers, and Ctrl-C that counts."""

import os
import signal

import pytest
import torch
from hypothesis import settings

# Small networks: more threads wait for each other longer than they compute, here and in the
# processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts a program in the background lets it ignore Ctrl-C, and so its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.manual_seed(0)  # for what test files draw while they are imported

# Properties are tried on the same examples every time; HYPOTHESIS_PROFILE=default looks for more.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers for every test, whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no process waits long for another's last file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
