"""Log-mel features of Wav2Vec2-BERT: Kaldi-style filter banks, normalised per utterance, two frames per vector.

One jitted function of static shape that runs on the device inside the training step, or on the host. It computes what
Transformers' ``SeamlessM4TFeatureExtractor`` computes with NumPy for each utterance alone.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from speech_flax.kernels.platforms import for_platform

SAMPLING_RATE = 16_000
FRAME_LENGTH = 400  # samples: 25 ms
FRAME_SHIFT = 160  # samples: 10 ms
_HOPS = -(-FRAME_LENGTH // FRAME_SHIFT)  # that a frame touches
_FFT_LENGTH = 512
_PREEMPHASIS = 0.97
_FLOOR = 1.192092955078125e-07
_SCALE = 2.0**15  # the filter banks are defined on 16-bit samples
_VARIANCE_FLOOR = 1e-7
#: Frames that the CPU takes at once: their spectra stay in its cache, where those of whole recordings cost page faults.
_BLOCK = 128


def num_log_mel_frames(num_samples: Int[Array, "batch"] | Int[np.ndarray, "batch"] | int):
    """Frames of 25 ms every 10 ms that fit into ``num_samples``, before stacking; 0 below 400 samples."""
    frames = 1 + (num_samples - FRAME_LENGTH) // FRAME_SHIFT
    if isinstance(frames, int):
        return max(frames, 0)
    return frames.clip(0)


def mel_filters(num_mel_bins: int) -> Float32[np.ndarray, "frequencies mel_bins"]:
    """Triangular filters in mel space from 20 Hz to 8 kHz (Kaldi's scale), for a Fourier transform of 512 points.

    The filters are triangles over the mel frequencies of the bins, not normalised; that of the Nyquist bin is zero.
    """

    def mel(hertz: np.ndarray | float) -> np.ndarray | float:
        return 1127.0 * np.log(1.0 + np.asarray(hertz, np.float64) / 700.0)

    bins = mel(np.arange(_FFT_LENGTH // 2) * SAMPLING_RATE / _FFT_LENGTH)
    edges = np.linspace(mel(20.0), mel(SAMPLING_RATE / 2), num_mel_bins + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - left) / (centre - left)
    falling = (right - bins[:, None]) / (right - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    return np.pad(filters, ((0, 1), (0, 0))).astype(np.float32)


@functools.cache
def _fourier_matrix() -> Float32[np.ndarray, "samples doubled_frequencies"]:
    """Samples of a frame to the real and imaginary parts of its spectrum."""
    spectrum = np.fft.rfft(np.eye(FRAME_LENGTH), n=_FFT_LENGTH, axis=1)
    return np.concatenate([spectrum.real, spectrum.imag], axis=1).astype(np.float32)


def _mel_energies(waveforms: Array, num_frames: int, num_mel_bins: int) -> Array:
    """Energy in every mel filter ``[batch, frames, mel_bins]``: spectra by FFT on the CPU, by a matrix product where
    there are matrix units."""
    filters = mel_filters(num_mel_bins)
    multiply = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def by_product(waveforms: Array) -> Array:
        spectrum = multiply("bts,sf->btf", _frames(waveforms, num_frames, FRAME_LENGTH), _fourier_matrix())
        real, imaginary = jnp.split(spectrum, 2, axis=-1)
        return multiply("btf,fm->btm", jnp.square(real) + jnp.square(imaginary), filters)

    def by_fft(waveforms: Array) -> Array:
        blocks = -(-num_frames // _BLOCK)
        waveforms = _padded(waveforms, blocks * _BLOCK)

        def of_block(start: Array) -> Array:
            seen = jax.lax.dynamic_slice_in_dim(waveforms, start, (_BLOCK + _HOPS - 1) * FRAME_SHIFT, axis=1)
            spectrum = jnp.fft.rfft(_frames(seen, _BLOCK, _FFT_LENGTH))
            power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
            bands = [power[..., rows] @ filters[rows, columns] for rows, columns in _bands(filters)]
            return jnp.concatenate(bands, axis=-1)

        energies = jnp.moveaxis(jax.lax.map(of_block, jnp.arange(blocks) * _BLOCK * FRAME_SHIFT), 0, 1)
        return energies.reshape(waveforms.shape[0], -1, num_mel_bins)[:, :num_frames]

    return for_platform(waveforms, cpu=by_fft, default=by_product)


def _bands(filters: Float32[np.ndarray, "frequencies mel_bins"]) -> list[tuple[slice, slice]]:
    """Three blocks (rows, columns) that hold all of the filters but zeros, in half the size of the matrix."""
    edges = np.round(np.array([0.0, 0.4, 0.8, 1.0]) * filters.shape[1]).astype(int).tolist()
    blocks = []
    for columns in (slice(*pair) for pair in itertools.pairwise(edges)):
        used = np.flatnonzero(filters[:, columns].any(axis=1))
        blocks.append((slice(int(used[0]), int(used[-1]) + 1), columns))
    return blocks


def _padded(waveforms: Array, num_frames: int) -> Array:
    """Exactly the samples of all hops that ``num_frames`` frames touch."""
    needed = (num_frames + _HOPS - 1) * FRAME_SHIFT
    return jnp.pad(waveforms, ((0, 0), (0, max(0, needed - waveforms.shape[1]))))[:, :needed]


def _frames(waveforms: Array, num_frames: int, length: int) -> Array:
    """Frames ``[batch, frames, length]``, without their mean, pre-emphasised, windowed (a Hann window to the power
    0.85), and filled with zeros from 400 samples on.

    ``x[t] - 0.97 x[t-1]`` is computed as the difference of neighbours, which loses no digits, plus 3 % of the one
    before: in float32 the plain formula costs ten times the tolerance below strong low tones. That is done once for the
    whole waveform: of a frame's mean 3 % remain, to be taken off each frame. (The first sample of a frame has no
    predecessor in it, but the window is zero there.) Frames are cut by reshaping to hops of 160 samples, and means
    summed from half hops: no gather.
    """
    batch, padded = waveforms.shape[0], _padded(waveforms, num_frames)
    previous = jnp.pad(padded, ((0, 0), (1, 0)))[:, :-1]
    emphasised = ((padded - previous) + (1.0 - _PREEMPHASIS) * previous).reshape(batch, -1, FRAME_SHIFT)
    halves = padded.reshape(batch, -1, 2, FRAME_SHIFT // 2).sum(-1)
    window = (np.hanning(FRAME_LENGTH) ** 0.85).astype(np.float32)
    total, pieces = 0.0, []
    for hop in range(_HOPS):
        here = slice(hop, hop + num_frames)
        size = min(FRAME_SHIFT, FRAME_LENGTH - hop * FRAME_SHIFT)
        total = total + halves[:, here, : size // (FRAME_SHIFT // 2)].sum(-1, keepdims=True)
        pieces.append((emphasised[:, here, :size], window[hop * FRAME_SHIFT :][:size]))
    rest = (1.0 - _PREEMPHASIS) / FRAME_LENGTH * total
    windowed = [(piece - rest) * weights for piece, weights in pieces]
    return jnp.concatenate([*windowed, jnp.zeros((batch, num_frames, length - FRAME_LENGTH))], axis=-1)


@functools.partial(jax.jit, static_argnames=("num_mel_bins", "stride", "padding_value"))
def log_mel(
    waveforms: Float[Array, "batch samples"],
    sample_lengths: Int[Array, "batch"],
    *,
    num_mel_bins: int = 80,
    stride: int = 2,
    padding_value: float = 0.0,
) -> tuple[Float[Array, "batch frames features"], Bool[Array, "batch frames"]]:
    """Normalised log-mel vectors of a batch of waveforms, and which of them are speech.

    Args:
        waveforms: 16 kHz samples in [-1, 1], padded on the right with anything.
        sample_lengths: Samples of each waveform.
        num_mel_bins: Filters.
        stride: Frames of 10 ms stacked into one vector.
        padding_value: What fills vectors past the end.

    Returns:
        Vectors of ``stride * num_mel_bins`` features, as many as the padded length holds; and a mask that is ``True``
        where all ``stride`` frames of a vector lie inside the utterance. A last vector that an utterance fills in part
        is padded and masked, as in the reference, even if the utterance stands alone.
    """
    total = num_log_mel_frames(waveforms.shape[1])
    num_vectors = max(1, -(-total // stride))
    frame_counts = num_log_mel_frames(sample_lengths)
    mel = _mel_energies(waveforms.astype(jnp.float32) * _SCALE, num_vectors * stride, num_mel_bins)
    features = jnp.log(jnp.maximum(mel, _FLOOR))

    inside = (jnp.arange(features.shape[1]) < frame_counts[:, None])[:, :, None]
    normed = _normalise(features, inside, frame_counts)
    padded = jnp.where(inside, normed, padding_value)
    vectors = padded.reshape(padded.shape[0], num_vectors, stride * num_mel_bins)
    mask = jnp.arange(num_vectors) < (frame_counts // stride)[:, None]
    return vectors, mask


def _normalise(features: Array, inside: Array, counts: Array) -> Array:
    """Zero mean and unit (unbiased) variance per mel bin over the frames of each utterance.

    Frames that are all alike, or a single one, become zero; the reference has rounding errors there, or no number. The
    first frame is taken off before the mean, so that float32 keeps its digits for the differences.
    """
    number = counts.astype(jnp.float32)[:, None, None]
    differences = jnp.where(inside, features - features[:, :1], 0)
    centred = jnp.where(inside, differences - differences.sum(1, keepdims=True) / jnp.maximum(number, 1), 0)
    variance = jnp.square(centred).sum(1, keepdims=True) / jnp.maximum(number - 1, 1)
    return centred / jnp.sqrt(variance + _VARIANCE_FLOOR)
