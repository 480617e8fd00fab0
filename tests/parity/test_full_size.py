"""HuBERT base and large, and Wav2Vec2-BERT 2.0, in their full size, against the installed Transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers

import speech_flax
from speech_flax.conversion.transformers_names import from_torch_names

#: Of the largest activation: float32 sums of thousands of terms, through 24 layers.
TOLERANCE = 1e-4


def random_model(name: str, fields: dict) -> torch.nn.Module:
    """Initialised as for training, but with norms and biases that are not trivial."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    known = config().to_dict()
    model = getattr(transformers, f"{name}Model")(config(**{key: fields[key] for key in fields if key in known})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "original" not in key and "distance_embedding" not in key:
                parameter *= 2  # the initial weights hardly move the residual stream
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size", "shape", "lengths"),
    [
        ("Hubert", "hubert-base", (2, 48_000), [48_000, 31_111]),
        ("Hubert", "hubert-large", (2, 48_000), [48_000, 31_111]),
        ("Wav2Vec2Bert", "w2v-bert-2.0", (2, 151, 160), [151, 97]),
    ],
)
def test_full_size_model_equals_transformers(family, size, shape, lengths):
    config = getattr(speech_flax, f"{family}Config").named(size)
    model = random_model(family, config.to_dict())
    params = from_torch_names({name: value.numpy() for name, value in model.state_dict().items()})
    inputs = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    module = getattr(speech_flax, f"{family}Model")(config.replace(compatibility="transformers-5"))

    @jax.jit
    def apply(params):
        return module.apply({"params": params}, inputs, mask, output_hidden_states=True)

    ours = apply(params)
    with torch.no_grad():
        theirs = model(torch.tensor(inputs), attention_mask=torch.tensor(mask), output_hidden_states=True)
    pairs = zip((*ours.hidden_states, ours.last_hidden_state), (*theirs.hidden_states, theirs[0]), strict=True)
    for layer, (one, other) in enumerate(pairs):
        other = other.numpy()
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max(), f"state {layer}"
