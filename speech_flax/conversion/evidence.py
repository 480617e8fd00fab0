"""Is a converted model the same? Its outputs and gradients against a reference, layer by layer."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from speech_flax.configuration import HubertConfig
from speech_flax.conversion.interruption import uninterrupted
from speech_flax.conversion.reference import (
    GRADIENT,
    OUTPUTS,
    SAMPLE_RATE,
    Reference,
    default_extractor,
    main_output,
    output_weights,
)
from speech_flax.conversion.transformers_names import transformers_layout
from speech_flax.conversion.tree import flat, tensor_at


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What may differ: ``measure`` of the activations, and the relative error (``l2``) of the gradients.

    Gradients are relative to their own norm, or to a ten-thousandth of the largest if that is more: some are zero but
    for rounding.
    """

    measure: str
    activations: float
    gradients: float


#: By computation type and precision of matrix products. In float32 every single value counts (``relative``: the largest
#: error relative to the root mean square of the layer): rounding, summed in another order, stays three digits below. A
#: bfloat16 has eight bits: single values are off by a per cent of the layer's scale and more, so what counts is the
#: error of the layer as a whole (``l2``). Accelerators multiply float32 in bfloat16 or TF32 unless told otherwise, and
#: add in float32.
TOLERANCES = {
    ("float32", "highest"): Tolerance("relative", 1e-4, 1e-3),
    ("float32", "default"): Tolerance("l2", 2e-2, 1e-1),
    ("bfloat16", "highest"): Tolerance("l2", 3e-2, 2e-1),
    ("bfloat16", "default"): Tolerance("l2", 3e-2, 2e-1),
}
#: Largest error of a normalised waveform.
_WAVEFORM_TOLERANCE = 5e-4
#: Norm of the error over the norm, and mean error, of log-mel vectors. Single values say nothing: a mel bin without
#: energy (above 4 kHz, in recordings from a telephone) holds rounding, a ten-millionth of the loudest bin, which the
#: logarithm and the normalisation make as large as speech. That is inherent to float32: frames of real recordings that
#: are computed in float64 and rounded once give single values that are off by 0.03. Over 87 recordings of all kinds the
#: two measures reached 4.5e-3 and 1.0e-3; a waveform shifted by one sample gives 6e-3 and 4e-3 at the least.
_LOG_MEL_TOLERANCE = 1e-2, 2e-3
_COLUMNS = ("max abs", "mean abs", "scale", "relative", "l2", "1-cosine")


