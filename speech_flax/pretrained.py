"""Models in directories and on the hub: weights in, weights out, in the layout of Transformers."""

import dataclasses
import itertools
import json
import logging
import re
import typing
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import speech_flax
from speech_flax.configuration import CONFIG_FILE, SpeechConfig
from speech_flax.conversion.matching import BASE_NAMES, Matching, match, nearest
from speech_flax.conversion.safetensors_file import write_safetensors
from speech_flax.conversion.stored_tensor import StoredTensor, copy_tensor
from speech_flax.conversion.transformers_directory import SAFETENSORS, WEIGHT_FILES, read_weights, weight_file
from speech_flax.conversion.transformers_names import TRANSFORMERS, transformers_layout
from speech_flax.conversion.tree import flat, leaf_places, nested, parts, tensor_at
from speech_flax.storage import fetched, in_bucket

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_BARE_MODELS = {"hubert": "HubertModel", "wav2vec2-bert": "Wav2Vec2BertModel"}
_MODEL_CLASS = re.compile(r"(Hubert|Wav2Vec2Bert)(Model|For\w+)")
_SMALL_FILES = ("*.json", "*.txt")
#: Parameters that a checkpoint may lack: they start from random values, and are named.
_MAY_BE_NEW = re.compile(
    rf"(({'|'.join(BASE_NAMES)})/)?(masked_spec_embed|adapter/.*|intermediate_ffn/.*|encoder/layers/adapter_layer/.*)"
    r"|(lm_head|projector|classifier|objective|tdnn_\d+)/.*|feature_extractor/(kernel|bias)|layer_weights"
)


def pretrained_directory(directory_or_hub_id: str | Path, *, weights: bool = False) -> Path:
    """The local directory of a model: the one named, or a copy of one in a bucket (``gs://``) or on the hub.

    Files that were downloaded before are used without a network connection; ``HF_HUB_OFFLINE=1`` keeps from trying.

    Args:
      directory_or_hub_id: Local directory, or ``owner/name``.
      weights: Fetch the weights too: safetensors if there are any, else those of PyTorch, else of TensorFlow.

    Raises:
      FileNotFoundError: there is no such directory, and the hub has no such model or cannot be reached.
    """
    if in_bucket(directory_or_hub_id):
        return fetched(str(directory_or_hub_id))
    directory = Path(directory_or_hub_id)
    if directory.is_dir():
        return directory
    name = str(directory_or_hub_id)
    if directory.exists() or not _HUB_ID.fullmatch(name):
        kind = "is a file, not a directory" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"{name} {kind}; give a directory with {CONFIG_FILE}, or the id of a model on the hub")
    return _snapshot(name, weights)


def _snapshot(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=list(_SMALL_FILES)))
        for file in WEIGHT_FILES if weights else ():
            try:
                found = Path(hf_hub_download(hub_id, file))
            except EntryNotFoundError:
                continue  # the best kind of file that is there is enough
            if file.endswith(".json"):
                snapshot_download(hub_id, allow_patterns=[file.removesuffix(".index.json").replace(".", "-*.")])
            return found.parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{hub_id} is no directory here, and cannot be fetched from the hub: {reason}"
        ) from None
    return directory


def load_pretrained(
    model_class: type, directory_or_hub_id: str | Path, *, dtype: Any = jnp.float32, **config_changes: Any
) -> tuple[nn.Module, PyTree]:
    """The module and its parameters in float32; see :meth:`PretrainedModel.from_pretrained`.

    A head that the checkpoint does not have, or has in another size, starts from random values; so do other parts that
    the configuration adds, such as the adapter. Both are named in a warning.

    Raises:
      FileNotFoundError: nothing is there, or the hub cannot be reached.
      ValueError: the files are damaged, or of another model.
    """
    directory = pretrained_directory(directory_or_hub_id, weights=True)
    attributes = {field.name for field in dataclasses.fields(model_class)} - {"config", "dtype", "parent", "name"}
    settings = {name: config_changes.pop(name) for name in attributes & set(config_changes)}
    config_class = typing.get_type_hints(model_class)["config"]
    config = config_class.from_pretrained(directory, **config_changes)
    module = model_class(config, dtype=jnp.dtype(dtype), **settings)
    tensors, table = read_weights(weight_file(directory))
    shapes = parameter_shapes(module)
    matching = match(tensors, table, shapes)
    _refuse_misfits(matching, directory)
    _name_new_parts(matching, directory)
    return module, fill(module, shapes, tensors, matching)


def _refuse_misfits(matching: Matching, directory: Path) -> None:
    """Raise for tensors that nothing knows, and for parts that must be there and are not."""
    wrong = [
        f"{place} has the shape {list(ours)} there and {list(wanted)} here"
        for place, (_, ours, wanted) in matching.mismatched.items()
        if not _MAY_BE_NEW.fullmatch(place.path)
    ]
    absent = [str(place) for place in matching.missing if not _MAY_BE_NEW.fullmatch(place.path)]
    names = [*matching.unknown, *matching.unused]
    if absent:
        wrong.append(f"{len(absent)} parameters are missing, the first is {absent[0]}{nearest(absent[0], names)}")
    if matching.unknown:
        name = next(iter(matching.unknown))
        known = [name for name, _ in matching.sources.values()]
        wrong.append(
            f"{len(matching.unknown)} tensors belong to no model of this library, the first is {name!r}"
            f"{nearest(name, known)}"
        )
    if wrong:
        raise ValueError(f"{directory} does not hold this model: {'; '.join(wrong[:5])}")


