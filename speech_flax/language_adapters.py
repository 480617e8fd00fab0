"""Adapters of single languages: small layers and a vocabulary that are exchanged within one model.

A file ``adapter.<language>.safetensors`` (or ``.bin``) beside the weights holds the ``adapter_layer`` of every encoder
layer and the ``lm_head``, by their names in Transformers (Pratap et al. 2023, section 4.1).
"""

from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from speech_flax.conversion.matching import match
from speech_flax.conversion.stored_tensor import StoredTensor
from speech_flax.conversion.transformers_directory import read_weights
from speech_flax.conversion.transformers_names import TRANSFORMERS
from speech_flax.conversion.tree import flat, leaf_places, nested, parts
from speech_flax.pretrained import parameter_shapes, pretrained_directory

_SUFFIXES = (".safetensors", ".bin")


def with_language_adapter(
    module: nn.Module, params: PyTree, directory_or_hub_id: str | Path, language: str
) -> tuple[nn.Module, PyTree]:
    """The model with the adapter of ``language``, and a ``vocab_size`` as large as the head in its file.

    Args:
      module: A CTC model whose configuration has an ``adapter_attn_dim``.
      params: Its parameters; all but those of adapter and head are kept.
      directory_or_hub_id: Where ``adapter.<language>.safetensors`` is.
      language: Code of the language, such as ``"deu"``.

    Raises:
      FileNotFoundError: there is no such adapter.
      ValueError: the model has no adapters, or those of the file do not fit.
    """
    if module.config.adapter_attn_dim is None or not module.config.do_stable_layer_norm:
        raise ValueError(
            f"target_lang {language!r} needs a model with adapters: set adapter_attn_dim and do_stable_layer_norm"
        )
    path = _adapter_file(directory_or_hub_id, language)
    tensors = read_weights(path)[0]
    head = tensors.get("lm_head.weight")
    if head is not None:
        module = module.clone(config=module.config.replace(vocab_size=int(head.shape[0])))
    return module, _exchanged(module, params, tensors, path)


def _exchanged(module: nn.Module, params: PyTree, tensors: dict[str, StoredTensor], path: Path) -> PyTree:
    """``params`` with the adapters and the head among ``tensors``, all of which must be there."""
    shapes = parameter_shapes(module)
    matching = match(tensors, TRANSFORMERS, shapes)
    misfits = [*matching.unknown, *matching.unused, *map(str, matching.mismatched)]
    misfits += [str(place) for place in matching.missing if _is_of_language(place.path)]
    misfits += [name for place, (name, _) in matching.sources.items() if not _is_of_language(place.path)]
    if misfits:
        raise ValueError(f"{path} does not hold the adapters of this model: {misfits[0]} does not fit, or is missing")
    leaves = dict(flat(params))
    for name in filter(_is_of_language, shapes):
        leaf = np.empty(shapes[name], np.float32)
        for part, place in zip(parts(name, leaf), leaf_places(name, shapes[name]), strict=True):
            tensor, transform = matching.sources[place]
            part[...] = transform.to_ours(tensors[tensor].read())
        leaves[name] = jnp.asarray(leaf)
    return nested(leaves)


def _is_of_language(path: str) -> bool:
    return "/adapter_layer/" in path or path.startswith("lm_head/")


def _adapter_file(directory_or_hub_id: str | Path, language: str) -> Path:
    names = [f"adapter.{language}{suffix}" for suffix in _SUFFIXES]
    directory = pretrained_directory(directory_or_hub_id)
    for name in names:
        if (directory / name).is_file():
            return directory / name
    if not Path(directory_or_hub_id).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        for name in names:
            try:
                return Path(hf_hub_download(str(directory_or_hub_id), name))
            except (EntryNotFoundError, LocalEntryNotFoundError):
                continue
    raise FileNotFoundError(f"{directory_or_hub_id} has no adapter for {language!r}: there is no {names[0]}")
