"""SpecAugment (Park et al. 2019), drawn and applied inside the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from speech_flax.configuration import SpeechConfig


def spec_augment(
    hidden_states: Float[Array, "batch frames hidden"],
    mask_embedding: Float[Array, "hidden"] | None,
    lengths: Int[Array, "batch"],
    mask_time_indices: Shaped[Array | np.ndarray, "batch frames"] | None,
    config: SpeechConfig,
    key: PRNGKeyArray | None,
) -> Float[Array, "batch frames hidden"]:
    """Replace spans of frames by the mask embedding, and zero spans of features in all frames.

    Args:
      mask_embedding: May be missing when no frames are masked.
      lengths: Frames of each row among which spans are drawn.
      mask_time_indices: Frames to replace instead of drawn ones, in evaluation too.
      key: Where spans are drawn from; ``None`` in evaluation.

    Raises:
      ValueError: frames are to be masked and there is no mask embedding.
    """
    batch, frames, size = hidden_states.shape
    frame_key, feature_key = (None, None) if key is None else jax.random.split(key)
    masked = None
    if mask_time_indices is not None:
        masked = jnp.asarray(mask_time_indices).astype(bool)
    elif config.mask_time_prob > 0 and frame_key is not None:
        masked = sample_mask_spans(
            frame_key,
            lengths,
            frames,
            mask_prob=config.mask_time_prob,
            mask_length=config.mask_time_length,
            min_masks=config.mask_time_min_masks,
        )
    if masked is not None:
        if mask_embedding is None:
            raise ValueError("mask_time_indices needs a mask embedding: set config.mask_time_prob above 0")
        # In float32, and so is the sum over all masked frames that is the embedding's gradient.
        replaced = jnp.where(masked[:, :, None], mask_embedding, hidden_states.astype(jnp.float32))
        hidden_states = replaced.astype(hidden_states.dtype)
    if config.mask_feature_prob > 0 and feature_key is not None:
        silenced = sample_mask_spans(
            feature_key,
            jnp.full((batch,), size, jnp.int32),
            size,
            mask_prob=config.mask_feature_prob,
            mask_length=config.mask_feature_length,
            min_masks=config.mask_feature_min_masks,
        )
        hidden_states = jnp.where(silenced[:, None], 0, hidden_states)
    return hidden_states


def num_spans(
    lengths: Int[Array, "batch"],
    num_frames: int,
    epsilon: Array | float,
    *,
    mask_prob: float,
    mask_length: int,
    min_masks: int,
) -> Int[Array, "batch"]:
    """Spans per row, as Transformers' ``_compute_mask_indices`` counts them.

    ``mask_prob * length / mask_length`` rounded up or down by the shared draw ``epsilon`` in [0, 1), at least
    ``min_masks``, at most what the padded length holds without overlap, and at most the number of possible starts.
    """
    spans = jnp.floor(mask_prob * lengths / mask_length + epsilon).astype(jnp.int32)
    spans = jnp.maximum(spans, min_masks)
    spans = jnp.where(spans * mask_length > num_frames, num_frames // mask_length, spans)
    return jnp.minimum(spans, jnp.maximum(lengths - (mask_length - 1), 0))


def sample_mask_spans(
    key: PRNGKeyArray,
    lengths: Int[Array, "batch"],
    num_frames: int,
    *,
    mask_prob: float,
    mask_length: int,
    min_masks: int = 0,
) -> Bool[Array, "batch frames"]:
    """``True`` where a row of ``num_frames`` frames, ``lengths`` of them valid, is masked.

    Each row gets spans of ``mask_length`` frames whose starts are drawn without replacement; spans may overlap. Counts
    are those of Transformers' ``_compute_mask_indices``, short rows included: a row too short for a span masks the last
    padded frame alone when others get spans. Where that function raises because ``mask_length`` exceeds the padded
    length, nothing is masked here.

    Raises:
      ValueError: ``mask_length`` is less than 1.
    """
    if mask_length < 1:
        raise ValueError(f"the mask length of SpecAugment must be at least 1, not {mask_length}")
    if mask_length > num_frames:
        return jnp.zeros((lengths.shape[0], num_frames), bool)
    epsilon_key, start_key = jax.random.split(key)
    epsilon = jax.random.uniform(epsilon_key)
    rule = {"mask_prob": mask_prob, "mask_length": mask_length, "min_masks": min_masks}
    spans = num_spans(lengths, num_frames, epsilon, **rule)
    most = num_spans(jnp.full((1,), num_frames, jnp.int32), num_frames, epsilon, **rule)

    # The starts are the frames with the smallest draws. Two equal draws at the border, once in millions of rows, would
    # cost that row a span.
    draws = jax.random.bits(start_key, (lengths.shape[0], num_frames), jnp.uint32) >> 1
    possible = jnp.arange(num_frames) < (lengths - (mask_length - 1))[:, None]
    never = jnp.uint32(2**32 - 1)
    draws = jnp.where(possible, draws, never)
    ordered = jnp.pad(jnp.sort(draws, axis=-1), ((0, 0), (0, 1)), constant_values=never)
    smallest_left_out = jnp.take_along_axis(ordered, spans[:, None], axis=-1)
    starts = possible & (draws < smallest_left_out)

    started = jnp.cumsum(starts, axis=-1)
    ended = jnp.pad(started, ((0, 0), (mask_length, 0)))[:, :num_frames]
    masked = started > ended
    stand_in = (spans == 0)[:, None] & (jnp.arange(num_frames) == num_frames - 1)
    return (masked | stand_in) & (most > 0)
