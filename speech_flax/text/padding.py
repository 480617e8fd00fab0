"""Rows of ids cut and padded to one length, by the options of Transformers."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def cut_length(
    truncation: bool | str | None, padding: bool | str, max_length: int | None, pad_to_multiple_of: int | None
) -> int | None:
    """The most ids that a row keeps; ``None`` where nothing is cut off.

    As in Transformers, ``max_length`` alone cuts too.

    Raises:
        ValueError: for an unknown ``truncation``, or a ``max_length`` that the padding would round up.
    """
    if truncation is None:
        truncation = max_length is not None and padding is False
    if truncation not in (True, False, "longest_first", "only_first", "do_not_truncate"):
        raise ValueError(f"truncation must be True, False, 'longest_first' or 'do_not_truncate', not {truncation!r}")
    if truncation in (False, "do_not_truncate") or not max_length:
        return None
    if padding not in (False, "do_not_pad") and pad_to_multiple_of and max_length % pad_to_multiple_of:
        raise ValueError(
            f"cut to max_length {max_length} and padded, rows are no multiple of pad_to_multiple_of "
            f"{pad_to_multiple_of}; make it divide max_length"
        )
    return max_length


def _padded_length(
    longest: int, padding: bool | str, max_length: int | None, pad_to_multiple_of: int | None
) -> int | None:
    """The length that rows of at most ``longest`` ids are padded to; ``None`` where they are not.

    As in Transformers, ``"max_length"`` without a number pads nothing.

    Raises:
        ValueError: for an unknown ``padding``.
    """
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', not {padding!r}")
    if padding in (False, "do_not_pad"):
        return None
    length = max_length if padding == "max_length" else longest
    if length is None or not pad_to_multiple_of:
        return length
    return -(-length // pad_to_multiple_of) * pad_to_multiple_of


def padded(
    encoded: dict[str, Any] | Sequence[dict[str, Any]],
    filler: int | None,
    *,
    padding: bool | str,
    max_length: int | None,
    pad_to_multiple_of: int | None,
    return_attention_mask: bool,
    return_tensors: str | None,
) -> dict[str, Any]:
    """Rows of ids padded with ``filler``, and their masks; see :meth:`Wav2Vec2CTCTokenizer.pad`."""
    if not isinstance(encoded, dict):
        encoded = {name: [item[name] for item in encoded] for name in (encoded[0] if encoded else ("input_ids",))}
    ids, masks = encoded["input_ids"], encoded.get("attention_mask")
    alone = len(ids) > 0 and np.ndim(ids[0]) == 0
    rows = [np.asarray(row, np.int64).tolist() for row in ([ids] if alone else ids)]
    if masks is None:
        masks = [[1] * len(row) for row in rows]
    else:
        masks = [np.asarray(mask, np.int64).tolist() for mask in ([masks] if alone else masks)]
    length = _padded_length(max(map(len, rows), default=0), padding, max_length, pad_to_multiple_of)
    if length is not None:
        if filler is None:
            raise ValueError("a tokenizer without pad_token cannot pad")
        rows = [row + [filler] * (length - len(row)) for row in rows]
        masks = [mask + [0] * (length - len(mask)) for mask in masks]
    features = {"input_ids": rows} | ({"attention_mask": masks} if return_attention_mask else {})
    if return_tensors is not None:
        features = _as_arrays(features, return_tensors)
    return {name: values[0] for name, values in features.items()} if alone else features


def _as_arrays(features: dict[str, list[list[int]]], kind: str) -> dict[str, Any]:
    if kind not in ("np", "jax"):
        raise ValueError(f"return_tensors must be 'np' or 'jax', not {kind!r}")
    lengths = [len(row) for row in features["input_ids"]]
    if len(set(lengths)) > 1:
        raise ValueError(f"rows of {min(lengths)} to {max(lengths)} ids make no array; pad or cut them")
    arrays = {name: np.asarray(values, np.int64) for name, values in features.items()}
    if kind == "jax":
        import jax.numpy as jnp

        arrays = {name: jnp.asarray(values) for name, values in arrays.items()}
    return arrays
