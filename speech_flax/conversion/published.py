"""The numbers that the makers of the published models give, as checks by name.

They need the models, and recordings from the hub; so they run where the hub can be reached, or where both are in its
cache.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from speech_flax.audio.decoding import load_audio

SAMPLE_RATE = 16_000


@dataclasses.dataclass(frozen=True)
class Published:
    """One published example.

    Attributes:
      model: Hub id of the model, for the help text.
      dataset: Hub id, configuration and split of the recordings; ``None`` if they are files.
      clips: Rows of the split, or names of files.
      transcripts: Greedy transcripts of the clips.
      labels: Text whose CTC loss is given, or index of the class.
      loss: That loss.
      slices: Output values by (row, first frame, first feature).
      layer: Hidden state (1 is the output of the first layer) that ``features`` holds.
      features: Name of a ``.npy`` file.
      tolerance: Largest allowed difference of the numbers, as their source states it.
      source: Where the numbers stand.
    """

    model: str
    source: str
    tolerance: float
    clips: tuple[int | str, ...]
    dataset: tuple[str, str, str] | None = ("hf-internal-testing/librispeech_asr_dummy", "clean", "validation")
    transcripts: tuple[str, ...] = ()
    labels: str | int | None = None
    loss: float | None = None
    slices: Mapping[tuple[int, int, int], tuple[float, ...]] = dataclasses.field(default_factory=dict)
    layer: int | None = None
    features: str | None = None


_QUILTER = "MISTER QUILTER IS THE APOSTLE OF THE MIDDLE CLASSES AND WE ARE GLAD TO WELCOME HIS GOSPEL"
_DEMO = ("hf-internal-testing/librispeech_asr_demo", "clean", "validation")
_DOCUMENTATION = "documentation of Transformers 4.37.2"

PUBLISHED = {
    "hubert-large-ls960-ft": Published(
        "facebook/hubert-large-ls960-ft", _DOCUMENTATION, 0.01, (0,), _DEMO, (_QUILTER,), _QUILTER, 22.68
    ),
    # The reference text is in capitals and this vocabulary is not: the loss is that of unknown symbols.
    "wav2vec2-bert-CV16-en": Published(
        "hf-audio/wav2vec2-bert-CV16-en", _DOCUMENTATION, 0.01, (0,), _DEMO, (_QUILTER.lower(),), _QUILTER, 17.04
    ),
    "hubert-base-superb-ks": Published(
        "superb/hubert-base-superb-ks", _DOCUMENTATION, 0.01, (0,), _DEMO, ("_unknown_",), 0, 8.53
    ),
    "w2v-bert-2.0": Published(
        "facebook/w2v-bert-2.0",
        "tests of Transformers",
        1e-4,
        ("1272-141231-0000", "1272-141231-0001"),
        slices={(0, 25, 4): (-0.0098, -0.0570, -0.1286, 0.0439, -0.1037, -0.0235)},
    ),
    **{
        f"fairseq-hubert-{size}": Published(
            f"hubert_{name}.pt", "tests of fairseq", 1e-2, ("6313-76958-0021.flac",), None, layer=layer,
            features=f"sample.{size}.L{layer}.npy",
        )
        for size, name, layer in (
            ("base", "base_ls960", 9), ("large", "large_ll60k", 20), ("xlarge", "xtralarge_ll60k", 30)
        )
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One published number or text beside ours."""

    name: str
    ours: Any
    published: Any
    passed: bool


def check_published(
    example: Published, module: nn.Module, params: PyTree, directory: Path, files: Path | None = None
) -> list[Comparison]:
    """Compute what was published with a model, and compare.

    Args:
      example: The example.
      module: The model.
      params: Its parameters.
      directory: Where its processor is.
      files: Where the recordings and features of fairseq's examples are.

    Raises:
      ValueError: files are needed and not given.
      FileNotFoundError: recordings cannot be found.
    """
    params = jax.tree.map(jnp.asarray, params)
    waveforms = _recordings(example, files)
    inputs = _inputs(module, directory, waveforms, normalise="base" not in (example.features or ""))
    wants_states = example.layer is not None
    outputs = jax.jit(lambda params: module.apply({"params": params}, **inputs, output_hidden_states=wants_states))(
        params
    )
    found: list[Comparison] = []
    if example.features is not None:
        features = np.load(files / example.features, allow_pickle=False)
        state = np.asarray(outputs.hidden_states[example.layer][0])
        frames = min(len(state), len(features))
        worst = float(np.abs(state[:frames] - features[:frames]).max() / features.std())
        found.append(Comparison(f"layer {example.layer}, relative error", worst, 0.0, worst <= example.tolerance))
    for (row, frame, feature), values in example.slices.items():
        ours = np.asarray(outputs.last_hidden_state)[row, frame, feature : feature + len(values)]
        close = bool(np.abs(ours - values).max() <= example.tolerance)
        found.append(Comparison(f"output {row}, {frame}, {feature}...", [*map(float, ours)], list(values), close))
    texts = _texts(module, outputs.logits, directory) if example.transcripts else []
    for text, ours in zip(example.transcripts, texts, strict=True):
        found.append(Comparison("transcript", ours, text, ours == text))
    if example.loss is not None:
        loss = float(module.apply({"params": params}, **inputs, labels=_labels(example, directory)).loss)
        found.append(Comparison("loss", loss, example.loss, abs(loss - example.loss) <= example.tolerance))
    return found


def _recordings(example: Published, files: Path | None) -> list[Float[np.ndarray, "samples"]]:
    if example.dataset is None:
        if files is None:
            wanted = ", ".join([*map(str, example.clips), str(example.features)])
            raise ValueError(f"name the directory with {wanted} (from the examples of fairseq) with --published-files")
        return [load_audio(files / str(clip)) for clip in example.clips]
    import datasets

    name, configuration, split = example.dataset
    rows = datasets.load_dataset(name, configuration, split=split).cast_column("audio", datasets.Audio(decode=False))
    chosen = rows if isinstance(example.clips[0], int) else {row["id"]: row for row in rows}
    return [load_audio(chosen[clip]["audio"]["bytes"] or chosen[clip]["audio"]["path"]) for clip in example.clips]


def _inputs(
    module: nn.Module, directory: Path, waveforms: Sequence[np.ndarray], normalise: bool
) -> dict[str, np.ndarray]:
    import speech_flax

    if module.config.model_type == "hubert":
        stored = (directory / "preprocessor_config.json").is_file()
        kind = speech_flax.Wav2Vec2FeatureExtractor
        extractor = kind.from_pretrained(directory) if stored else kind(do_normalize=normalise)
    else:
        extractor = speech_flax.SeamlessM4TFeatureExtractor.from_pretrained(directory)
    return dict(extractor(list(waveforms), sampling_rate=SAMPLE_RATE, padding=True, return_tensors="np"))


def _texts(module: nn.Module, logits: Any, directory: Path) -> list[str]:
    import speech_flax

    if type(module).__name__.endswith("ForCTC"):
        tokenizer = speech_flax.Wav2Vec2CTCTokenizer.from_pretrained(directory)
        return tokenizer.batch_decode(np.asarray(logits).argmax(-1).tolist())
    return [module.config.id2label[int(index)] for index in np.asarray(logits).argmax(-1)]


def _labels(example: Published, directory: Path) -> np.ndarray:
    import speech_flax

    if isinstance(example.labels, int):
        return np.array([example.labels])
    tokenizer = speech_flax.Wav2Vec2CTCTokenizer.from_pretrained(directory)
    return np.array([tokenizer(example.labels)["input_ids"]])
