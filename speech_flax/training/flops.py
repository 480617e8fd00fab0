"""Floating-point operations of a model by its configuration: what utilisation of the hardware is measured against.

Counted are matrix products and convolutions, two operations per multiply-add, over all frames of a batch, padding
included. Left out are depthwise convolutions and what no matrix unit computes (norms, activations, softmax, the loss),
the log-mel front end, and everything that is computed twice to save memory.
"""

from speech_flax.audio.log_mel import num_log_mel_frames
from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig


def training_flops(forward: int) -> int:
    """Of a training step: the backward pass takes a product for the inputs and one for the weights."""
    return 3 * forward


def forward_flops(config: Wav2Vec2BertConfig | HubertConfig, batch: int, num_samples: int, feature_stride: int) -> int:
    """Of one forward pass of a CTC model over ``batch`` utterances of ``num_samples`` samples at 16 kHz.

    Args:
        feature_stride: Log-mel frames of 10 ms in a feature frame (Wav2Vec2-BERT alone).
    """
    if isinstance(config, HubertConfig):
        per_utterance = _hubert(config, num_samples)
    else:
        frames = max(1, -(-num_log_mel_frames(num_samples) // feature_stride))
        per_utterance = _wav2vec2_bert(config, frames)
    return batch * per_utterance


def _product(frames: int, inputs: int, outputs: int) -> int:
    return 2 * frames * inputs * outputs


def _attention(frames: int, features: int) -> int:
    """Four projections, and the two products of all frames with all others."""
    return 4 * _product(frames, features, features) + 2 * _product(frames, features, frames)


def _feed_forward(frames: int, features: int, intermediate: int) -> int:
    return 2 * _product(frames, features, intermediate)


def _wav2vec2_bert(config: Wav2Vec2BertConfig, frames: int) -> int:
    size = config.hidden_size
    layer = 2 * _feed_forward(frames, size, config.intermediate_size) + _attention(frames, size)
    layer += _product(frames, size, 2 * size) + _product(frames, size, size)  # pointwise convolutions
    if config.position_embeddings_type == "relative_key":
        distances = config.left_max_position_embeddings + config.right_max_position_embeddings + 1
        layer += _product(frames, size, distances)
    elif config.position_embeddings_type == "relative":
        layer += _product(2 * frames - 1, size, size) + _product(frames, size, 2 * frames - 1)
    total = _product(frames, config.feature_projection_input_dim, size) + config.num_hidden_layers * layer
    if config.use_intermediate_ffn_before_adapter:
        total += _feed_forward(frames, size, config.intermediate_size)
    if config.add_adapter:
        adapted = config.output_hidden_size
        if adapted != size:
            total += _product(frames, size, adapted)
        for _ in range(config.num_adapter_layers):
            frames = (frames + 2 * (config.adapter_stride // 2) - config.adapter_kernel_size) // config.adapter_stride
            frames += 1
            total += 2 * _product(frames, config.adapter_kernel_size * adapted, 2 * adapted)
            total += _attention(frames, adapted) + _feed_forward(frames, adapted, config.intermediate_size)
        size = adapted
    return total + _product(frames, size, config.vocab_size or 0)


def _hubert(config: HubertConfig, num_samples: int) -> int:
    size, total, frames, channels = config.hidden_size, 0, num_samples, 1
    for features, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        total += _product(frames, kernel * channels, features)
        channels = features
    total += _product(frames, channels, size)
    positional = config.num_conv_pos_embeddings * size // config.num_conv_pos_embedding_groups
    total += _product(frames, positional, size)
    layer = _attention(frames, size) + _feed_forward(frames, size, config.intermediate_size)
    if config.adapter_attn_dim is not None:
        layer += _feed_forward(frames, size, config.adapter_attn_dim)
    return total + config.num_hidden_layers * layer + _product(frames, size, config.vocab_size or 0)
