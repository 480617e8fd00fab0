"""What is converted: a file or directory of any known format, recognised by what it holds."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speech_flax.configuration import CONFIG_FILE, HubertConfig, SpeechConfig, Wav2Vec2BertConfig
from speech_flax.conversion.fairseq_names import FINE_TUNED, fairseq_table
from speech_flax.conversion.inference import fairseq_settings
from speech_flax.conversion.orbax_directory import is_orbax_directory, read_orbax_directory
from speech_flax.conversion.rules import NameTable
from speech_flax.conversion.s3prl_names import S3PRL
from speech_flax.conversion.safetensors_file import read_safetensors
from speech_flax.conversion.seamless_names import FAIRSEQ2, SEAMLESS
from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor
from speech_flax.conversion.tensorflow_names import TENSORFLOW
from speech_flax.conversion.torch_file import load_torch_file, plain, stored_tensors
from speech_flax.conversion.transformers_directory import WEIGHT_FILES, processor_files, read_weights, weight_file
from speech_flax.conversion.transformers_names import TRANSFORMERS
from speech_flax.conversion.tree import OURS

_CONFIG_CLASSES = {config.model_type: config for config in (HubertConfig, Wav2Vec2BertConfig)}
_PICKLES = (b"PK\x03\x04", b"\x80")
_HDF5 = b"\x89HDF"


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, opened; its tensors have not been read yet.

    Attributes:
      path: File or directory.
      format: What it was recognised as, for people.
      tensors: By the names of that format.
      table: The rules of that format.
      config: Configuration, if the checkpoint carries one, or has one beside it.
      settings: Fields of the configuration that it states otherwise.
      vocabulary: Symbols in the order of their ids, if it carries a dictionary of its own.
      directory: The directory that holds its processor, if it is or lies in one of Transformers' layout.
    """

    path: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    table: NameTable
    config: SpeechConfig | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vocabulary: tuple[str, ...] | None = None
    directory: Path | None = None

    @property
    def is_pretrained_directory(self) -> bool:
        """Whether Transformers' PyTorch models read just these tensors when they load ``directory``."""
        if self.directory is None or self.config is None or self.table is not TRANSFORMERS:
            return False
        is_its_file = self.path.name in WEIGHT_FILES and self.path == weight_file(self.directory)
        return self.path == self.directory or is_its_file


def open_source(path: Path, base: Path | None = None) -> Source:
    """Open the checkpoint at ``path`` and find out what it is.

    Args:
      path: File, or directory.
      base: The model below the head that a file of s3prl holds.

    Raises:
      FileNotFoundError: there is nothing.
      CheckpointFileError: it is damaged, or of no known format.
    """
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file, a directory or the id of a model on the hub")
    with path.open("rb") as file:
        beginning = file.read(64)
    if beginning.startswith(b"version https://git-lfs"):
        raise CheckpointFileError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull")
    if beginning.startswith(_PICKLES) and beginning[8:9] != b"{":  # with which the header of safetensors begins
        return _with_neighbours(_open_torch_file(path, base))
    if beginning.startswith(_HDF5):
        tensors, table = read_weights(path)
        return _with_neighbours(Source(path, "TensorFlow weights of Transformers", tensors, table))
    return _with_neighbours(_by_names(path, read_safetensors(path), {}))


def _with_neighbours(source: Source) -> Source:
    """A file of Transformers' names with the configuration and the processor that lie beside it, if any do."""
    directory = source.path.parent
    config = _read_config(directory) if source.table is TRANSFORMERS or source.table is TENSORFLOW else None
    if config is None:
        return source
    neighbours = [CONFIG_FILE, *(file.name for file in processor_files(directory))]
    form = f"{source.format}, with {', '.join(neighbours)} beside them"
    return dataclasses.replace(source, format=form, config=config, directory=directory)


def _open_directory(path: Path) -> Source:
    config = _read_config(path)
    if is_orbax_directory(path):
        if config is None:
            raise CheckpointFileError(f"{path} holds an orbax checkpoint, but no {CONFIG_FILE} beside it")
        tensors = read_orbax_directory(path)
        return Source(path, "orbax checkpoint of this library", tensors, OURS, config, directory=path)
    file = weight_file(path)
    tensors, table = read_weights(file)
    if config is None:
        return dataclasses.replace(_by_names(path, tensors, {}), table=table, directory=path)
    return Source(path, f"Transformers directory ({file.name})", tensors, table, config, directory=path)


def _read_config(directory: Path) -> SpeechConfig | None:
    path = directory / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointFileError(f"{path} is no configuration of a model") from None
    if model_type not in _CONFIG_CLASSES:
        known = ", ".join(map(repr, _CONFIG_CLASSES))
        raise CheckpointFileError(f"{path} describes a model of type {model_type!r}; known are {known}")
    try:
        return _CONFIG_CLASSES[model_type].from_pretrained(directory)
    except (TypeError, ValueError) as error:
        raise CheckpointFileError(f"{path}: {error}") from None


