"""Floating-point operations of a model by its configuration: what utilisation of the hardware is measured against.

Counted are matrix products and convolutions, two operations per multiply-add, over all frames of a batch, padding
included. Left out are depthwise convolutions and what no matrix unit computes (norms, activations, softmax, the loss),
the log-mel front end, and everything that is computed twice to save memory.
"""

import dataclasses
from collections.abc import Collection

from speech_flax.audio.log_mel import num_log_mel_frames
from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig


@dataclasses.dataclass(frozen=True)
class Product:
    """Products with the parameters whose paths begin with ``weight``, or of activations with each other (``None``).

    ``flops`` are those of one utterance's forward pass: 0 for parameters that no matrix unit works on, which matter
    for what is differentiated before them. Nothing is differentiated with respect to ``constant`` inputs.
    """

    weight: str | None
    flops: int
    constant: bool = False

    def has(self, path: str) -> bool:
        """Whether the parameter at ``path`` is this product's weight, or stands beside it."""
        return self.weight is not None and f"{path}/".startswith(f"{self.weight}/")


#: Products that read what earlier stages computed, and nothing of each other.
Stage = tuple[Product, ...]


def forward_flops(config: Wav2Vec2BertConfig | HubertConfig, batch: int, num_samples: int, feature_stride: int) -> int:
    """Of one forward pass of a CTC model over ``batch`` utterances of ``num_samples`` samples at 16 kHz.

    Args:
        feature_stride: Log-mel frames of 10 ms in a feature frame (Wav2Vec2-BERT alone).
    """
    stages = model_stages(config, num_samples, feature_stride)
    return batch * sum(product.flops for stage in stages for product in stage)


def training_flops(
    config: Wav2Vec2BertConfig | HubertConfig,
    batch: int,
    num_samples: int,
    feature_stride: int,
    trained: Collection[str],
) -> int:
    """Of one forward and backward pass: the gradient with respect to a weight is a product if the weight is trained,
    and that with respect to an input if something trained lies before it.

    Args:
        trained: Paths of the trained parameters, as in ``hubert/encoder/layer_norm/scale``.
    """
    total, reached = 0, False
    for stage in model_stages(config, num_samples, feature_stride):
        changed = [[path for path in trained if product.has(path)] for product in stage]
        for product, paths in zip(stage, changed, strict=True):
            of_inputs = reached and not product.constant
            of_weight = of_inputs if product.weight is None else any(not path.endswith("/bias") for path in paths)
            total += product.flops * (1 + of_weight + of_inputs)
        reached |= any(changed)
    return batch * total


