"""From a checkpoint to a directory in Transformers' layout, or to an orbax checkpoint, one tensor at a time."""

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

import speech_flax
from speech_flax.configuration import HubertConfig, SpeechConfig
from speech_flax.conversion.inference import infer_config
from speech_flax.conversion.interruption import uninterrupted
from speech_flax.conversion.matching import BASE_NAMES, Matching, match, nearest
from speech_flax.conversion.orbax_directory import write_orbax_directory
from speech_flax.conversion.rules import NameTable, Place
from speech_flax.conversion.safetensors_file import write_safetensors
from speech_flax.conversion.source import Source
from speech_flax.conversion.stored_tensor import StoredTensor, copy_tensor
from speech_flax.conversion.transformers_directory import SAFETENSORS, processor_files
from speech_flax.conversion.transformers_names import TRANSFORMERS, transformers_layout
from speech_flax.conversion.tree import leaf_places, nested, parts
from speech_flax.pretrained import initial_leaves, parameter_shapes


class ConversionError(ValueError):
    """What does not fit, one line each."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion of which every tensor has been accounted for.

    Attributes:
      source: The checkpoint.
      module: The model.
      shapes: Shape of every parameter by path.
      matching: Where each comes from.
      remarks: What was left out, for people.
      assumptions: What the source does not say and was taken to be as usual, for people.
    """

    source: Source
    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    matching: Matching
    remarks: tuple[str, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def config(self) -> SpeechConfig:
        return self.module.config

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


def plan(source: Source) -> Plan:
    """Find the model that ``source`` is a checkpoint of, and a place for every tensor.

    Raises:
      ConversionError: a tensor that is neither used nor known to be of no use, or a parameter without a tensor; the
        message lists all of them.
    """
    found = _our_shapes(source)
    assumptions: list[str] = []
    config = source.config
    if config is None:
        without_base = {_without_base(path): shape for path, shape in found.items()}
        try:
            config, assumptions = infer_config(without_base, source.settings)
        except (TypeError, ValueError) as error:
            raise ConversionError(f"{source.path}: the configuration cannot be inferred: {error}") from None
    name = _architecture(config, found)
    if not hasattr(speech_flax, name):
        raise ConversionError(f"{source.path} is a {name}, which this library does not have")
    try:
        config = config.replace(architectures=(name,))
        module = getattr(speech_flax, name)(config)
        shapes = parameter_shapes(module)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{source.path}: {error}") from None
    try:
        matching = match(source.tensors, source.table, shapes)
    except ValueError as error:
        raise ConversionError(f"{source.path}: {error}") from None
    problems = list(_problems(matching, source.table))
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConversionError(
            f"{source.path} does not fit a {name} of this configuration, nothing was written:{listed}"
        )
    return Plan(source, module, shapes, matching, tuple(_remarks(source, name, matching)), tuple(assumptions))


def _our_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Shape by our path of everything that the table knows, encoder layers stacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers: dict[str, int] = {}
    for name, tensor in source.tensors.items():
        located = None if source.table.drops(name) else source.table.place(name)
        if located is not None:
            place, transform = located
            shapes[place.path] = transform.our_shape(tensor.shape)
            if place.layer is not None:
                layers[place.path] = max(layers.get(place.path, 0), place.layer + 1)
    return {path: (layers[path], *shape) if path in layers else shape for path, shape in shapes.items()}


def _without_base(path: str) -> str:
    first, _, rest = path.partition("/")
    return rest if first in BASE_NAMES else path


def _architecture(config: SpeechConfig, found: Mapping[str, tuple[int, ...]]) -> str:
    """The class that the configuration names, or that the tensors of the head belong to."""
    if config.architectures:
        return config.architectures[0].removeprefix("TF")
    heads = {path.split("/")[0] for path in found if not path.startswith(BASE_NAMES)}
    family = "Hubert" if isinstance(config, HubertConfig) else "Wav2Vec2Bert"
    if "lm_head" in heads:
        return f"{family}ForCTC"
    if "objective" in heads:
        return f"{family}ForXVector"
    if "projector" in heads:
        return f"{family}ForSequenceClassification"
    return f"{family}ForAudioFrameClassification" if "classifier" in heads else f"{family}Model"


def _is_mask_embedding(name: str) -> bool:
    return name.split("/")[-1].split(".")[-1] in ("masked_spec_embed", "mask_emb", "temporal_mask_embed")


def _problems(matching: Matching, table: NameTable) -> Iterator[str]:
    """One line for every tensor and parameter that does not fit, with the nearest name on the other side."""
    left_over = [*matching.unknown, *matching.unused]
    wanted = {str(place): (table.name(place) or (str(place), None))[0] for place in matching.missing}
    for name, shape in matching.unknown.items():
        yield f"{name} {list(shape)} is known to no rule of this format{nearest(name, list(wanted.values()))}"
    for name, shape in matching.unused.items():
        if not _is_mask_embedding(name):
            yield f"{name} {list(shape)} has no place in this model{nearest(name, list(wanted.values()))}"
    for place, (name, ours, expected) in matching.mismatched.items():
        yield f"{name} has the shape {list(ours)} (as laid out here), {place} needs {list(expected)}"
    for place, name in wanted.items():
        if not _is_mask_embedding(place):
            called = "" if name == place else f"; it would be called {name}"
            yield f"{place} is filled by nothing{called}{nearest(name, left_over)}"


def _remarks(source: Source, architecture: str, matching: Matching) -> Iterator[str]:
    if architecture.endswith("ForCTC") and not _has_vocabulary(source):
        yield "there is no tokenizer: nothing says which symbols the ids of this CTC model stand for"
    if matching.dropped:
        yield f"left out, because nothing here uses them: {', '.join(matching.dropped)}"
    for name in matching.unused:
        yield f"left out: {name}, because SpecAugment is off in this configuration"
    for place in matching.missing:
        yield f"{place} is not in the file and starts from random values; only SpecAugment uses it"


def _has_vocabulary(source: Source) -> bool:
    beside = source.directory is not None and (source.directory / "vocab.json").is_file()
    return beside or source.vocabulary is not None


def convert(plan: Plan, destination: Path, kind: str = "torch") -> None:
    """Write ``destination``, which appears when it is complete.

    Args:
      plan: What to convert.
      destination: A directory that does not exist yet, or is empty.
      kind: ``"torch"`` for Transformers' layout, ``"orbax"`` for an orbax checkpoint of our parameters.

    Raises:
      FileExistsError: there is something already.
      CheckpointFileError: the source turns out to be damaged.
      KeyboardInterrupt: a signal asked the program to end; it is heeded between two tensors.
    """
    with uninterrupted() as check, _appearing(destination) as directory:
        write = _write_orbax if kind == "orbax" else _write_transformers
        write(plan, directory, check)
        _saved_config(plan).save_pretrained(directory)
        _write_processor(plan, directory)
        check()


@contextlib.contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """A directory beside ``destination`` that takes its name in the end, or vanishes if anything goes wrong."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already; choose another destination or remove it")
    destination = destination.resolve()
    new_parents = [parent for parent in destination.parents if not parent.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".incomplete", dir=destination.parent))
    try:
        yield aside
        aside.chmod(0o755)
        aside.replace(destination)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else put something there
            for parent in new_parents:
                parent.rmdir()
        raise


def _new_leaves(plan: Plan) -> dict[str, np.ndarray]:
    paths = {place.path for place in plan.matching.missing}
    return {path: np.asarray(leaf) for path, leaf in initial_leaves(plan.module, paths).items()}


def _read(plan: Plan, place: Place, new: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tensor at ``place`` as laid out here."""
    if place.path in new:
        return new[place.path]
    name, transform = plan.matching.sources[place]
    return transform.to_ours(plan.source.tensors[name].read())


def _dtype(plan: Plan, place: Place) -> np.dtype:
    """The type as stored in the source; that of the others for a tensor that is new."""
    source = plan.matching.sources.get(place)
    return _common_dtype(plan) if source is None else plan.source.tensors[source[0]].dtype


def _leaf_dtype(plan: Plan, path: str) -> np.dtype:
    """The narrowest type that holds the values of every layer stacked in a leaf."""
    types = {_dtype(plan, place) for place in leaf_places(path, plan.shapes[path])}
    return np.dtype(functools.reduce(jnp.promote_types, types))


def widened_leaves(plan: Plan) -> list[str]:
    """Paths of the leaves that stack encoder layers of different types: ``"orbax"`` has one type for all of them."""
    return [
        path
        for path, shape in plan.shapes.items()
        if any(_dtype(plan, place) != _leaf_dtype(plan, path) for place in leaf_places(path, shape))
    ]


def _common_dtype(plan: Plan) -> np.dtype:
    first = next(iter(plan.matching.sources.values()))
    return plan.source.tensors[first[0]].dtype


def _write_transformers(plan: Plan, directory: Path, check: Callable[[], None]) -> None:
    new = _new_leaves(plan)
    names = transformers_layout(plan.shapes)
    constants = TRANSFORMERS.constants_of(names)
    layout: dict[str, tuple[Sequence[int], np.dtype]] = {
        name: (shape, _dtype(plan, place)) for name, (place, _, shape) in names.items()
    }
    layout |= {name: (value.shape, value.dtype) for name, value in constants.items()}
    with _progress_bar(plan) as bar:

        def tensors() -> Iterator[np.ndarray]:
            for place, transform, _ in names.values():
                check()
                tensor = transform.to_theirs(_read(plan, place, new))
                yield tensor
                bar.update(tensor.nbytes)
            yield from constants.values()

        write_safetensors(directory / SAFETENSORS, layout, tensors(), {"format": "pt"})


def _write_orbax(plan: Plan, directory: Path, check: Callable[[], None]) -> None:
    with _progress_bar(plan) as bar:

        def counted(leaf: StoredTensor) -> np.ndarray:
            check()  # orbax's threads have nothing in hand at this moment
            value = leaf.read()
            bar.update(value.nbytes)
            return value

        leaves = _leaves(plan)
        counting = {
            path: dataclasses.replace(leaf, read=functools.partial(counted, leaf)) for path, leaf in leaves.items()
        }
        write_orbax_directory(directory, counting)


def _progress_bar(plan: Plan) -> tqdm:
    """Counts the bytes of all parameters; seen on a terminal alone."""
    total = sum(leaf.nbytes for leaf in _leaves(plan).values())
    return tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None, leave=False)


