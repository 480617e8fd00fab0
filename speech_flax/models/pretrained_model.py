"""Loading and saving, as methods of every model class."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import PyTree


class PretrainedModel:
    """Mixin of the model classes: ``from_pretrained`` and ``save_pretrained``."""

    @classmethod
    def from_pretrained(
        cls, directory_or_hub_id: str | Path, *, dtype: Any = jnp.float32, **config_changes: Any
    ) -> tuple[nn.Module, PyTree]:
        """The module and its parameters, from a directory in Transformers' layout or from the hub.

        Args:
          directory_or_hub_id: Local directory, or ``owner/name`` of a model on the hub.
          dtype: Computation type of the module; parameters are float32 whatever the file holds.
          config_changes: Fields of the configuration to replace; names of module attributes (``remat``,
            ``scan_unroll``) set these.

        Raises:
          FileNotFoundError: nothing is there, or the hub cannot be reached.
          ValueError: the files are damaged or of another model.
        """
        from speech_flax.pretrained import load_pretrained

        return load_pretrained(cls, directory_or_hub_id, dtype=dtype, **config_changes)

    @staticmethod
    def save_pretrained(directory: str | Path, module: Any, params: PyTree) -> None:
        """Write ``config.json`` and ``model.safetensors`` as Transformers reads them."""
        from speech_flax.pretrained import save_pretrained

        save_pretrained(directory, module, params)
