"""One side of a comparison of ``cpu.py``: a process that computes one case again and again, when it is told to.

    python benchmarks/cpu_sides.py SIDE CASE_AS_JSON

Standard output gets a line when everything is prepared, and one with times after every line read from standard input.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """What is computed: ``forward``, ``training``, ``log-mel`` or ``ctc``.

    ``layers`` of 0 means all of them; ``symbols`` is the size of the vocabulary.
    """

    kind: str
    model: str = ""
    layers: int = 0
    seconds: float = 10.0
    rows: int = 1
    symbols: int = 32
    threads: int = 1


#: Share of the longest utterance that the utterances of a batch last.
LENGTHS = (1.0, 0.9, 0.8, 0.7)
LABELS_PER_SECOND = 10
#: Runs are repeated until they have taken so long: a single one of a millisecond would be of waking up.
SHORTEST_SECONDS = 0.1


def resident(field: str) -> int:
    """Resident memory of this process in bytes: now (``VmRSS``) or at its highest (``VmHWM``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Random audio or features, a mask where the rows are of unequal length, and labels."""
    random = np.random.default_rng(0)
    by_samples = not case.model.startswith("w2v")
    length = round(case.seconds * 16_000) if by_samples else round(case.seconds * 50) - 1
    shape = (case.rows, length) if by_samples else (case.rows, length, 160)
    arrays = {"input_values" if by_samples else "input_features": random.standard_normal(shape, dtype=np.float32)}
    shares = np.array([LENGTHS[row % len(LENGTHS)] for row in range(case.rows)])
    if case.rows > 1:
        arrays["attention_mask"] = (np.arange(length) < (shares * length).astype(int)[:, None]).astype(np.int32)
    if case.kind == "training":
        arrays["labels"] = random.integers(1, case.symbols, (case.rows, round(LABELS_PER_SECOND * case.seconds)))
    return arrays


def model_settings(case: Case) -> dict[str, Any]:
    """The published architecture, every rate at its default but LayerDrop: both sides are to compute every layer."""
    from speech_flax import HubertConfig, Wav2Vec2BertConfig

    family = HubertConfig if case.model.startswith("hubert") else Wav2Vec2BertConfig
    changes = {"num_hidden_layers": case.layers} if case.layers else {}
    return family.named(
        case.model, vocab_size=case.symbols, layerdrop=0.0, ctc_zero_infinity=True, ctc_loss_reduction="mean", **changes
    ).to_dict()


def ctc_inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits, their lengths, labels and their lengths."""
    random = np.random.default_rng(0)
    frames, labels = round(case.seconds * 50) - 1, round(LABELS_PER_SECOND * case.seconds)
    shares = np.array([LENGTHS[row % len(LENGTHS)] for row in range(case.rows)])
    logits = random.standard_normal((case.rows, frames, case.symbols), dtype=np.float32)
    ids = random.integers(1, case.symbols, (case.rows, labels)).astype(np.int32)
    return logits, (shares * frames).astype(np.int32), ids, (shares * labels).astype(np.int32)


def prepare_torch(case: Case, compiled: bool) -> Callable[[], Any]:
    """The case in PyTorch and Transformers, as a function of nothing."""
    import torch

    torch.set_num_threads(case.threads)
    if case.kind == "ctc":
        return _torch_ctc(case)
    import transformers

    transformers.logging.set_verbosity_error()
    settings = model_settings(case)
    hubert = case.model.startswith("hubert")
    config = (transformers.HubertConfig if hubert else transformers.Wav2Vec2BertConfig)(**settings)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = (transformers.HubertForCTC if hubert else transformers.Wav2Vec2BertForCTC)(config)
    model.to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and parameter.dim() == 1 else 0.0, 0.02, generator=random)
    given = {name: torch.from_numpy(array) for name, array in inputs(case).items()}
    model.train(case.kind == "training")
    call = torch.compile(model) if compiled else model

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return call(**given).logits

    def training() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = call(**given).loss
        loss.backward()
        return loss

    return training if case.kind == "training" else forward


def _torch_ctc(case: Case) -> Callable[[], Any]:
    import torch

    logits, frames, labels, counts = (torch.from_numpy(array) for array in ctc_inputs(case))
    logits.requires_grad_()

    def run() -> torch.Tensor:
        logits.grad = None
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        loss = torch.nn.functional.ctc_loss(log_probs, labels.long(), frames, counts, reduction="sum")
        loss.backward()
        return loss

    return run


def prepare_numpy_log_mel(case: Case) -> Callable[[], Any]:
    """The feature extractor of Transformers, which computes with NumPy."""
    import transformers

    extractor = transformers.SeamlessM4TFeatureExtractor()
    waveform = 0.1 * np.random.default_rng(0).standard_normal(round(case.seconds * 16_000), dtype=np.float32)
    return lambda: extractor(waveform, sampling_rate=16_000, return_tensors="np")


