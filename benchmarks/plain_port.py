"""The training step of w2v-bert-2.0 on a TPU slice beside a plain port of it, by the same static estimate.

    python benchmarks/plain_port.py [--slice v5e:4x4] [--rows 12] [--port-rows 16] [--layers 24]

Both are compiled by the TPU compiler to machine code, which takes ten minutes each and up to 20 GB, and estimated from
it as ``train.py --preflight ... --detailed=true`` does. Both are scanned over the layers, compute in bfloat16 with
float32 parameters, and see clips of 20.4 s.

The plain port is what comes of writing the reference implementation's formulas in JAX: scores, their softmax and a
tensor of embeddings for every pair of frames in main memory, normalisation differentiated by JAX, parameters whole on
every chip, and all of a layer computed again in the backward pass, without which it does not fit. The depthwise
convolution is XLA's, with its gradient by shifts, because XLA's own does not compile; the CTC loss is this library's.
"""

import argparse

import jax
import jax.numpy as jnp

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.data.sources import DataSource
from speech_flax.training.estimate import estimate
from speech_flax.training.experiment import DataSettings, Experiment, MeshSettings, ModelSettings
from speech_flax.training.flops import forward_flops
from speech_flax.training.hlo import parse_program
from speech_flax.training.preflight_plan import BucketShape
from speech_flax.training.step_compiler import compile_here, compile_step
from speech_flax.training.tpu_slices import parse_slice

SECONDS = 20.4


def plain_attention(query, key, value, mask, positions=None, seeds=None, *, dropout_rate=0.0):
    """Attention with relative keys by the reference's formulas (no dropout, as the published model has it)."""
    frames, head_size = query.shape[1], query.shape[-1]
    scores = jnp.einsum("blhd,brhd->bhlr", query, key, preferred_element_type=jnp.float32)
    distance = jnp.arange(frames)[None] - jnp.arange(frames)[:, None] + positions.left
    embeddings = positions.embeddings[jnp.clip(distance, 0, positions.embeddings.shape[0] - 1)]
    scores += jnp.einsum("blhd,lrd->bhlr", query, embeddings, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * head_size**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhlr,brhd->blhd", probabilities, value)


def plain_layer_norm(inputs, scale, bias, epsilon, dtype):
    values = inputs.astype(jnp.float32)
    mean = values.mean(-1, keepdims=True)
    variance = jnp.square(values - mean).mean(-1, keepdims=True)
    return ((values - mean) / jnp.sqrt(variance + epsilon) * scale + bias).astype(dtype)


def compile_port(*arguments) -> None:
    """Compile the same step with the formulas above."""
    from speech_flax.kernels import tpu_depthwise
    from speech_flax.layers import attention, normalization

    attention.fused_attention = plain_attention
    normalization.layer_norm = plain_layer_norm
    tpu_depthwise.suits = lambda width, channels: False
    compile_here(*arguments)


def measure(slice_name: str, rows: int, layers: int, remat: str, mesh: MeshSettings, compiler=None) -> dict[str, float]:
    """Estimate one step with ``rows`` clips per chip."""
    slice_ = parse_slice(slice_name)
    config = {"num_hidden_layers": layers, "layerdrop": 0.0, "mask_time_prob": 0.065}
    experiment = Experiment(
        DataSettings(DataSource("owner/corpus", max_seconds=SECONDS), num_buckets=1),
        "runs/none",
        model=ModelSettings(config=config, dtype="bfloat16", remat=remat),
        mesh=mesh,
    )
    shape = BucketShape(SECONDS, rows * slice_.num_chips, 512, 1.0)
    step = compile_step(experiment, slice_, shape, machine_code=True, compiler=compiler)
    if not step.text:
        raise SystemExit(f"{rows} rows with remat {remat} need {step.peak_bytes / 2**30:.1f} GiB and do not fit")
    seconds = estimate(parse_program(step.text), slice_, step.cycles).seconds
    flops = 3 * forward_flops(Wav2Vec2BertConfig(**config), rows, round(SECONDS * 16_000), 2)
    return {
        "rows": rows,
        "ms": seconds * 1e3,
        "ms per row": seconds * 1e3 / rows,
        "MFU": flops / seconds / slice_.chip.matmul_flops,
        "peak GiB": step.peak_bytes / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slice", default="v5e:4x4")
    parser.add_argument("--rows", type=int, default=12, help="clips per chip of this library's step")
    parser.add_argument("--port-rows", type=int, default=16, help="clips per chip of the plain port's step")
    parser.add_argument("--layers", type=int, default=24, help="of the model; fewer for a trial")
    arguments = parser.parse_args()
    chips, layers = parse_slice(arguments.slice).num_chips, arguments.layers
    ours = measure(arguments.slice, arguments.rows, layers, "dots", MeshSettings(data=1, fsdp=chips))
    print("this library", {key: round(value, 3) for key, value in ours.items()}, flush=True)
    port = measure(arguments.slice, arguments.port_rows, layers, "full", MeshSettings(data=chips), compile_port)
    print("plain port", {key: round(value, 3) for key, value in port.items()})
    print(f"speed: {port['ms per row'] / ours['ms per row']:.2f} times that of the plain port")


if __name__ == "__main__":
    main()
