"""Which frames count, before and after sub-sampling."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig

Lengths = TypeVar("Lengths", int, np.ndarray, Array)


def adapter_output_lengths(lengths: Int[Array, "batch"], config: Wav2Vec2BertConfig) -> Int[Array, "batch"]:
    """Valid output frames for ``lengths`` valid input frames: the adapter's layers each divide them by their stride.

    As in Transformers, the formula pads by half the kernel (the convolution itself by half the stride, unless
    ``config.compatibility`` is "corrected").
    """
    if config.add_adapter:
        for _ in range(config.num_adapter_layers):
            lengths = sub_sampled_lengths(lengths, config)
    return lengths


def sub_sampled_lengths(lengths: Int[Array, "batch"], config: Wav2Vec2BertConfig) -> Int[Array, "batch"]:
    """Valid frames after one adapter layer."""
    kernel = config.adapter_kernel_size
    return (lengths + 2 * (kernel // 2) - kernel) // config.adapter_stride + 1


def length_mask(lengths: Int[Array, "batch"], num_frames: int) -> Bool[Array, "batch frames"]:
    """``True`` for the first ``lengths`` frames of each row."""
    return jnp.arange(num_frames) < lengths[:, None]


def as_bool_mask(
    attention_mask: Shaped[Array | np.ndarray, "batch frames"] | None, batch: int, num_frames: int
) -> Bool[Array, "batch frames"]:
    """A given mask of numbers or booleans as booleans; all frames when none is given."""
    if attention_mask is None:
        return jnp.ones((batch, num_frames), bool)
    return jax.numpy.asarray(attention_mask).astype(bool)


def convolution_output_lengths(lengths: Lengths, config: HubertConfig, layers: int | None = None) -> Lengths:
    """Frames that the first ``layers`` convolutions (default: all) make of ``lengths`` samples.

    0 or less for fewer samples than the convolutions are wide.
    """
    for kernel, stride in list(zip(config.conv_kernel, config.conv_stride, strict=True))[:layers]:
        lengths = (lengths - kernel) // stride + 1
    return lengths


def feature_frame_mask(sample_mask: Bool[Array, "batch samples"], config: HubertConfig) -> Bool[Array, "batch frames"]:
    """Which frames of the feature encoder count, for samples of which those on the left count.

    Those whose samples all count. ``config.compatibility`` decides the details:

    * Transformers takes all frames of an utterance that is too short for a single one (or all but the last few, if it
      is even shorter than the first convolution); the corrected behaviour takes none.
    * fairseq divides the samples into as many equal chunks as there are frames, and takes a frame if any sample of its
      chunk counts: up to one frame more.
    """
    num_samples = sample_mask.shape[1]
    num_frames = convolution_output_lengths(num_samples, config)
    samples = sample_mask.sum(-1).astype(jnp.int32)
    if config.compatibility == "fairseq":
        return jnp.arange(num_frames) * (num_samples // num_frames) < samples[:, None]
    lengths = convolution_output_lengths(samples, config)
    if config.compatibility != "corrected":
        lengths = jnp.where(lengths < 1, lengths + num_frames, lengths)  # the reference counts from the end
    return length_mask(lengths, num_frames)


def labelled_frames(sample_mask: Bool[Array, "batch samples"], config: HubertConfig) -> Int[Array, "batch"]:
    """Frames of each row that labels are aligned with, for samples of which those on the left count.

    They are those that :func:`feature_frame_mask` takes; but in Transformers an utterance that is too short for a frame
    has none here.
    """
    if config.compatibility in ("transformers-4.37", "transformers-5"):
        lengths = convolution_output_lengths(sample_mask.sum(-1).astype(jnp.int32), config)
        return jnp.maximum(lengths, 0)
    return feature_frame_mask(sample_mask, config).sum(-1).astype(jnp.int32)
