"""Layer by layer, from the bottom up: the first of these that fails is the place of an error."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import speech_flax
from speech_flax.conversion.transformers_names import from_torch_names
from speech_flax.conversion.tree import flat, is_stacked
from speech_flax.layers.adapter import AdapterLayer
from speech_flax.layers.attention import SelfAttention
from speech_flax.layers.conformer import ConformerLayer, ConvolutionModule
from speech_flax.layers.feature_encoder import ConvolutionLayer
from speech_flax.layers.feed_forward import FeedForward
from speech_flax.layers.positional_convolution import PositionalEmbedding
from speech_flax.layers.transformer import Attention, TransformerLayer
from speech_flax.models import hubert, wav2vec2_bert

from . import run_jax, run_torch
from .comparison import FORWARD, GRADIENT
from .variant import Variant, probe, random_state

LENGTHS = np.array([11, 7], np.int32)
MASK = np.arange(11) < LENGTHS[:, None]

#: Takes our module, its parameters and inputs ``[batch, frames, channels]``; or Transformers' model, its layer and
#: the same inputs. Both give outputs of that layout.
Ours = Callable[[Any, Any, jax.Array], jax.Array]
Theirs = Callable[[torch.nn.Module, torch.nn.Module, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer in both libraries.

    Attributes:
      family: Family of the model that it is taken from.
      name: Its name in Transformers.
      channels: Of its inputs.
      build: Makes ours from a configuration.
      ours: Calls ours.
      theirs: Calls theirs.
      config: What differs from the tiny configuration.
      frames: Of its inputs. Of 11 samples the first convolution makes two frames, and what is normalised over two has a
        gradient of rounding errors.
    """

    family: str
    name: str
    channels: int
    build: Callable[[Any], Any]
    ours: Ours
    theirs: Theirs
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    frames: int = 11


def _mask() -> jax.Array:
    return jnp.asarray(MASK)


def _lengths() -> jax.Array:
    return jnp.asarray(LENGTHS)


def _additive(mask: np.ndarray = MASK) -> torch.Tensor:
    """What Transformers adds to the scores of attention: nothing, or the least number for keys in the padding."""
    return torch.where(torch.tensor(mask), 0.0, torch.finfo(torch.float32).min)[:, None, None, :]


