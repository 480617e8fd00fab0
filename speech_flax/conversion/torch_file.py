"""Files that PyTorch wrote (``.bin``, ``.pt``, ``.pth``, ``.ckpt``), read without running what they contain.

A pickle is a program. ``torch.load(weights_only=True)`` interprets the few instructions that tensors need and refuses
every other.
"""

from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor


def read_torch_file(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors in the file at ``path``, which holds a dictionary of them.

    Raises:
      CheckpointFileError: the file is damaged, holds something else, or something that would have to be run.
      ImportError: torch is not installed.
    """
    content = load_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointFileError(f"{path} holds no dictionary of tensors")
    return stored_tensors(content)


def load_torch_file(path: str | Path) -> Any:
    """What the file holds: tensors, mapped from the file where its format allows, in containers."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"reading {path} needs PyTorch: pip install torch, or convert it to safetensors") from None
    try:
        mapped = _is_zip(Path(path))
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointFileError(f"{path} cannot be read as a file of PyTorch: {reason}") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def stored_tensors(content: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors among the values of ``content``."""
    import torch

    return {
        name: StoredTensor(tuple(value.shape), _numpy_dtype(value.dtype), partial(_as_numpy, value))
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }


def _numpy_dtype(dtype: Any) -> np.dtype:
    import torch

    if dtype == torch.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    return torch.empty((), dtype=dtype).numpy().dtype


def _as_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
