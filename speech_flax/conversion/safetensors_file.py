"""Safetensors files, read and written one tensor at a time.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header with
type, shape and byte range of every tensor, then the bytes of the tensors without gaps. The safetensors library maps
whole files into memory and writes from whole dictionaries; a model that is converted must not be in memory twice.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor, copy_tensor

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 * 2**20  # bytes; the limit of the safetensors library
_METADATA = "__metadata__"


def read_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors in the file at ``path`` by name, in the order of their bytes.

    Raises:
      CheckpointFileError: the file is truncated or damaged, or is no safetensors file.
    """
    path = Path(path)
    header, start = _read_header(path)
    size = path.stat().st_size - start
    tensors, ranges = {}, []
    for name, entry in header.items():
        if name != _METADATA:
            shape, dtype, (first, last) = _entry(path, name, entry)
            ranges.append((first, last, name))
            tensors[name] = StoredTensor(shape, dtype, partial(_read_tensor, path, start + first, shape, dtype, name))
    ranges.sort(key=lambda one: one[:2])
    position = 0
    for first, last, name in ranges:
        if first != position:
            raise CheckpointFileError(f"{path}: the bytes of {name!r} do not follow those of the tensor before it")
        position = last
    if position != size:
        kind = "truncated" if position > size else "damaged"
        raise CheckpointFileError(f"{path} is {kind}: its tensors need {position} bytes and it has {size} for them")
    return {name: tensors[name] for _, _, name in ranges}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text that the writer of a file put into its header.

    Raises:
      CheckpointFileError: see :func:`read_safetensors`.
    """
    metadata = _read_header(Path(path))[0].get(_METADATA, {})
    return metadata if isinstance(metadata, dict) else {}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the position of the first tensor."""
    with path.open("rb") as file:
        beginning = file.read(8)
        length = int.from_bytes(beginning, "little")
        available = path.stat().st_size - 8
        if len(beginning) < 8 or length > min(available, _LONGEST_HEADER):
            raise CheckpointFileError(
                f"{path} is truncated or no safetensors file: it announces a header of {length} bytes"
                if len(beginning) == 8
                else f"{path} is no safetensors file: it has {len(beginning)} bytes"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise CheckpointFileError(f"{path} is damaged or no safetensors file: its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise CheckpointFileError(f"{path} is damaged: its header is no JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, tuple[int, int]]:
    """Shape, type and byte range of one tensor, checked against each other."""
    fields = entry if isinstance(entry, dict) else {}
    code, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(shape, list) and all(_is_count(size) for size in shape)):
        raise CheckpointFileError(f"{path} is damaged: the shape of {name!r} is {shape!r}")
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointFileError(f"{path}: {name!r} has the type {code!r}; known are {', '.join(DTYPES)}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(offset) for offset in offsets)):
        raise CheckpointFileError(f"{path} is damaged: the byte range of {name!r} is {offsets!r}")
    first, last = offsets
    if last - first != math.prod(shape) * DTYPES[code].itemsize:
        raise CheckpointFileError(
            f"{path} is damaged: {name!r} has {last - first} bytes, which is not what {shape} of {code} needs"
        )
    return tuple(shape), DTYPES[code], (first, last)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_tensor(path: Path, position: int, shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    tensor = np.empty(shape, dtype)
    with path.open("rb") as file:
        file.seek(position)
        read = file.readinto(tensor.reshape(-1).view(np.uint8))
    if read != tensor.nbytes:
        raise CheckpointFileError(f"{path} became shorter while {name!r} was read")
    return tensor


def write_safetensors(
    path: str | Path,
    layout: Mapping[str, tuple[Sequence[int], np.dtype]],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file, taking one tensor after the other; while one is written, the next is read and laid out.

    Args:
      path: The file; an existing one is overwritten.
      layout: Shape and type of every tensor by name.
      tensors: The tensors in the order of ``layout``, each in that type or cast to it.
      metadata: Text for the header. The PyTorch side of Transformers wants ``{"format": "pt"}``.

    Raises:
      ValueError: a tensor has another shape than the layout says, or there are fewer.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight bytes
    with Path(path).open("wb") as file, ThreadPoolExecutor(1) as writer:
        written = writer.submit(file.write, len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), tensor in zip(layout.items(), tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name!r} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
            if tensor.dtype != dtype or not tensor.flags.c_contiguous:
                laid_out = np.empty(shape, dtype)
                copy_tensor(tensor, laid_out)
                tensor = laid_out
            written.result()
            written = writer.submit(file.write, tensor.reshape(-1).view(np.uint8).data)
        written.result()
        file.flush()
        os.fsync(file.fileno())