@dataclasses.dataclass(frozen=True)
class Row:
    """How one tensor differs from the reference.

    Attributes:
      name: Output or parameter.
      max_abs: Largest absolute difference.
      mean_abs: Mean absolute difference.
      scale: Root mean square of the reference.
      relative: ``max_abs`` over ``scale``.
      l2: Norm of the difference over the norm of the reference.
      cosine: Cosine of the angle between both.
      passed: Whether the stated tolerance holds.
    """

    name: str
    max_abs: float
    mean_abs: float
    scale: float
    relative: float
    l2: float
    cosine: float
    passed: bool


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The outcome of a check.

    ``assumed`` counts the fields of the configuration that the source does not say: where PyTorch's side runs with the
    same assumptions, no comparison can find them wrong.
    """

    architecture: str
    dtype: str
    precision: str
    tolerance: Tolerance
    platform: str
    reference: Mapping[str, str]
    rows: tuple[Row, ...]
    gradients: tuple[Row, ...]
    transcripts: tuple[tuple[str, str], ...]
    assumed: int = 0

    @property
    def passed(self) -> bool:
        return all(row.passed for row in (*self.rows, *self.gradients))

    def save(self, directory: Path) -> None:
        """Write ``parity.json`` and ``parity.png``."""
        from speech_flax.conversion.picture import draw_evidence

        content = dataclasses.asdict(self) | {"passed": self.passed}
        with uninterrupted():  # both files or none
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "parity.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            draw_evidence(self, directory / "parity.png")

    def lines(self) -> Iterator[str]:
        """The report as text."""
        limit = self.tolerance
        yield (
            f"{self.architecture}, {self.dtype}, matrix products {self.precision}, on {self.platform}; reference: "
            + ", ".join(f"{name} {version}" for name, version in self.reference.items())
        )
        worst = sorted(self.gradients, key=lambda row: -row.l2)[:8]
        width = max(len(row.name) for row in (*self.rows, *worst)) + 2
        yield " " * width + "".join(f"{column:>10}" for column in _COLUMNS)
        for row in self.rows:
            yield _line(row, width)
        if self.gradients:
            yield f"gradients of {len(self.gradients)} parameters, the {len(worst)} that differ most:"
            for row in worst:
                yield _line(row, width)
        for ours, theirs in self.transcripts:
            yield f"transcript: {ours!r}" + ("" if ours == theirs else f", reference: {theirs!r}")
        failed = [row.name for row in (*self.rows, *self.gradients) if not row.passed]
        verdict = "the same" if self.passed else f"DIFFERENT, first at {failed[0]} ({len(failed)} in all)"
        if self.assumed:
            verdict += f", with assumptions about the configuration ({self.assumed}, noted above)"
        yield (
            f"verdict: {verdict}; tolerance: {limit.measure} {limit.activations:g}"
            + (f", gradients l2 {limit.gradients:g}" if self.gradients else "")
        )


def _line(row: Row, width: int) -> str:
    numbers = (row.max_abs, row.mean_abs, row.scale, row.relative, row.l2, 1 - row.cosine)
    return f"{row.name:<{width}}" + "".join(f"{number:>10.1e}" for number in numbers) + ("" if row.passed else "  <-")


def compare(
    name: str, ours: np.ndarray, theirs: np.ndarray, passes: Callable[[Row], bool], least_norm: float = 0.0
) -> Row:
    """One row; ``least_norm`` is the least that the error is measured against.

    Raises:
      ValueError: different shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{name} has the shape {list(ours.shape)} here and {list(theirs.shape)} in the reference")
    first, second = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    difference = np.abs(first - second)
    norm = float(np.linalg.norm(second))
    scale = max(norm, least_norm) / math.sqrt(max(second.size, 1)) or 1.0
    both = float(np.linalg.norm(first)) * norm
    largest = float(difference.max(initial=0.0))
    row = Row(
        name=name,
        max_abs=largest,
        mean_abs=float(difference.mean()) if difference.size else 0.0,
        scale=scale,
        relative=largest / scale,
        l2=float(np.linalg.norm(difference)) / (scale * math.sqrt(max(second.size, 1))),
        cosine=float(first @ second) / both if both else 1.0,
        passed=False,
    )
    return dataclasses.replace(row, passed=bool(passes(row)))


def check(
    module: nn.Module,
    params: PyTree,
    reference: Reference,
    *,
    directory: Path,
    dtype: str = "float32",
    precision: str = "highest",
    gradients: bool = False,
    assumed: int = 0,
) -> Evidence:
    """Run ``module`` on the inputs of ``reference`` and compare everything that is in it.

    Args:
      module: The model; its ``compatibility`` is set to that of the reference.
      params: Its parameters.
      reference: What PyTorch computed.
      directory: Where the processor of the model is.
      dtype: Computation type.
      precision: Precision of matrix products: ``"highest"``, or ``"default"`` for the accelerator's own.
      gradients: Compare the gradients too.
      assumed: Fields of the configuration that the source does not say, for the verdict.

    Raises:
      ValueError: the reference is of another model, or has no gradients.
    """
    architecture = type(module).__name__
    if reference.architecture != architecture:
        raise ValueError(f"{reference.path} is the reference of a {reference.architecture}, not of a {architecture}")
    if gradients and not any(name.startswith(GRADIENT) for name in reference.tensors):
        raise ValueError(f"{reference.path} holds no gradients; make it with --write-reference FILE --gradients")
    tolerance = TOLERANCES[dtype, precision]
    config = module.config.replace(compatibility=reference.compatibility)
    module = module.clone(config=config, dtype=jnp.dtype(dtype))

    def passes(row: Row) -> bool:
        return getattr(row, tolerance.measure) <= tolerance.activations

    rows = list(_input_rows(config, reference, directory))
    with jax.default_matmul_precision(precision):
        outputs, of_parameters = _run(module, params, reference, gradients)
    for name, value in outputs.items():
        if name in reference.tensors:
            rows.append(compare(name, value, reference.tensors[name].read(), passes))
    missing = [
        name for name in reference.tensors if name.startswith(("hidden_states.", *OUTPUTS)) and name not in outputs
    ]
    if missing:
        raise ValueError(f"{reference.path} holds {missing[0]}, which this model does not have")
    return Evidence(
        architecture=architecture,
        dtype=dtype,
        precision=precision,
        tolerance=tolerance,
        platform=jax.devices()[0].device_kind,
        reference=dict(reference.versions),
        rows=tuple(rows),
        gradients=tuple(_gradient_rows(of_parameters, reference, tolerance)) if gradients else (),
        transcripts=_transcripts(outputs, reference, directory),
        assumed=assumed,
    )


