"""The numbers that the makers of the published models give, as checks by name.

They need the models, and recordings from the hub; so they run where the hub can be reached, or where both are in its
cache.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from speech_flax.audio.decoding import load_audio
from speech_flax.conversion.reference import main_output

SAMPLE_RATE = 16_000
_DUMMY = ("hf-internal-testing/librispeech_asr_dummy", "clean", "validation")
_DEMO = ("hf-internal-testing/librispeech_asr_demo", "clean", "validation")
_CLIPS = ("1272-141231-0000", "1272-141231-0001")
_FLAC = "6313-76958-0021.flac"


@dataclasses.dataclass(frozen=True)
class Published:
    """One published example.

    Attributes:
      model: Hub id of the model or name of its file, for the help text.
      source: Where the numbers stand.
      tolerance: Largest allowed difference of the numbers, as their source states it.
      clips: Rows of the split, or their ids, or names of files.
      dataset: Hub id, configuration and split of the recordings; ``None`` if they are files.
      transcripts: Greedy transcripts of the clips, or their classes by name; an ellipsis ends a beginning.
      ignore_case: Whether capitals make no difference in the transcripts.
      labels: Text whose CTC loss is given, or index of the class.
      loss: That loss.
      shape: That of the output, or its first axes.
      statistics: Row, and the mean and standard deviation of its output.
      slices: Output values of rows, from a frame and a feature on.
      classes: Index of the class of each clip, and the logit of that class.
      layer: Hidden state (1 is the output of the first layer) that ``features`` holds.
      features: Name of a ``.npy`` file.
      normalise: Whether the waveform is normalised, where the model's own processor does not say how it was then.
    """

    model: str
    source: str
    tolerance: float
    clips: tuple[int | str, ...]
    dataset: tuple[str, str, str] | None = _DUMMY
    transcripts: tuple[str, ...] = ()
    ignore_case: bool = False
    labels: str | int | None = None
    loss: float | None = None
    shape: tuple[int, ...] = ()
    statistics: tuple[int, float, float] | None = None
    slices: Mapping[tuple[int, int, int], tuple[tuple[float, ...], ...]] = dataclasses.field(default_factory=dict)
    classes: tuple[tuple[int, float], ...] = ()
    layer: int | None = None
    features: str | None = None
    normalise: bool | None = None


_QUILTER = "MISTER QUILTER IS THE APOSTLE OF THE MIDDLE CLASSES AND WE ARE GLAD TO WELCOME HIS GOSPEL"
_UNIVERSE = "a man said to the universe sir i exist"
_GARMENT = "sweat covered brion's body trickling into the tight loin cloth that was the only garment he wore"
_COWMEN = (
    "KEEP A GOIN AND IF YOU'RE LUCKY YOU'LL RUN PLUMB INTO THEM WAS THE JEERING ANSWER AS THE SLEEPY COWMEN SPURRED "
    "THEIR PONIES ON TOWARD CAMP MUTTERING THEIR DISAPPROVAL OF TAKING ALONG A BUNCH OF BOYS ON A CATTLE DRIVE"
)
_DOCUMENTATION, _TESTS = "documentation of Transformers 4.37.2", "tests of Transformers"
_W2V_BERT_OUTPUTS = {
    (0, 25, 4): (
        (-0.0098, -0.0570, -0.1286, 0.0439, -0.1037, -0.0235), (-0.0767, 0.0574, -0.3224, 0.0482, 0.0440, -0.0193),
        (0.0220, -0.0878, -0.2027, -0.0028, -0.0666, 0.0721), (0.0307, -0.1099, 0.0273, -0.0416, -0.0715, 0.0094),
        (0.0758, -0.0291, 0.1084, 0.0004, -0.0751, -0.0116), (0.0349, -0.0343, -0.0098, 0.0415, -0.0617, 0.0241),
        (-0.0193, -0.0171, 0.1965, 0.0797, -0.0308, 0.2033), (-0.0323, -0.0315, 0.0948, 0.0944, -0.0254, 0.1241),
        (-0.0493, 0.0010, -0.1762, 0.0034, -0.0787, 0.0832), (0.0043, -0.1228, -0.0739, 0.0266, -0.0337, -0.0068),
    ),
    (1, 25, 4): (
        (-0.0348, -0.0521, -0.3036, 0.0285, -0.0715, -0.0453), (-0.0102, 0.0114, -0.3266, 0.0027, -0.0558, 0.0038),
        (0.0454, 0.0148, -0.2418, -0.0392, -0.0455, 0.0478), (-0.0013, 0.0825, -0.1730, -0.0091, -0.0426, 0.0360),
        (-0.0227, 0.0687, -0.1168, 0.0569, -0.0160, 0.0759), (-0.0318, 0.0562, -0.0508, 0.0605, 0.0150, 0.0953),
        (-0.0415, 0.0438, 0.0233, 0.0336, 0.0262, 0.0860), (-0.0163, 0.0048, 0.0807, 0.0119, 0.0712, 0.0158),
        (0.0244, -0.0145, 0.0262, -0.0237, 0.0283, -0.0125), (-0.0587, -0.0516, -0.0368, -0.0196, 0.0307, -0.1434),
    ),
}  # fmt: skip

PUBLISHED = {
    "hubert-large-ls960-ft": Published(
        "facebook/hubert-large-ls960-ft", _DOCUMENTATION, 0.01, (0,), _DEMO, (_QUILTER,), labels=_QUILTER, loss=22.68
    ),
    "hubert-large-ls960-ft-batch": Published(
        "facebook/hubert-large-ls960-ft", _TESTS, 0.0, _CLIPS, transcripts=(_UNIVERSE, _GARMENT), ignore_case=True
    ),
    # The reference text is in capitals and this vocabulary is not: the loss is that of unknown symbols.
    "wav2vec2-bert-CV16-en": Published(
        "hf-audio/wav2vec2-bert-CV16-en", _DOCUMENTATION, 0.01, (0,), _DEMO, (_QUILTER.lower(),), labels=_QUILTER,
        loss=17.04, shape=(1, 146),
    ),
    "hubert-base-superb-ks": Published(
        "superb/hubert-base-superb-ks", _DOCUMENTATION, 0.01, (0,), _DEMO, ("_unknown_",), labels=0, loss=8.53
    ),
    "hubert-base-superb-ks-batch": Published(
        "superb/hubert-base-superb-ks", _TESTS, 2e-2, (0, 1, 2, 3), ("anton-l/superb_dummy", "ks", "test"),
        classes=((2, 7.6692), (6, 17.7795), (10, 11.1562), (9, 11.8232)),
    ),
    "w2v-bert-2.0": Published(
        "facebook/w2v-bert-2.0", _TESTS, 1e-4, _CLIPS, shape=(2, 326, 1024), statistics=(1, 3.3123e-05, 0.1545),
        slices=_W2V_BERT_OUTPUTS,
    ),
    **{
        f"fairseq-hubert-{size}": Published(
            f"hubert_{name}.pt", "tests of fairseq", 1e-2, (_FLAC,), None, layer=layer,
            features=f"sample.{size}.L{layer}.npy", normalise=size != "base",
        )
        for size, name, layer in (
            ("base", "base_ls960", 9), ("large", "large_ll60k", 20), ("xlarge", "xtralarge_ll60k", 30)
        )
    },
    "fairseq-hubert-large-ls960": Published(
        "hubert_large_ll60k_finetune_ls960.pt", "tests of fairseq", 0.0, (_FLAC,), None,
        ("KEEP A GOING AN IF YOU'RE LUCKY...",),
    ),
    "fairseq-hubert-xlarge-ls960": Published(
        "hubert_xtralarge_ll60k_finetune_ls960.pt", "tests of fairseq", 0.0, (_FLAC,), None, (_COWMEN,)
    ),
}  # fmt: skip
_STATISTICS_TOLERANCE = 2e-5


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
    inputs = _inputs(module, directory, _recordings(example, files), example.normalise)
    if example.loss is not None:
        inputs["labels"] = _labels(example, directory)
    wants_states = example.layer is not None
    outputs = jax.jit(lambda params: module.apply({"params": params}, **inputs, output_hidden_states=wants_states))(
        params
    )
    found = [*_of_outputs(example, np.asarray(outputs[main_output(type(module).__name__)], np.float32))]
    if example.features is not None:
        features = np.load(files / example.features, allow_pickle=False)
        state = np.asarray(outputs.hidden_states[example.layer][0])
        frames = min(len(state), len(features))
        worst = float(np.abs(state[:frames] - features[:frames]).max() / features.std())
        found.append(Comparison(f"layer {example.layer}, relative error", worst, 0.0, worst <= example.tolerance))
    texts = _texts(module, outputs.logits, directory) if example.transcripts else []
    for text, ours in zip(example.transcripts, texts, strict=True):
        one, other = (ours.lower(), text.lower()) if example.ignore_case else (ours, text)
        same = one.startswith(other.removesuffix("...")) if other.endswith("...") else one == other
        found.append(Comparison("transcript", ours, text, same))
    if example.loss is not None:
        loss = float(outputs.loss)
        found.append(Comparison("loss", loss, example.loss, abs(loss - example.loss) <= example.tolerance))
    return found


def _of_outputs(example: Published, output: Float[np.ndarray, "batch ..."]) -> Iterator[Comparison]:
    """Shape, statistics, slices and classes of the last state or the logits."""
    if example.shape:
        shape = output.shape[: len(example.shape)]
        yield Comparison("shape of the output", shape, example.shape, shape == example.shape)
    if example.statistics is not None:
        row, *published = example.statistics
        ours = [float(output[row].mean()), float(output[row].std(ddof=1))]
        close = np.allclose(ours, published, rtol=0, atol=_STATISTICS_TOLERANCE)
        yield Comparison(f"mean and standard deviation of output {row}", ours, published, close)
    for (row, frame, feature), values in example.slices.items():
        theirs = np.array(values)
        ours = output[row, frame : frame + theirs.shape[0], feature : feature + theirs.shape[1]]
        worst = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
        name = f"output {row}, {theirs.size} values from {frame}, {feature} on, largest difference"
        yield Comparison(name, worst, 0.0, worst <= example.tolerance)
    for clip, (index, logit) in enumerate(example.classes):
        ours = int(output[clip].argmax()), float(output[clip].max())
        close = ours[0] == index and abs(ours[1] - logit) <= example.tolerance
        yield Comparison(f"class and logit of clip {clip}", ours, (index, logit), close)


def _recordings(example: Published, files: Path | None) -> list[Float[np.ndarray, "samples"]]:
    if example.dataset is None:
        if files is None:
            wanted = ", ".join([*map(str, example.clips), *([example.features] if example.features else [])])
            raise ValueError(f"name the directory with {wanted} (from the examples of fairseq) with --published-files")
        return [load_audio(files / str(clip)) for clip in example.clips]
    import datasets

    name, configuration, split = example.dataset
    rows = datasets.load_dataset(name, configuration, split=split)
    if "speech" in rows.column_names:
        return [np.asarray(rows[clip]["speech"], np.float32) for clip in example.clips]
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    chosen = rows if isinstance(example.clips[0], int) else {row["id"]: row for row in rows}
    return [load_audio(chosen[clip]["audio"]["bytes"] or chosen[clip]["audio"]["path"]) for clip in example.clips]


def _inputs(
    module: nn.Module, directory: Path, waveforms: Sequence[np.ndarray], normalise: bool | None
) -> dict[str, np.ndarray]:
    import speech_flax

    if module.config.model_type == "hubert":
        kind = speech_flax.Wav2Vec2FeatureExtractor
        extractor = kind.from_pretrained(directory) if normalise is None else kind(do_normalize=normalise)
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
