"""HuBERT base and large in their full size, against the installed Transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers

import speech_flax
from speech_flax.conversion.transformers_names import from_torch_names

#: Of the largest activation: float32 sums of thousands of terms, through 24 layers.
TOLERANCE = 1e-4


def random_model(config: transformers.HubertConfig) -> torch.nn.Module:
    """Initialised as for training, but with norms and biases that are not trivial."""
    torch.manual_seed(0)
    model = transformers.HubertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "original" not in name:
                parameter *= 2  # the initial weights hardly move the residual stream
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hubert-base", "hubert-large"])
def test_full_size_model_equals_transformers(name):
    config = speech_flax.HubertConfig.named(name)
    fields = {
        field: value for field, value in config.to_dict().items() if field in transformers.HubertConfig().to_dict()
    }
    model = random_model(transformers.HubertConfig(**fields))
    params = from_torch_names({name: value.numpy() for name, value in model.state_dict().items()})
    lengths = np.array([48_000, 31_111])
    waveforms = np.random.RandomState(0).standard_normal((2, 48_000)).astype(np.float32)
    mask = np.arange(48_000) < lengths[:, None]
    module = speech_flax.HubertModel(config.replace(compatibility="transformers-5"))

    @jax.jit
    def apply(params):
        return module.apply({"params": params}, waveforms, mask, output_hidden_states=True)

    ours = apply(params)
    with torch.no_grad():
        theirs = model(torch.tensor(waveforms), attention_mask=torch.tensor(mask), output_hidden_states=True)
    pairs = zip((*ours.hidden_states, ours.last_hidden_state), (*theirs.hidden_states, theirs[0]), strict=True)
    for layer, (one, other) in enumerate(pairs):
        other = other.numpy()
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max(), f"state {layer}"