def _name_new_parts(matching: Matching, directory: Path) -> None:
    """Say what starts from random values, and what of the checkpoint is left out."""
    new = sorted({place.path for place in matching.missing})
    if new:
        logger.warning("%s has no values for %s: they are random until trained", directory, ", ".join(new))
    for place, (name, ours, wanted) in matching.mismatched.items():
        logger.warning(
            "%s has %r with the shape %s where this model has %s: %s is random until trained",
            directory, name, list(ours), list(wanted), place,
        )  # fmt: skip
    unused = sorted(name for name in matching.unused if not name.endswith("masked_spec_embed"))
    if unused:
        logger.warning("%s: this model has no place for %s, which are left out", directory, ", ".join(unused))


@lru_cache(maxsize=8)
def parameter_shapes(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter of ``module`` by path; nothing is computed."""
    abstract = jax.eval_shape(partial(module.init, jax.random.key(0)), example_input(module.config))
    return MappingProxyType({path: tuple(leaf.shape) for path, leaf in flat(abstract["params"]).items()})


def example_input(config: SpeechConfig) -> np.ndarray:
    """The shortest input that every model with this configuration can work on: features or samples of one utterance."""
    frames = 1 + sum((width - 1) * gap for width, gap in zip(*_context(config), strict=True))
    if config.model_type == "hubert":
        for width, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
            frames = (frames - 1) * stride + width
        return np.zeros((1, frames), np.float32)
    shortened = config.adapter_stride**config.num_adapter_layers if config.add_adapter else 1
    return np.zeros((1, frames * shortened, config.feature_projection_input_dim), np.float32)


def _context(config: SpeechConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and dilations of the time-delay layers of the speaker model, which needs the most frames."""
    return getattr(config, "tdnn_kernel", ()), getattr(config, "tdnn_dilation", ())


def fill(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, StoredTensor],
    matching: Matching,
) -> PyTree:
    """Parameters in float32: each from its tensor, or from the initialiser if it has none."""
    leaves, new = {}, []
    for path, shape in shapes.items():
        sources = [matching.sources.get(place) for place in leaf_places(path, shape)]
        if None in sources:
            new.append(path)
            continue
        leaf = np.empty(shape, np.float32)
        for part, (name, transform) in zip(parts(path, leaf), sources, strict=True):
            copy_tensor(transform.to_ours(tensors[name].read()), part)
        leaves[path] = jnp.asarray(leaf)
    return nested(leaves | initial_leaves(module, new))


def initial_leaves(module: nn.Module, paths: Iterable[str]) -> dict[str, jax.Array]:
    """Random values for the leaves at ``paths``; the compiler leaves out the computation of all others."""
    paths = tuple(paths)
    if not paths:
        return {}

    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        leaves = flat(module.init(key, jnp.asarray(example_input(module.config)))["params"])
        return {path: leaves[path] for path in paths}

    return jax.jit(initialise)(jax.random.key(0))


def save_pretrained(directory: str | Path, module: nn.Module, params: PyTree) -> None:
    """Write ``config.json`` and ``model.safetensors``, as Transformers reads them, into ``directory``.

    The directory is made if it does not exist. The weights appear when they are complete.

    Raises:
      ValueError: ``params`` has a parameter that Transformers does not know.
    """
    directory = Path(directory)
    config = module.config.replace(architectures=(type(module).__name__,))
    fields = dict(config.additional_fields) | {"torch_dtype": json.dumps("float32")}
    fields.pop("dtype", None)  # what Transformers 5 calls torch_dtype
    dataclasses.replace(config, additional_fields=tuple(sorted(fields.items()))).save_pretrained(directory)
    shapes = {path: tuple(leaf.shape) for path, leaf in flat(params).items()}
    names = transformers_layout(shapes)
    layout = {name: (shape, np.dtype(np.float32)) for name, (_, _, shape) in names.items()}
    constants = TRANSFORMERS.constants_of(names)
    layout |= {name: (value.shape, value.dtype) for name, value in constants.items()}
    tensors = (transform.to_theirs(tensor_at(params, place)) for place, transform, _ in names.values())
    incomplete = directory / f".{SAFETENSORS}.incomplete"
    try:
        write_safetensors(incomplete, layout, itertools.chain(tensors, constants.values()), {"format": "pt"})
        incomplete.replace(directory / SAFETENSORS)
    finally:
        incomplete.unlink(missing_ok=True)


class AutoModel:
    """Loads a model as the class that its own ``config.json`` names."""

    @staticmethod
    def from_pretrained(directory_or_hub_id: str | Path, **options: Any) -> tuple[nn.Module, PyTree]:
        """The module and its parameters; arguments are those of :meth:`PretrainedModel.from_pretrained`.

        Raises:
          FileNotFoundError: nothing is there, or the hub cannot be reached.
          ValueError: the model is of no class of this library, or its files are damaged.
        """
        directory = pretrained_directory(directory_or_hub_id, weights=True)
        return model_class(directory).from_pretrained(directory, **options)


def model_class(directory: Path) -> type:
    """The class that ``architectures`` in ``config.json`` names, or the bare model of that ``model_type``.

    Raises:
      FileNotFoundError: there is no ``config.json``.
      ValueError: it names no class of this library.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        architecture = (fields.get("architectures") or [_BARE_MODELS.get(fields.get("model_type"))])[0]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path} is no configuration of a model") from None
    name = str(architecture).removeprefix("TF")
    known = [name for name in speech_flax.__all__ if _MODEL_CLASS.fullmatch(name)]
    if name not in known:
        raise ValueError(f"{path} names the architecture {architecture!r}; known are {', '.join(known)}")
    return getattr(speech_flax, name)