def _open_torch_file(path: Path, base: Path | None) -> Source:
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointFileError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
    if "Downstream" in content:
        return _s3prl_source(path, content, base)
    weights = content.get("model", content.get("state_dict", content))
    tensors = stored_tensors(weights) if isinstance(weights, dict) else {}
    if not tensors:
        raise CheckpointFileError(f"{path} holds no tensors; its entries are {', '.join(map(str, list(content)[:8]))}")
    return _by_names(path, tensors, content)


def _by_names(path: Path, tensors: Mapping[str, StoredTensor], content: Mapping[str, Any]) -> Source:
    """The format by the names of the tensors; ``content`` is what surrounds them in a file of PyTorch."""

    def has(*parts: str) -> bool:
        return any(part in name for name in tensors for part in parts)

    if has("encoder_frontend.model_dim_proj"):
        return Source(path, "w2v-BERT 2.0 of fairseq2", tensors, FAIRSEQ2, settings=_W2V_BERT_SETTINGS)
    if has("self_attn.rel_k_embedding"):
        return Source(path, "w2v-BERT 2.0 as released (Seamless)", tensors, SEAMLESS, settings=_W2V_BERT_SETTINGS)
    if has("post_extract_proj.weight") and has("encoder.pos_conv."):
        kind = "fine-tuned with CTC" if has(FINE_TUNED) else "pre-trained"
        settings = fairseq_settings(_fairseq_model_settings(content))
        vocabulary = _fairseq_vocabulary(content) if has(FINE_TUNED) else None
        table = fairseq_table(tensors)
        return Source(path, f"HuBERT of fairseq, {kind}", tensors, table, settings=settings, vocabulary=vocabulary)
    if has("feature_projection.projection.weight"):
        return Source(path, "Transformers weights", tensors, TRANSFORMERS)
    shown = ", ".join(list(tensors)[:5])
    raise CheckpointFileError(f"{path} is of no known format; its tensors are called {shown}, ...")


#: As the released model was configured: SpecAugment off.
_W2V_BERT_SETTINGS = {"apply_spec_augment": False}


def _fairseq_model_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the encoder: newer files have ``cfg``, older ones ``args``; a fine-tuned model's are nested."""
    cfg, args = plain(content.get("cfg")), plain(content.get("args"))
    settings = (cfg.get("model") if isinstance(cfg, dict) else None) or args
    if not isinstance(settings, dict):
        return {}
    nested = settings.get("w2v_args")
    if isinstance(nested, dict):
        settings = nested.get("model") or nested
    return settings if isinstance(settings, dict) else {}


def _fairseq_vocabulary(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Symbols of the target dictionary by id. fairseq's first symbol ``<s>`` is the blank of CTC, which Transformers
    calls ``<pad>``; the two change their names here."""
    state = plain(content.get("task_state"))
    dictionary = state.get("target_dictionary") if isinstance(state, dict) else None
    symbols = dictionary.get("symbols") if isinstance(dictionary, dict) else None
    if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        return None
    renamed = {"<s>": "<pad>", "<pad>": "<s>"}
    return tuple(renamed.get(symbol, symbol) for symbol in symbols)


def _s3prl_source(path: Path, content: Mapping[str, Any], base: Path | None) -> Source:
    parts = ((part, content.get(part)) for part in ("Featurizer", "Downstream"))
    weights = {
        f"{part}.{name}": one for part, entries in parts if isinstance(entries, dict) for name, one in entries.items()
    }
    if base is None:
        raise ValueError(f"{path} holds a head of s3prl alone; name the model below it with --base")
    below = open_source(base)
    tensors = {name: one for name, one in below.tensors.items() if not _belongs_to_head(below.table, name)}
    head = stored_tensors(weights)
    settings = {"use_weighted_layer_sum": "Featurizer.weights" in head}
    if "Downstream.projector.weight" in head:
        settings["classifier_proj_size"] = head["Downstream.projector.weight"].shape[0]
    if "Downstream.model.post_net.linear.weight" in head:
        settings["num_labels"] = head["Downstream.model.post_net.linear.weight"].shape[0]
    config = below.config
    if config is not None:
        config = config.replace(**settings, architectures=(f"{_family(config)}ForSequenceClassification",))
    table = dataclasses.replace(below.table, rules=(*S3PRL.rules, *below.table.rules))
    return Source(
        path, f"head of s3prl on {below.format}", tensors | head, table, config, {**below.settings, **settings}
    )


def _belongs_to_head(table: NameTable, name: str) -> bool:
    found = table.place(name)
    return found is not None and found[0].path.split("/")[0] in ("lm_head", "projector", "classifier", "layer_weights")


def _family(config: SpeechConfig) -> str:
    return "Hubert" if isinstance(config, HubertConfig) else "Wav2Vec2Bert"
