"""Directories in the layout of Transformers: which files hold the tensors, and reading them."""

import json
from pathlib import Path

from speech_flax.conversion.hdf5_file import read_hdf5
from speech_flax.conversion.rules import NameTable
from speech_flax.conversion.safetensors_file import read_safetensors
from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor
from speech_flax.conversion.tensorflow_names import TENSORFLOW
from speech_flax.conversion.torch_file import read_torch_file
from speech_flax.conversion.transformers_names import TRANSFORMERS

SAFETENSORS = "model.safetensors"
TORCH_BINARY = "pytorch_model.bin"
TENSORFLOW_FILE = "tf_model.h5"
_INDEX = ".index.json"
#: What may hold the weights, the best first.
WEIGHT_FILES = (SAFETENSORS, SAFETENSORS + _INDEX, TORCH_BINARY, TORCH_BINARY + _INDEX, TENSORFLOW_FILE)
#: Files that belong to the processor, and language adapters.
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "adapter.*.safetensors",
    "adapter.*.bin",
)


def processor_files(directory: Path) -> list[Path]:
    """The files in ``directory`` that go with the weights: those of the processor, and language adapters."""
    return [file for pattern in _PROCESSOR_FILES for file in sorted(directory.glob(pattern))]


def weight_file(directory: Path) -> Path:
    """The file in ``directory`` that holds the weights, or lists the files that do.

    Raises:
      FileNotFoundError: there is none.
    """
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory} holds no weights: none of {', '.join(WEIGHT_FILES)} is there")


def read_weights(path: Path) -> tuple[dict[str, StoredTensor], NameTable]:
    """The tensors in the file at ``path``, or in the shards that it lists, by name, and the rules of these names.

    Raises:
      CheckpointFileError: a file is damaged, or an index names files outside of its directory or tensors that are not
        where it says.
      FileNotFoundError: a shard is missing.
    """
    if path.suffix == ".h5":
        return read_hdf5(path), TENSORFLOW
    return _read_shards(path) if path.name.endswith(_INDEX) else _read_file(path), TRANSFORMERS


def _read_file(path: Path) -> dict[str, StoredTensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    by_shard: dict[str, set[str]] = {}
    for name, shard in read_index(index).items():
        by_shard.setdefault(shard, set()).add(name)
    for shard, names in by_shard.items():
        path = index.parent / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, but {index} lists it")
        found = _read_file(path)
        if set(found) != names:
            name = sorted(set(found) ^ names)[0]
            where = "is not in it" if name in names else "is in it without being listed"
            raise CheckpointFileError(f"{index} does not fit {path}: {name!r} {where}")
        tensors |= found
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """File name by tensor name, as a ``*.index.json`` has it.

    Raises:
      CheckpointFileError: it is damaged, or names a file that is not beside it.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointFileError(f"{index} is not valid JSON") from None
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointFileError(f"{index} has no weight_map from tensors to files")
    for file in files.values():
        if Path(file).name != file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointFileError(f"{index} names the file {file!r}, which is not a weight file beside it")
    return files
