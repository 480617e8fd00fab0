"""HuBERT: what each setting of ``compatibility`` changes, its convolutions, sizes, and what it refuses."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from parity import run_jax, run_torch
from parity.comparison import compare
from parity.variant import BATCHES, Variant

from speech_flax import HubertConfig, HubertForCTC, HubertModel
from speech_flax.layers import feature_encoder
from speech_flax.layers.positional_convolution import PositionalConvolution, grouped_convolution
from speech_flax.models.ctc import loss_of_labels

STABLE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
RANDOM = np.random.RandomState(0)


@cache
def tiny(compatibility, model="HubertForCTC", **changes):
    """A tiny model and its parameters, none of them trivial."""
    module, params = run_jax.build(Variant(model, "", changes), compatibility)
    return module, jax.tree.map(jnp.asarray, params)


def draw(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def outputs(module, params, waveforms, mask=None, **options):
    waveforms = np.asarray(waveforms, np.float32)

    def apply(params):
        return module.apply({"params": params}, waveforms, mask, **options)

    return jax.jit(apply, compiler_options=run_jax.QUICK)(params)


def alone_and_in_a_batch(compatibility, **changes):
    """Largest difference, over the valid frames of all hidden states and the logits, that company makes; the losses."""
    module, params = tiny(compatibility, ctc_loss_reduction="none", **changes)
    lengths = (300, 171, 96)
    waveforms = RANDOM.standard_normal((3, 320))  # the padding of every row is noise, not zeros
    mask = np.arange(320) < np.array(lengths)[:, None]
    labels = np.array([[3, 1, 4], [5, 2, -100], [6, -100, -100]])
    options = {"output_hidden_states": True}
    together = outputs(module, params, waveforms, mask, labels=labels, **options)
    difference, losses = 0.0, []
    for row, length in enumerate(lengths):
        alone = outputs(module, params, waveforms[row : row + 1, :length], labels=labels[row : row + 1], **options)
        frames = alone.logits.shape[1]
        pairs = zip((*together.hidden_states, together.logits), (*alone.hidden_states, alone.logits), strict=True)
        for ours, theirs in pairs:
            difference = max(difference, float(jnp.abs(ours[row, :frames] - theirs[0]).max()))
        losses.append(float(alone.loss[0]))
    return difference, np.abs(together.loss - np.array(losses)).max()


@pytest.mark.parametrize("changes", [{}, {"conv_pos_batch_norm": True}, STABLE], ids=["base", "batch norm", "stable"])
def test_corrected_model_says_the_same_alone_and_padded_in_a_batch(changes):
    difference, of_loss = alone_and_in_a_batch("corrected", **changes)
    assert difference < 1e-5  # rounding: sums over frames in another order
    assert of_loss < 1e-4


@pytest.mark.parametrize("changes", [{}, STABLE | {"conv_pos_batch_norm": True}], ids=["group norm", "batch norm"])
def test_reference_lets_padding_reach_speech(changes):
    """What the corrected behaviour is there for; it also shows that the test above can fail."""
    assert alone_and_in_a_batch("transformers-4.37", **changes)[0] > 1e-2


def test_too_short_utterance_counts_in_the_reference_and_not_when_corrected():
    mask = np.zeros((2, 16_000), bool)
    mask[0, :300], mask[1, :719] = True, True
    frames = {name: hubert(name).feature_mask(mask).sum(-1).tolist() for name in ("transformers-4.37", "corrected")}
    assert frames == {"transformers-4.37": [49, 1], "corrected": [0, 1]}


def hubert(compatibility):
    return HubertModel(HubertConfig(compatibility=compatibility))


def test_lengths_of_the_published_convolutions():
    samples = np.array([399, 400, 719, 720, 16_000, 93_680, 160_000, 480_000])
    assert hubert("corrected").feature_lengths(samples).tolist() == [0, 1, 1, 2, 49, 292, 499, 1499]
    assert HubertForCTC(HubertConfig())._get_feat_extract_output_lengths(16_000) == 49


@pytest.mark.parametrize(
    "padded, samples, frames", [(16_000, 8000, (24, 25)), (160_000, 93_680, (292, 293)), (48_000, 12_345, (38, 39))]
)
def test_fairseq_may_count_one_frame_more(padded, samples, frames):
    mask = np.arange(padded)[None] < samples
    assert tuple(int(hubert(name).feature_mask(mask).sum()) for name in ("transformers-4.37", "fairseq")) == frames


@settings(max_examples=15, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=3),
    lengths=st.tuples(st.integers(0, 9), st.integers(0, 300), st.integers(0, 300)),
)
def test_frame_mask_is_that_of_transformers(layers, lengths):
    """Utterances shorter than the convolutions included."""
    kernel, stride = zip(*layers, strict=True)
    fields = {"conv_kernel": kernel, "conv_stride": stride, "conv_dim": (2,) * len(layers)}
    mask = np.arange(300) < np.array(lengths)[:, None]
    ours = HubertModel(HubertConfig(**fields))
    frames = ours.feature_lengths(300)
    assume((ours.feature_lengths(np.array(lengths)) > -frames).all())  # else the reference fails
    theirs = transformers.HubertModel.__new__(transformers.HubertModel)  # its arithmetic, without its parameters
    torch.nn.Module.__init__(theirs)
    theirs.config = transformers.HubertConfig(**fields)
    expected = theirs._get_feature_vector_attention_mask(frames, torch.tensor(mask).long())
    np.testing.assert_array_equal(jax.jit(ours.feature_mask)(mask), expected.numpy())


def test_spans_of_spec_augment_stay_in_speech_when_corrected():
    """One span of 6 frames per row is almost always lost in 90 frames of padding, unless it may not lie there."""
    rates = {"hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "final_dropout": 0.0}
    spans = {"layerdrop": 0.0, "mask_time_prob": 1e-6, "mask_time_min_masks": 1, "mask_time_length": 6}
    masked = {}
    for compatibility in ("transformers-4.37", "corrected"):
        module, params = tiny(compatibility, **rates, **spans)
        waveforms = np.repeat(RANDOM.standard_normal((1, 800)), 6, axis=0)
        mask = np.arange(800) < np.array([[800], *[[80]] * 5])
        rngs = {"spec_augment": jax.random.key(3)}
        trained = outputs(module, params, waveforms, mask, deterministic=False, rngs=rngs).logits
        apart = jnp.abs(trained - outputs(module, params, waveforms, mask).logits)[1:, :8].max((1, 2))
        masked[compatibility] = int((apart > 1e-3).sum())
    assert masked["corrected"] == 5
    assert masked["transformers-4.37"] < 5


def test_last_hidden_state_of_the_stable_model():
    """Normed in Transformers 4.37; as it was before the norm in Transformers 5 and fairseq (compared in the parity
    suite)."""
    waveforms = RANDOM.standard_normal((1, 200))
    for compatibility, normed in [("corrected", True), ("fairseq", False)]:
        module, params = tiny(compatibility, "HubertModel", **STABLE)
        output = outputs(module, params, waveforms, output_hidden_states=True)
        assert (float(jnp.abs(output.hidden_states[-1] - output.last_hidden_state).max()) == 0) == normed


@pytest.mark.parametrize("compatibility", ["transformers-4.37", "transformers-5", "fairseq", "corrected"])
def test_which_labels_count(compatibility):
    """Labels padded with the blank: left out by all but Transformers 4.37."""
    config = HubertConfig(vocab_size=7, compatibility=compatibility)
    logits = RANDOM.standard_normal((2, 9, 7)).astype(np.float32)
    labels = np.array([[3, -100, 1, 0], [5, 0, 0, 0]])
    ours, infeasible = loss_of_labels(jnp.asarray(logits), jnp.array([9, 8]), labels, config)
    counted = labels >= 0 if compatibility == "transformers-4.37" else labels > 0
    expected = torch.nn.functional.ctc_loss(
        torch.tensor(logits).log_softmax(-1).transpose(0, 1),
        torch.tensor(labels[counted]),
        (9, 8),
        tuple(counted.sum(-1)),
        reduction="sum",
    )
    assert float(ours) == pytest.approx(expected.item(), rel=1e-5)
    assert infeasible == 0
    if compatibility == "transformers-5":
        from transformers.loss.loss_ctc import ForCTCLoss

        options = {"blank_token_id": 0, "reduction": "sum", "zero_infinity": False}
        theirs = ForCTCLoss(torch.tensor(logits), torch.tensor(labels), torch.tensor([9, 8]), **options)
        assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)


def test_positional_convolution_with_batch_norm_equals_transformers_5():
    """Transformers 4.37 does not know it, so there are no stored results."""
    variant = Variant("HubertForCTC", "batch norm", {"conv_pos_batch_norm": True}, "ctc")
    ours, reference = run_jax.run(variant, "transformers-5"), run_torch.build(variant)
    for batch in BATCHES:
        compare(ours[batch], run_torch.run(variant, batch, reference)).check()


@pytest.mark.parametrize("width, frames", [(6, 21), (5, 8), (1, 9), (9, 4), (16, 40)])
def test_grouped_convolution_and_its_gradient(width, frames):
    """The written-out gradient against the one that JAX derives."""
    groups, channels = 3, 12
    inputs, kernel, cotangent = (
        draw(2, frames, channels),
        draw(width, channels // groups, channels),
        draw(2, frames, channels),
    )

    def expected(inputs, kernel):
        padding = [(width // 2, width - 1 - width // 2)]
        layout = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            inputs, kernel, (1,), padding, dimension_numbers=layout, feature_group_count=groups
        )

    theirs, their_gradient = jax.vjp(expected, inputs, kernel)
    ours, our_gradient = jax.vjp(lambda *operands: grouped_convolution(*operands, groups, width // 2), inputs, kernel)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for one, other in zip(our_gradient(cotangent), their_gradient(cotangent), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize("width, stride", [(10, 5), (3, 2), (1, 3), (7, 3)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_convolution_of_the_feature_encoder_and_its_gradient(width, stride, channels, platform, monkeypatch):
    """Without padding, and whatever the length leaves over; against the operation of XLA and the gradient of JAX."""

    def chosen(*operands, default, **formulations):
        return formulations.get(platform, default)(*operands)

    monkeypatch.setattr(feature_encoder, "for_platform", chosen)
    kernel = draw(width, channels, 5)

    def expected(inputs, kernel):
        layout = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(inputs, kernel, (stride,), "VALID", dimension_numbers=layout)

    for samples in (width, width + stride - 1, width + 3 * stride + 1):
        inputs = draw(2, samples, channels)
        theirs, their_gradient = jax.vjp(expected, inputs, kernel)
        ours, our_gradient = jax.vjp(
            lambda *operands: feature_encoder.valid_convolution(*operands, stride), inputs, kernel
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        cotangent = draw(*theirs.shape)
        for one, other in zip(our_gradient(cotangent), their_gradient(cotangent), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "name, millions", [("hubert-base", 94.37), ("hubert-large", 315.44), ("hubert-xlarge", 962.50)]
)
def test_published_sizes(name, millions):
    module = HubertModel(HubertConfig.named(name))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 400)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_positional_convolution_starts_as_in_the_reference():
    """Uniform of the fan-in, with the norms that leave the kernel as it was drawn."""
    config = HubertConfig(num_conv_pos_embedding_groups=2, num_attention_heads=2, hidden_size=96)  # the same fan-in
    params = PositionalConvolution(config).init(jax.random.key(0), jnp.zeros((1, 8, 96)))["params"]
    assert float(params["weight_v"].std()) == pytest.approx(0.00737, rel=0.01)
    np.testing.assert_allclose(params["weight_g"], jnp.sqrt(jnp.square(params["weight_v"]).sum((1, 2))), rtol=1e-6)


def test_remat_and_unrolling_change_no_gradient():
    """LayerDrop, dropout and SpecAugment at work; the recomputation draws the same."""
    fields = Variant("HubertForCTC", "").fields | STABLE | {"layerdrop": 0.5, "mask_time_length": 3}
    config = HubertConfig.from_dict(fields)
    waveforms = RANDOM.standard_normal((2, 150)).astype(np.float32)
    rngs = {name: jax.random.key(seed) for seed, name in enumerate(("dropout", "spec_augment", "layer_drop"))}
    params = tiny("transformers-4.37", **STABLE)[1]

    def gradient(**attributes):
        def loss(params):
            output = HubertForCTC(config, **attributes).apply(
                {"params": params}, waveforms, labels=jnp.array([[1, 2], [3, 3]]), deterministic=False, rngs=rngs
            )
            return output.loss

        return jax.jit(jax.grad(loss), compiler_options=run_jax.QUICK)(params)

    plain = gradient()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(plain))
    other = gradient(remat="full", scan_unroll=2)
    jax.tree.map(lambda one, same: np.testing.assert_allclose(one, same, atol=1e-4), plain, other)


def test_mistakes_are_explained():
    module, params = tiny("transformers-4.37", mask_time_prob=0.0)
    waveforms = np.zeros((1, 100), np.float32)
    with pytest.raises(ValueError, match="10 samples are too short"):
        outputs(module, params, waveforms[:, :10])
    with pytest.raises(ValueError, match="labels must be below vocab_size 7; one is 9"):
        outputs(module, params, waveforms, labels=np.array([[1, 9]]))
    with pytest.raises(ValueError, match="mask embedding"):
        outputs(module, params, waveforms, mask_time_indices=np.ones((1, module.feature_lengths(100)), bool))
    with pytest.raises(ValueError, match="vocab_size"):
        HubertForCTC(HubertConfig(vocab_size=None)).init(jax.random.key(0), jnp.zeros((1, 400)))
    with pytest.raises(ValueError, match="conv_dim 7, conv_stride 2, conv_kernel 7"):
        HubertConfig(conv_stride=(5, 2))
    with pytest.raises(ValueError, match="feat_extract_norm must be"):
        HubertConfig(feat_extract_norm="batch")
    with pytest.raises(ValueError, match="num_conv_pos_embedding_groups 7"):
        HubertConfig(num_conv_pos_embedding_groups=7)
    with pytest.raises(ValueError, match="no adapter that could make output_hidden_size 512"):
        HubertConfig(add_adapter=True, output_hidden_size=512)
    with pytest.raises(ValueError, match="no size 'large'; known are 'hubert-base'"):
        HubertConfig.named("large")