def model_stages(config: Wav2Vec2BertConfig | HubertConfig, num_samples: int, feature_stride: int) -> list[Stage]:
    """All products of a CTC model over one utterance, and all its parameters, in the order of the forward pass."""
    if isinstance(config, HubertConfig):
        return _hubert(config, num_samples)
    return _wav2vec2_bert(config, max(1, -(-num_log_mel_frames(num_samples) // feature_stride)))


def _product(weight: str, frames: int, inputs: int, outputs: int, *, constant: bool = False) -> Product:
    return Product(weight, 2 * frames * inputs * outputs, constant)


def _vector(weight: str) -> Stage:
    """A norm, or another parameter that no matrix unit works on."""
    return (Product(weight, 0),)


def _attention(
    name: str, frames: int, size: int, projections: str, positions: Stage = (), distances: Stage = ()
) -> list[Stage]:
    """Projections (``projections`` with a letter of q, k, v or "out"), the products of all frames with all others,
    and what positions add to either."""
    query_key_value = (_product(f"{name}/{projections.format(part)}", frames, size, size) for part in "qkv")
    scores = Product(None, 2 * frames * size * frames)
    out = _product(f"{name}/{projections.format('out')}", frames, size, size)
    return [(*query_key_value, *positions), (scores, *distances), (scores,), (out,)]


def _feed_forward(name: str, frames: int, size: int, intermediate: int, layers: tuple[str, str]) -> list[Stage]:
    first, second = (f"{name}/{layer}" for layer in layers)
    return [(_product(first, frames, size, intermediate),), (_product(second, frames, intermediate, size),)]


_DENSE = ("intermediate_dense", "output_dense")


def _wav2vec2_bert(config: Wav2Vec2BertConfig, frames: int) -> list[Stage]:
    model, size, intermediate = "wav2vec2_bert", config.hidden_size, config.intermediate_size
    stages = [
        _vector(f"{model}/feature_projection/layer_norm"),
        (_product(f"{model}/feature_projection/projection", frames, config.feature_projection_input_dim, size),),
        _vector(f"{model}/masked_spec_embed"),
        *(_conformer_layer(config, f"{model}/encoder/layers", frames) * config.num_hidden_layers),
    ]
    if config.use_intermediate_ffn_before_adapter:
        stages += _feed_forward(f"{model}/intermediate_ffn", frames, size, intermediate, _DENSE)
    if config.add_adapter:
        adapted = config.output_hidden_size
        if adapted != size:
            stages += [(_product(f"{model}/adapter/proj", frames, size, adapted),)]
            stages += [_vector(f"{model}/adapter/proj_layer_norm")]
        for index in range(config.num_adapter_layers):
            stages += _adapter_layer(config, f"{model}/adapter/layers_{index}", frames)
            frames = _adapted_frames(config, frames)
        size = adapted
    return [*stages, (_product("lm_head", frames, size, config.vocab_size or 0),)]


def _conformer_layer(config: Wav2Vec2BertConfig, layer: str, frames: int) -> list[Stage]:
    size, intermediate, attention = config.hidden_size, config.intermediate_size, f"{layer}/self_attn"
    positions, distances = (), ()
    if config.position_embeddings_type == "relative_key":
        number = config.left_max_position_embeddings + config.right_max_position_embeddings + 1
        distances = (_product(f"{attention}/distance_embedding", frames, size, number),)
    elif config.position_embeddings_type == "relative":
        number, embedding = 2 * frames - 1, f"{attention}/linear_pos"
        positions = (_product(embedding, number, size, size, constant=True),)
        positions += (Product(f"{attention}/pos_bias_u", 0), Product(f"{attention}/pos_bias_v", 0))
        distances = (_product(embedding, frames, size, number),)
    return [
        _vector(f"{layer}/ffn1_layer_norm"),
        *_feed_forward(f"{layer}/ffn1", frames, size, intermediate, _DENSE),
        _vector(f"{layer}/self_attn_layer_norm"),
        *_attention(attention, frames, size, "linear_{}", positions, distances),
        _vector(f"{layer}/conv_module/layer_norm"),
        (_product(f"{layer}/conv_module/pointwise_conv1", frames, size, 2 * size),),
        _vector(f"{layer}/conv_module/depthwise_conv"),
        _vector(f"{layer}/conv_module/depthwise_layer_norm"),
        (_product(f"{layer}/conv_module/pointwise_conv2", frames, size, size),),
        _vector(f"{layer}/ffn2_layer_norm"),
        *_feed_forward(f"{layer}/ffn2", frames, size, intermediate, _DENSE),
        _vector(f"{layer}/final_layer_norm"),
    ]


def _adapted_frames(config: Wav2Vec2BertConfig, frames: int) -> int:
    padded = frames + 2 * (config.adapter_stride // 2)
    return (padded - config.adapter_kernel_size) // config.adapter_stride + 1


def _adapter_layer(config: Wav2Vec2BertConfig, layer: str, frames: int) -> list[Stage]:
    size, shorter = config.output_hidden_size, _adapted_frames(config, frames)
    window = config.adapter_kernel_size * size
    return [
        (Product(f"{layer}/residual_layer_norm", 0), Product(f"{layer}/self_attn_layer_norm", 0)),
        tuple(_product(f"{layer}/{name}", shorter, window, 2 * size) for name in ("residual_conv", "self_attn_conv")),
        *_attention(f"{layer}/self_attn", shorter, size, "linear_{}"),
        _vector(f"{layer}/ffn_layer_norm"),
        *_feed_forward(f"{layer}/ffn", shorter, size, config.intermediate_size, _DENSE),
    ]


def _hubert(config: HubertConfig, num_samples: int) -> list[Stage]:
    stages, frames, channels, encoder = [], num_samples, 1, "hubert/encoder"
    shapes = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    for index, (features, kernel, stride) in enumerate(shapes):
        frames, layer = (frames - kernel) // stride + 1, f"hubert/feature_extractor/conv_layers_{index}"
        stages += [(_product(f"{layer}/conv", frames, kernel * channels, features),), _vector(f"{layer}/layer_norm")]
        channels = features
    size = config.hidden_size
    positional = config.num_conv_pos_embeddings * size // config.num_conv_pos_embedding_groups
    return [
        *stages,
        _vector("hubert/feature_projection/layer_norm"),
        (_product("hubert/feature_projection/projection", frames, channels, size),),
        _vector("hubert/masked_spec_embed"),
        _vector(f"{encoder}/pos_conv_embed/batch_norm"),
        (_product(f"{encoder}/pos_conv_embed/conv", frames, positional, size),),
        _vector(f"{encoder}/layer_norm"),
        *(_transformer_layer(config, f"{encoder}/layers", frames) * config.num_hidden_layers),
        (_product("lm_head", frames, size, config.vocab_size or 0),),
    ]


def _transformer_layer(config: HubertConfig, layer: str, frames: int) -> list[Stage]:
    """Norms in one stage of their own: at which of two places they stand makes no difference here."""
    size = config.hidden_size
    stages = [
        (Product(f"{layer}/layer_norm", 0), Product(f"{layer}/final_layer_norm", 0)),
        *_attention(f"{layer}/attention", frames, size, "{}_proj"),
        *_feed_forward(f"{layer}/feed_forward", frames, size, config.intermediate_size, _DENSE),
    ]
    if config.adapter_attn_dim is not None:
        adapter = f"{layer}/adapter_layer"
        stages += [_vector(f"{adapter}/norm")]
        stages += _feed_forward(adapter, frames, size, config.adapter_attn_dim, ("linear_1", "linear_2"))
    return stages
