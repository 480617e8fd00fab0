"""The stack of encoder layers: compiled once and scanned, with LayerDrop and rematerialisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from speech_flax.configuration import SpeechConfig
from speech_flax.kernels.fused_attention import ATTENTION
from speech_flax.layers.convolution import CONVOLVED
from speech_flax.layers.normalization import STATISTICS

#: What the backward pass finds again without recomputing, by name.
REMAT_POLICIES = {
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION, STATISTICS),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION, STATISTICS, CONVOLVED),
    ),
}


class EncoderLayer(nn.Module):
    """One layer of the stack, and LayerDrop around it; subclasses define ``_layer``.

    Called by :func:`scan_layers`: maps the carried hidden states ``[batch, frames, hidden]`` to themselves and
    ``(hidden states, attention probabilities)``, each ``None`` unless asked for. While training, the whole layer is
    skipped with probability ``config.layerdrop`` (Fan et al. 2020): for the whole batch, and without computing it.
    """

    config: SpeechConfig
    deterministic: bool
    output_hidden_states: bool = False
    output_attentions: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "batch frames hidden"], mask: Bool[Array, "batch frames"]):
        if self.deterministic or self.config.layerdrop == 0 or self.is_initializing():
            hidden_states, attentions = self._layer(hidden_states, mask)
        else:
            dropped = jax.random.uniform(self.make_rng("layer_drop")) < self.config.layerdrop
            hidden_states, attentions = nn.cond(
                dropped, type(self)._skip, type(self)._layer, self, hidden_states, mask
            )  # fmt: skip
        return hidden_states, (hidden_states if self.output_hidden_states else None, attentions)

    def _skip(self, hidden_states: Array, mask: Array) -> tuple[Array, Array | None]:
        batch, frames, _ = hidden_states.shape
        shape = (batch, self.config.num_attention_heads, frames, frames)
        return hidden_states, jnp.zeros(shape, self.dtype) if self.output_attentions else None

    def _layer(self, hidden_states: Array, mask: Array) -> tuple[Array, Array | None]:
        """The layer's output, and its attention probabilities if ``output_attentions``."""
        raise NotImplementedError


def scan_layers(
    layer: type[EncoderLayer],
    config: SpeechConfig,
    hidden_states: Float[Array, "batch frames hidden"],
    mask: Bool[Array, "batch frames"],
    *,
    deterministic: bool,
    output_hidden_states: bool,
    output_attentions: bool,
    dtype: DTypeLike,
    remat: str,
    scan_unroll: int,
) -> tuple[Float[Array, "batch frames hidden"], tuple[Array, ...] | None, tuple[Array, ...] | None]:
    """Run ``config.num_hidden_layers`` layers, whose parameters are stacked under ``layers``.

    To be called in a compact module.

    Returns:
      The output of the last layer; ``hidden_states`` and the output of every layer; the attention probabilities of
      every layer. The latter two are ``None`` unless asked for.

    Raises:
      ValueError: an unknown ``remat``.
    """
    if remat not in ("none", *REMAT_POLICIES):
        known = ", ".join(map(repr, ("none", *REMAT_POLICIES)))
        raise ValueError(f"remat must be one of {known}, not {remat!r}")
    if remat != "none":
        layer = nn.remat(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    layers = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True, "layer_drop": True},
        in_axes=nn.broadcast,
        length=config.num_hidden_layers,
        unroll=scan_unroll,
        check_constancy_invariants=False,  # the layers are traced once more for it
    )(config, deterministic, output_hidden_states, output_attentions, dtype, name="layers")
    last, (states, attentions) = layers(hidden_states, mask)
    count = range(config.num_hidden_layers)
    all_states = (hidden_states, *(states[index] for index in count)) if output_hidden_states else None
    all_attentions = tuple(attentions[index] for index in count) if output_attentions else None
    return last, all_states, all_attentions
