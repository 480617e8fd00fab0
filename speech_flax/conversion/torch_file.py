"""Files that PyTorch wrote (``.bin``, ``.pt``, ``.pth``, ``.ckpt``), read without running what they contain.

A pickle is a program. ``torch.load(weights_only=True)`` interprets the few instructions that tensors need and refuses
every other. fairseq and s3prl keep settings and dictionaries beside the tensors, as objects of classes that need not be
installed here: those come back as :class:`Inert` objects, which hold what was stored and do nothing.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor

#: Names that may be called for in a file; none of them is looked up, an :class:`Inert` takes its place.
_INERT = (
    "argparse.Namespace",
    "fairseq.data.dictionary.Dictionary",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
)
#: The same for settings of fairseq (enumerations, dataclasses), whose names are too many to list.
_INERT_FAMILIES = re.compile(r"(fairseq\.dataclass|fairseq\.tasks|fairseq\.models|omegaconf)\.[\w.]+")


class Inert:
    """In the place of an object whose class is not needed: its arguments and its state, and nothing that runs."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _no_entries(*_arguments: Any) -> dict[Any, Any]:
    """In the place of ``collections.defaultdict``: a dictionary, which the file goes on to fill."""
    return {}


def read_torch_file(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors in the file at ``path``, which holds a dictionary of them.

    Raises:
      CheckpointFileError: the file is damaged, holds something else, or something that would have to be run.
      ImportError: torch is not installed.
    """
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointFileError(f"{path} holds no dictionary of tensors but {type(content).__name__}")
    return stored_tensors(content)


def load_torch_file(path: str | Path) -> Any:
    """What the file holds: containers of tensors (mapped from the file where its format allows) and plain values."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"reading {path} needs PyTorch: pip install torch, or convert it to safetensors") from None
    try:
        mapped = _is_zip(Path(path))
        names = [*_INERT]
        if mapped:
            needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            names += [name for name in needed if _INERT_FAMILIES.fullmatch(name)]
        allowed: list[Any] = [(Inert, name) for name in names]
        allowed += [(_no_entries, "collections.defaultdict"), (list, "builtins.list"), (dict, "builtins.dict")]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the damage makes the interpreter of pickles stumble over
        raise CheckpointFileError(f"{path} {_reason(error)}") from None


def _reason(error: Exception) -> str:
    text = str(error)
    refused = re.search(r"GLOBAL ([\w.]+)|blocklisted module ([\w.]+)|[Uu]nsupported (?:global|class) ([\w.]+)", text)
    if refused:
        name = next(group for group in refused.groups() if group)
        return f"is refused: it wants to run {name}, which weights do not need"
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"is damaged or no file of PyTorch: {first}"


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def stored_tensors(content: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors among the values of ``content``."""
    import torch

    return {
        str(name): StoredTensor(tuple(value.shape), _numpy_dtype(value.dtype), partial(_as_numpy, value))
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }


def plain(value: Any) -> Any:
    """Settings as dictionaries, lists and values, whatever they were stored as."""
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state:
            return plain(state["_content"])
        return plain(state["_val"]) if "_val" in state else {key: plain(one) for key, one in state.items()}
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items() if isinstance(plain(key), str | int)}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


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