def parameters(plan: Plan) -> PyTree:
    """The whole tree in float32, on the host."""
    return nested({path: leaf.read().astype(np.float32, copy=False) for path, leaf in _leaves(plan).items()})


def _leaves(plan: Plan) -> dict[str, StoredTensor]:
    """Every leaf by path, encoder layers stacked, in the types of the source; read when asked for."""
    new = _new_leaves(plan)

    def read(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        leaf = np.empty(shape, dtype)
        for place, part in zip(leaf_places(path, shape), parts(path, leaf), strict=True):
            copy_tensor(_read(plan, place, new), part)
        return leaf

    types = {path: _leaf_dtype(plan, path) for path in plan.shapes}
    return {
        path: StoredTensor(shape, types[path], functools.partial(read, path, shape, types[path]))
        for path, shape in plan.shapes.items()
    }


def _saved_config(plan: Plan) -> SpeechConfig:
    """The configuration with the type of the weights, as Transformers notes it."""
    fields = dict(plan.config.additional_fields) | {"torch_dtype": json.dumps(_common_dtype(plan).name)}
    fields.pop("dtype", None)
    return dataclasses.replace(plan.config, additional_fields=tuple(sorted(fields.items())))


def _write_processor(plan: Plan, directory: Path) -> None:
    """Copy the processor of a directory, or make the one that a file calls for."""
    if plan.source.directory is not None:
        for file in processor_files(plan.source.directory):
            shutil.copyfile(file, directory / file.name)
        return
    if isinstance(plan.config, HubertConfig):
        _hubert_processor(plan, directory)
    else:
        from speech_flax.audio.feature_extraction import SeamlessM4TFeatureExtractor
        from speech_flax.conversion.reference import default_extractor

        SeamlessM4TFeatureExtractor(padding_value=1.0, **default_extractor(plan.config)).save_pretrained(directory)


def _hubert_processor(plan: Plan, directory: Path) -> None:
    """The published conversions normalise every utterance, and use masks where convolutions have layer norm."""
    extractor = {
        "do_normalize": "s3prl" not in plan.source.format,
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": plan.config.feat_extract_norm == "layer" or "s3prl" in plan.source.format,
        "sampling_rate": 16_000,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(extractor, indent=2) + "\n", encoding="utf-8")
    if plan.source.vocabulary is not None:
        from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer

        ids = {symbol: index for index, symbol in enumerate(plan.source.vocabulary)}
        tokenizer = Wav2Vec2CTCTokenizer(ids, pad_token="<pad>")
        tokenizer.save_pretrained(directory, processor_class="Wav2Vec2Processor")
