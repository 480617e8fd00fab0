"""Every shape annotation of the library is checked while the tests run."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

install_import_hook("speech_flax", "beartype.beartype")
gc.set_threshold(100_000, 20, 100)  # a tenth of the time was the search for garbage in what is imported and traced


@pytest.fixture(scope="module")
def benchmarks():
    """The directory of the benchmarks, whose scripts can be imported in a module of tests."""
    directory = Path(__file__).resolve().parents[1] / "benchmarks"
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))
