"""One measurement of benchmarks/gpu.py, in a process of its own: speech_flax or Transformers in PyTorch.

Takes a JSON object as argument and prints one: seconds of a step and peak memory, or what went wrong. Needs jax,
flax and optax, or torch and transformers, and no more; speech_flax is imported from the checkout.
"""

import dataclasses
import json
import resource
import sys
import time
import types
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

#: Labels of an utterance, per second: characters of read English.
_LABELS_PER_SECOND = 12
_WARM_UP, _LEAST, _MOST = 2, 3, 20


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured.

    Attributes:
      side: ``speech_flax`` or ``torch``.
      model: ``w2v-bert-2.0`` or ``hubert-large``.
      mode: ``training`` (loss, gradient, AdamW) or ``forward``.
      seconds: Audio of an utterance.
      batch: Utterances.
      settings: Of the side: ``remat`` there, ``attention``, ``compile`` and ``checkpointing`` here.
      device: ``cuda`` or ``cpu``.
      size: ``full`` or ``tiny``, which tries the plumbing.
      patience: Seconds to repeat the step for, at least three times.
    """

    side: str
    model: str
    mode: str
    seconds: float
    batch: int
    settings: dict
    device: str = "cuda"
    size: str = "full"
    patience: float = 5.0


def configuration(model: str, size: str) -> dict:
    """Fields of the configuration on both sides; SpecAugment and LayerDrop are off, dropout is as in fine-tuning."""
    fields = {"vocab_size": 32, "layerdrop": 0.0, "apply_spec_augment": False, "attention_dropout": 0.1}
    if model == "hubert-large":
        fields |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
        fields |= {"num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16}
    if size == "tiny":
        fields |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        if model == "hubert-large":
            fields |= {"conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    else:
        fields |= {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return fields


def inputs(what: Measurement) -> dict[str, np.ndarray]:
    """Whole utterances without padding, and labels of a likely number."""
    random, batch = np.random.default_rng(0), what.batch
    if what.model == "hubert-large":
        values = {"input_values": random.standard_normal((batch, round(16_000 * what.seconds)), np.float32)}
    else:
        values = {"input_features": random.standard_normal((batch, round(50 * what.seconds), 160), np.float32)}
    positions = next(iter(values.values())).shape[:2]
    labels = random.integers(1, 32, (batch, max(1, round(_LABELS_PER_SECOND * what.seconds))))
    return {**values, "attention_mask": np.ones(positions, np.int32), "labels": labels.astype(np.int32)}


def time_of(step: Callable[[], None], patience: float) -> float:
    """Median seconds of ``step``, which returns when its work is done."""
    for _ in range(_WARM_UP):
        step()
    times = []
    while len(times) < _LEAST or (sum(times) < patience and len(times) < _MOST):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure_speech_flax(what: Measurement) -> dict:
    """Float32 parameters and bfloat16 computation in training, both bfloat16 in the forward pass."""
    annotations_without_jaxtyping()
    import jax
    import jax.numpy as jnp
    import optax

    from speech_flax.training.flops import forward_flops

    dtype = jnp.bfloat16 if what.device == "cuda" else jnp.float32
    model = flax_model(what, dtype)
    arrays = {name: jnp.asarray(array) for name, array in inputs(what).items()}
    short = {name: array[:1, : 16_000 if what.model == "hubert-large" else 64] for name, array in arrays.items()}
    short.pop("labels")
    stored = dtype if what.mode == "forward" else jnp.float32
    params = jax.jit(
        lambda: jax.tree.map(lambda leaf: leaf.astype(stored), model.init(jax.random.key(0), **short)["params"])
    )()

    def forward():
        jax.block_until_ready(logits_of(params, arrays))

    def train():
        nonlocal state, index
        state, loss = update(state, arrays, index)
        index += 1
        jax.block_until_ready(loss)

    if what.mode == "forward":
        arrays.pop("labels")
        logits_of = jax.jit(lambda params, arrays: model.apply({"params": params}, **arrays).logits)
        seconds = time_of(forward, what.patience)
    else:
        optimizer = optax.adamw(1e-5)
        state, index = (params, jax.jit(optimizer.init)(params)), 0
        del params
        update = jax.jit(partial(training_step, model, optimizer), donate_argnums=0)
        seconds = time_of(train, what.patience)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak_of_process())
    samples = round(16_000 * what.seconds)
    return {
        "step": seconds,
        "peak_memory": memory,
        "flops": forward_flops(model.config, what.batch, samples, 2) * (3 if what.mode == "training" else 1),
        "device": jax.local_devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }


def flax_model(what: Measurement, dtype: object) -> object:
    from speech_flax import HubertConfig, HubertForCTC, Wav2Vec2BertConfig, Wav2Vec2BertForCTC

    is_hubert = what.model == "hubert-large"
    config = (HubertConfig if is_hubert else Wav2Vec2BertConfig)(**configuration(what.model, what.size))
    return (HubertForCTC if is_hubert else Wav2Vec2BertForCTC)(config, dtype, **what.settings)


def training_step(model, optimizer, state: tuple, arrays: dict, index) -> tuple[tuple, object]:
    """Parameters and moments after step ``index``, and its loss."""
    import jax
    import optax

    params, moments = state

    def loss_of(params):
        rngs = {"dropout": jax.random.fold_in(jax.random.key(0), index)}
        return model.apply({"params": params}, **arrays, deterministic=False, rngs=rngs).loss

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, moments = optimizer.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), loss


def measure_torch(what: Measurement) -> dict:
    """Float32 parameters under autocast to bfloat16 in training, bfloat16 parameters in the forward pass."""
    import torch
    import transformers

    on_gpu = what.device == "cuda"
    torch.set_float32_matmul_precision("high")
    family = "Hubert" if what.model == "hubert-large" else "Wav2Vec2Bert"
    config = getattr(transformers, f"{family}Config")(**configuration(what.model, what.size))
    torch.manual_seed(0)
    attention = what.settings.get("attention", "eager")
    model = transformers.AutoModelForCTC.from_config(config, attn_implementation=attention).to(what.device)
    training = what.mode == "training"
    if training and what.settings.get("checkpointing"):
        model.gradient_checkpointing_enable()
    model = model.train() if training else model.eval()
    arrays = {name: torch.from_numpy(array).to(what.device) for name, array in inputs(what).items()}
    arrays["labels"] = arrays["labels"].long()
    called = torch.compile(model) if what.settings.get("compile") else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    def train():
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = called(**arrays).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()

    def forward():
        with torch.inference_mode():
            called(**arrays)
        wait()

    if not training:
        arrays.pop("labels")
        if on_gpu:
            model.to(torch.bfloat16)
            arrays = {
                name: array.to(torch.bfloat16) if array.is_floating_point() else array for name, array in arrays.items()
            }
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = time_of(train if training else forward, what.patience)
    return {
        "step": seconds,
        "peak_memory": torch.cuda.max_memory_allocated() if on_gpu else peak_of_process(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def annotations_without_jaxtyping() -> None:
    """Where jaxtyping is not installed, its annotations, which nothing here checks, become ``Any``."""
    try:
        import jaxtyping  # noqa: F401
    except ImportError:

        class Annotation:
            def __class_getitem__(cls, _):
                return typing.Any

        stand_in = types.ModuleType("jaxtyping")
        stand_in.__getattr__ = lambda name: typing.Any if name in ("Array", "PyTree") else Annotation
        sys.modules["jaxtyping"] = stand_in


def peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_memory(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(sign in text for sign in ("resource_exhausted", "out of memory", "outofmemory", "failed to allocate"))


def main() -> None:
    what = Measurement(**json.loads(sys.argv[1]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    measure = {"speech_flax": measure_speech_flax, "torch": measure_torch}[what.side]
    try:
        print(json.dumps(measure(what)))
    except Exception as error:  # whatever it is, the table says so, and the other measurements go on
        print(
            json.dumps({"error": "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {error}"[:300]})
        )


if __name__ == "__main__":
    main()
