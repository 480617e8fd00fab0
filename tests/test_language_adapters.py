"""Adapters of a language against Transformers, which loads them for Wav2Vec2 alone: the same layers as HuBERT's."""

import jax
import numpy as np
import pytest
import torch
import transformers
from parity.variant import TINY, random_weight
from safetensors.torch import save_file

from speech_flax import HubertConfig, HubertForCTC
from speech_flax.language_adapters import with_language_adapter

FIELDS = TINY["Hubert"] | {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "adapter_attn_dim": 5}


@pytest.fixture(scope="module")
def model():
    """The reference, all of its parameters drawn by name."""
    model = transformers.HubertForCTC(transformers.HubertConfig(**FIELDS)).eval()
    state = model.state_dict()
    model.load_state_dict(
        {name: torch.tensor(random_weight(name, tuple(value.shape))) for name, value in state.items()}
    )
    return model


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    """A model with adapters for two languages of 7 and 9 symbols."""
    path = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(path)
    for language, symbols in (("deu", 7), ("khm", 9)):
        save_file(adapter(model, language, symbols), path / f"adapter.{language}.safetensors")
    return path


def adapter(model, language, symbols):
    """What belongs to a language, by name."""
    names = [name for name in model.state_dict() if "adapter_layer" in name]
    shapes = {name: tuple(model.state_dict()[name].shape) for name in names}
    shapes |= {"lm_head.weight": (symbols, 12), "lm_head.bias": (symbols,)}
    return {name: torch.tensor(random_weight(language + name, shape)) for name, shape in shapes.items()}


def logits(module, params, waveforms):
    return jax.jit(lambda params: module.apply({"params": params}, waveforms).logits)(params)


@pytest.mark.parametrize("language, symbols", [("deu", 7), ("khm", 9)])
def test_target_lang_loads_adapters_and_head(model, directory, language, symbols):
    module, params = HubertForCTC.from_pretrained(directory, target_lang=language)
    assert module.config.vocab_size == symbols
    waveforms = np.random.RandomState(0).standard_normal((1, 150)).astype(np.float32)
    reference = transformers.HubertForCTC(transformers.HubertConfig(**FIELDS | {"vocab_size": symbols})).eval()
    reference.load_state_dict(model.state_dict() | adapter(model, language, symbols))
    expected = reference(torch.tensor(waveforms)).logits.detach().numpy()
    np.testing.assert_allclose(logits(module, params, waveforms), expected, atol=1e-4)


def test_mistakes_are_explained(model, directory, tmp_path):
    module, params = HubertForCTC.from_pretrained(directory)
    with pytest.raises(FileNotFoundError, match=r"no adapter for 'eng': there is no adapter\.eng\.safetensors"):
        with_language_adapter(module, params, directory, "eng")
    incomplete = adapter(model, "deu", 7)
    del incomplete["hubert.encoder.layers.1.adapter_layer.norm.bias"]
    save_file(incomplete, tmp_path / "adapter.deu.safetensors")
    with pytest.raises(ValueError, match=r"adapter_layer/norm/bias\[1\] does not fit, or is missing"):
        with_language_adapter(module, params, tmp_path, "deu")
    with pytest.raises(ValueError, match="needs a model with adapters"):
        with_language_adapter(HubertForCTC(HubertConfig()), {}, directory, "deu")