def _plain(_model: torch.nn.Module, layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    return layer(states)


def _positions(model: torch.nn.Module, states: torch.Tensor) -> torch.Tensor | None:
    embed = model.encoder.embed_positions
    return None if embed is None else embed(states)


def _shaw(model: torch.nn.Module, layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    return layer(states, attention_mask=_additive(), relative_position_embeddings=_positions(model, states))[0]


def _conformer(model: torch.nn.Module, layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    positions, mask = _positions(model, states), torch.tensor(MASK)
    return layer(states, _additive(), relative_position_embeddings=positions, conv_attention_mask=mask)


def _adapter(_model: torch.nn.Module, layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    shorter = torch.tensor((LENGTHS - 1) // 2 + 1)  # a kernel of 3 and a stride of 2
    return layer(states, attention_mask=torch.tensor(MASK), sub_sampled_lengths=shorter)


def _channels_first(_model: torch.nn.Module, layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    return layer(states.mT).mT


BERT = partial(Layer, "Wav2Vec2Bert")
HUBERT = partial(Layer, "Hubert")
_bert_attention = {
    f"w2v-bert attention {kind}": BERT(
        "encoder.layers.0.self_attn", 12, lambda config: SelfAttention(config, config.position_embeddings_type),
        lambda module, params, states: module.apply(params, states, _mask(), True)[0], _shaw,
        {"position_embeddings_type": kind},
    )
    for kind in ("relative_key", "relative", "rotary", None)
}  # fmt: skip
LAYERS = {
    "w2v-bert feature projection": BERT(
        "feature_projection", 6, wav2vec2_bert.FeatureProjection,
        lambda module, params, states: module.apply(params, states, True)[0],
        lambda _, layer, states: layer(states)[0],
    ),
    "w2v-bert feed-forward": BERT(
        "encoder.layers.0.ffn1", 12, lambda config: FeedForward(config.intermediate_size, "swish", 0.0, 0.0, 0.02),
        lambda module, params, states: module.apply(params, states, True), _plain,
    ),
    "w2v-bert convolution module": BERT(
        "encoder.layers.0.conv_module", 12, ConvolutionModule,
        lambda module, params, states: module.apply(params, states, _mask(), True),
        lambda _, layer, states: layer(states, attention_mask=torch.tensor(MASK)),
    ),
    **_bert_attention,
    "w2v-bert encoder layer": BERT(
        "encoder.layers.0", 12, lambda config: ConformerLayer(config, deterministic=True),
        lambda module, params, states: module.apply(params, states, _mask())[0], _conformer,
    ),
    "w2v-bert adapter layer": BERT(
        "adapter.layers.0", 12, AdapterLayer,
        lambda module, params, states: module.apply(params, states, _lengths(), True), _adapter, {"add_adapter": True},
    ),
    **{
        f"hubert convolution {index} {kind}": HUBERT(
            f"feature_extractor.conv_layers.{index}", channels, partial(ConvolutionLayer, index=index),
            lambda module, params, states: module.apply(params, states, None), _channels_first,
            {"feat_extract_norm": kind, "conv_bias": kind == "layer"}, 43,
        )
        for index, channels in ((0, 1), (1, 8))
        for kind in ("group", "layer")
    },
    "hubert feature projection": HUBERT(
        "feature_projection", 10, hubert.FeatureProjection,
        lambda module, params, states: module.apply(params, states, True), _plain,
    ),
    **{
        f"hubert positional convolution {name}": HUBERT(
            "encoder.pos_conv_embed", 12, PositionalEmbedding,
            lambda module, params, states: module.apply(params, states, _mask()), _plain, config,
        )
        for name, config in (("", {}), ("odd", {"num_conv_pos_embeddings": 5}))
    },
    "hubert attention": HUBERT(
        "encoder.layers.0.attention", 12, Attention,
        lambda module, params, states: module.apply(params, states, _mask(), True)[0],
        lambda _, layer, states: layer(states, attention_mask=_additive())[0],
    ),
    **{
        f"hubert encoder layer {name}": HUBERT(
            "encoder.layers.0", 12, lambda config: TransformerLayer(config, deterministic=True),
            lambda module, params, states: module.apply(params, states, _mask())[0],
            lambda _, layer, states: layer(states, attention_mask=_additive()), config,
        )
        for name, config in (
            ("post-norm", {}),
            ("pre-norm", {"do_stable_layer_norm": True}),
            ("pre-norm with adapter", {"do_stable_layer_norm": True, "adapter_attn_dim": 5}),
        )
    },
}  # fmt: skip


def _tree(name: str, tensors: dict[str, np.ndarray]) -> Any:
    """Parameters or gradients of the layer called ``name`` in Transformers, as our layer has them."""
    tree = from_torch_names({f"{name}.{key}": value for key, value in tensors.items()})
    path = re.sub(r"layers\.(\d+)", r"layers_\1", name).replace("encoder.layers_0", "encoder.layers").replace(".", "/")
    for part in path.split("/"):
        tree = tree[part]
    return jax.tree.map(lambda leaf: leaf[0], tree) if is_stacked(f"{path}/") else tree


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_that_of_transformers(name):
    layer = LAYERS[name]
    variant = Variant(f"{layer.family}Model", "", layer.config)
    model = run_torch.build(variant)
    reference = model.get_submodule(layer.name)
    states = random_state(name).standard_normal((2, layer.frames, layer.channels)).astype(np.float32)
    theirs_in = torch.tensor(states, requires_grad=True)
    expected = layer.theirs(model, reference, theirs_in)
    (expected * torch.tensor(probe(tuple(expected.shape)))).sum().backward()

    module = layer.build(getattr(speech_flax, f"{layer.family}Config").from_dict(variant.fields))
    params = _tree(layer.name, {key: value.numpy() for key, value in reference.state_dict().items()})

    @partial(jax.jit, compiler_options=run_jax.QUICK)
    def run(params: Any, states: jax.Array) -> Any:
        def loss(params: Any, states: jax.Array) -> Any:
            output = layer.ours(module, {"params": params}, states)
            return (output * probe(output.shape)).sum(), output

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, states)

    (of_params, of_states), output = run(params, states)
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=0, atol=FORWARD)
    gradients = _tree(layer.name, {key: value.grad.numpy() for key, value in reference.named_parameters()})
    ours, theirs = flat(of_params), flat(gradients)
    assert set(ours) == set(theirs)
    pairs = {path: (ours[path], theirs[path]) for path in ours} | {"inputs": (of_states, theirs_in.grad.numpy())}
    largest = max(np.abs(theirs).max() for _, theirs in pairs.values())
    for path, (found, wanted) in pairs.items():
        scale = max(np.abs(wanted).max(), 1e-3 * largest)
        np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=GRADIENT, err_msg=path)
