"""Every shape annotation of the library is checked while the tests run."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("speech_flax", "beartype.beartype")
gc.set_threshold(100_000, 20, 100)  # a tenth of the time was the search for garbage in what is imported and traced