def _input_rows(config: Any, reference: Reference, directory: Path) -> Iterator[Row]:
    """The front end: what this library's feature extractor makes of the reference's waveforms."""
    import speech_flax

    is_hubert = isinstance(config, HubertConfig)
    kind = speech_flax.Wav2Vec2FeatureExtractor if is_hubert else speech_flax.SeamlessM4TFeatureExtractor
    stored = (directory / "preprocessor_config.json").is_file()
    extractor = kind.from_pretrained(directory) if stored else kind(**default_extractor(config))
    waveforms = [reference.tensors[name].read() for name in sorted(reference.tensors) if name.startswith("waveform.")]
    encoded = extractor(
        waveforms, sampling_rate=SAMPLE_RATE, padding=True, return_attention_mask=True, return_tensors="np"
    )
    ours = np.asarray(encoded["input_values" if is_hubert else "input_features"])

    def passes(row: Row) -> bool:
        if is_hubert:
            return row.max_abs <= _WAVEFORM_TOLERANCE
        return row.l2 <= _LOG_MEL_TOLERANCE[0] and row.mean_abs <= _LOG_MEL_TOLERANCE[1]

    yield compare("inputs", ours, reference.tensors["inputs"].read(), passes)


def _run(
    module: nn.Module, params: PyTree, reference: Reference, gradients: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Outputs by name, and gradients by Transformers' names if they are wanted."""
    inputs, mask = reference.tensors["inputs"].read(), reference.tensors["attention_mask"].read().astype(np.int32)
    labels = reference.tensors["labels"].read().astype(np.int32) if "labels" in reference.tensors else None
    named = {} if labels is None else {"labels": labels}

    def loss(params: PyTree) -> tuple[jax.Array, Any]:
        outputs = module.apply({"params": params}, inputs, mask, output_hidden_states=True, **named)
        if labels is not None:
            return outputs.loss, outputs
        main = outputs[main_output(type(module).__name__)]
        return (main.astype(jnp.float32) * output_weights(main.shape)).sum(), outputs

    function = jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else loss)
    result, gradient = function(params) if gradients else (function(params), None)
    value, outputs = result
    found = {f"hidden_states.{number}": state for number, state in enumerate(outputs.hidden_states)}
    found |= {name: outputs[name] for name in OUTPUTS if getattr(outputs, name, None) is not None}
    found["loss"] = value
    arrays = {name: np.asarray(one.astype(jnp.float32)) for name, one in found.items()}
    return arrays, {} if gradient is None else _theirs(gradient)


def _theirs(gradient: PyTree) -> dict[str, np.ndarray]:
    shapes = {path: tuple(leaf.shape) for path, leaf in flat(gradient).items()}
    on_host = jax.device_get(gradient)
    return {
        name: transform.to_theirs(tensor_at(on_host, place))
        for name, (place, transform, _) in transformers_layout(shapes).items()
    }


def _gradient_rows(ours: Mapping[str, np.ndarray], reference: Reference, tolerance: Tolerance) -> Iterator[Row]:
    names = [name.removeprefix(GRADIENT) for name in reference.tensors if name.startswith(GRADIENT)]
    largest = max(float(np.linalg.norm(reference.tensors[GRADIENT + name].read())) for name in names)
    for name in names:
        if name not in ours:
            raise ValueError(f"{reference.path} holds the gradient of {name}, which this model does not have")
        theirs = reference.tensors[GRADIENT + name].read()
        yield compare(name, ours[name], theirs, lambda row: row.l2 <= tolerance.gradients, 1e-4 * largest)


def _transcripts(
    outputs: Mapping[str, np.ndarray], reference: Reference, directory: Path
) -> tuple[tuple[str, str], ...]:
    """Greedy transcripts of both, if the model writes text."""
    if not reference.architecture.endswith("ForCTC"):
        return ()
    both = (outputs["logits"], reference.tensors["logits"].read())
    if not (directory / "vocab.json").is_file():
        decode = lambda ids: " ".join(str(one) for one, before in zip(ids, [-1, *ids]) if one != before)  # noqa: B905, E731
    else:
        from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer

        decode = Wav2Vec2CTCTokenizer.from_pretrained(directory).decode
    ours, theirs = ([decode(row.tolist()) for row in logits.argmax(-1)] for logits in both)
    return tuple(zip(ours, theirs, strict=True))