def prepare_ours(case: Case) -> Callable[[], Any]:
    """The case in this library, as a function of nothing; its program is compiled."""
    import jax
    import jax.numpy as jnp

    if case.kind == "log-mel":
        from speech_flax import SeamlessM4TFeatureExtractor

        extractor = SeamlessM4TFeatureExtractor()
        waveform = 0.1 * np.random.default_rng(0).standard_normal(round(case.seconds * 16_000), dtype=np.float32)
        return lambda: extractor(waveform, sampling_rate=16_000)
    if case.kind == "ctc":
        from speech_flax import ctc_loss

        logits, *others = (jnp.asarray(array) for array in ctc_inputs(case))
        program = jax.jit(jax.value_and_grad(lambda logits: ctc_loss(logits, *others)[0].sum()))
        return lambda: jax.block_until_ready(program(logits))
    module, abstract = our_model(case)
    params = random_parameters(abstract)
    given = {name: jnp.asarray(array) for name, array in inputs(case).items()}
    return our_run(case, lower_ours(case, module, params, given).compile(), params, given)


def our_model(case: Case, scan_unroll: int = 1) -> tuple[Any, Any]:
    """This library's module for a case, and its parameters as shapes."""
    import jax

    from speech_flax import HubertConfig, HubertForCTC, Wav2Vec2BertConfig, Wav2Vec2BertForCTC
    from speech_flax.pretrained import example_input

    hubert = case.model.startswith("hubert")
    config = (HubertConfig if hubert else Wav2Vec2BertConfig).from_dict(model_settings(case))
    module = (HubertForCTC if hubert else Wav2Vec2BertForCTC)(config, scan_unroll=scan_unroll)
    return module, jax.eval_shape(module.init, jax.random.key(0), example_input(config))["params"]


def random_parameters(abstract: Any) -> Any:
    """Parameters of these shapes; scales of norms are about 1."""
    import jax
    import jax.numpy as jnp

    random = np.random.default_rng(0)

    def random_leaf(path: tuple, leaf: Any) -> jax.Array:
        values = random.standard_normal(leaf.shape, dtype=np.float32)
        values *= 0.02
        if path[-1].key == "scale":
            values += 1
        return jnp.asarray(values)

    return jax.tree_util.tree_map_with_path(random_leaf, abstract)


def lower_ours(case: Case, module: Any, params: Any, given: dict[str, Any]) -> Any:
    """The lowered program of parameters, inputs and, in training, a random key; both may be shapes."""
    import jax

    if case.kind == "forward":
        return jax.jit(lambda params, given: module.apply({"params": params}, **given).logits).lower(params, given)

    def loss(params: Any, given: dict, key: jax.Array) -> jax.Array:
        rngs = {name: jax.random.fold_in(key, index) for index, name in enumerate(("dropout", "spec_augment"))}
        return module.apply({"params": params}, **given, deterministic=False, rngs=rngs).loss

    return jax.jit(jax.value_and_grad(loss)).lower(params, given, jax.random.key(0))


def our_run(case: Case, program: Any, params: Any, given: dict[str, Any]) -> Callable[[], Any]:
    """A function of nothing that runs the compiled program, every time with another key."""
    import jax

    if case.kind == "forward":
        return lambda: jax.block_until_ready(program(params, given))
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    return lambda: jax.block_until_ready(program(params, given, next(keys)))


def prepare(side: str, case: Case) -> tuple[Callable[[], Any], int]:
    """What ``side`` runs, and the memory of the process before there were parameters."""
    if side == "ours":
        import jax

        jax.devices()
        import speech_flax.models.hubert
        import speech_flax.models.wav2vec2_bert  # noqa: F401

        return prepare_ours, resident("VmRSS")
    import transformers
    from transformers import HubertForCTC, Wav2Vec2BertForCTC  # noqa: F401

    transformers.logging.set_verbosity_error()
    if case.kind == "log-mel":
        return prepare_numpy_log_mel, resident("VmRSS")
    return lambda case: prepare_torch(case, side == "torch.compile"), resident("VmRSS")


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of wall-clock and of CPU time that one run takes."""
    began, cpu, runs = time.perf_counter(), time.process_time(), 0
    while (wall := time.perf_counter() - began) < SHORTEST_SECONDS:
        run()
        runs += 1
    return {"wall": wall / runs, "cpu": (time.process_time() - cpu) / runs}


def main() -> None:
    side, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-case.threads :])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers on the standard output
    preparation, idle = prepare(side, case)
    run = preparation(case)
    started = time.perf_counter()
    run()
    first = time.perf_counter() - started
    if first < 10:  # long runs are warm after one
        run()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted from here on
    print(json.dumps({"first_run_seconds": first}), file=answers, flush=True)
    for _ in sys.stdin:
        if case.kind == "training":  # as in a row of steps: with the memory that the system gave to the one before
            run()
        print(json.dumps({**timed(run), "memory": resident("VmHWM") - idle}), file=answers, flush=True)


if __name__ == "__main__":
    main()
