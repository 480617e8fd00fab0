"""What Wav2Vec2-BERT does beside its numbers: padding, precision, LayerDrop and dropout, recomputation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .run_jax import QUICK, build
from .variant import Variant, inputs

POSITIONS = ("relative_key", "relative", "rotary", None)
FULL = {"add_adapter": True, "use_intermediate_ffn_before_adapter": True}
NOTHING_RANDOM = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}


def model(**config):
    """A tiny CTC model, its parameters, and a masked batch of lengths 13, 9 and 6 with labels."""
    variant = Variant("Wav2Vec2BertForCTC", "model", config, "ctc")
    module, params = build(variant)
    return module, jax.tree.map(jnp.asarray, params), inputs(variant, "masked")


def with_params(module, params, **options):
    """The compiled model as a function of its inputs."""
    return jax.jit(lambda batch: module.apply({"params": params}, **batch, **options), compiler_options=QUICK)


def random_streams(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return dict(zip(("dropout", "layer_drop", "spec_augment"), keys, strict=True))


def test_what_lies_in_the_padding_does_not_matter():
    module, params, batch = model()
    padding = batch["attention_mask"] == 0
    run = with_params(module, params, output_hidden_states=True)
    zeros, garbage = batch["input_features"].copy(), batch["input_features"].copy()
    zeros[padding] = 0
    garbage[padding] = 1e4 * np.random.RandomState(0).standard_normal(garbage[padding].shape)
    of_zeros, of_garbage = (run(batch | {"input_features": features}) for features in (zeros, garbage))
    for one, other in zip(of_zeros.hidden_states, of_garbage.hidden_states, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[~padding], np.asarray(other)[~padding])
    np.testing.assert_array_equal(np.asarray(of_zeros.logits)[~padding], np.asarray(of_garbage.logits)[~padding])
    assert of_zeros.loss == of_garbage.loss


def test_no_mask_is_a_mask_of_ones_of_any_type():
    module, params, batch = model()
    features = {"input_features": batch["input_features"]}

    def logits(mask: np.ndarray | None) -> np.ndarray:
        return jax.jit(lambda: module.apply({"params": params}, **features, attention_mask=mask).logits)()

    expected = logits(None)
    for ones in (np.ones((3, 13), np.int32), np.ones((3, 13), bool), jnp.ones((3, 13))):
        np.testing.assert_array_equal(logits(ones), expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_bfloat16_stays_close_to_float32(positions):
    module, params, batch = model(position_embeddings_type=positions, **FULL)
    exact = with_params(module, params, output_hidden_states=True)(batch)
    rounded = with_params(module.clone(dtype=jnp.bfloat16), params, output_hidden_states=True)(batch)
    assert rounded.logits.dtype == jnp.bfloat16
    pairs = [(exact.logits, rounded.logits), *zip(exact.hidden_states, rounded.hidden_states, strict=True)]
    for one, other in pairs:
        difference = np.linalg.norm(np.asarray(other, np.float32) - np.asarray(one))
        assert 0 < difference <= 3e-2 * np.linalg.norm(np.asarray(one))


def test_layers_are_dropped_at_the_rate_of_the_configuration_for_the_whole_batch():
    module, params, batch = model(**NOTHING_RANDOM | {"layerdrop": 0.3, "num_hidden_layers": 4})

    @jax.jit
    @jax.vmap
    def states(key):
        rngs = {"layer_drop": key}
        output = module.apply({"params": params}, **batch, deterministic=False, rngs=rngs, output_hidden_states=True)
        return jnp.stack(output.hidden_states)

    keys = jax.random.split(jax.random.key(0), 200)
    results = np.asarray(states(keys))
    unchanged = (results[:, 1:] == results[:, :-1]).all(-1).all(-1)
    assert (unchanged.all(-1) == unchanged.any(-1)).all()  # all items of a batch, or none
    skipped = unchanged.all(-1)
    # 800 draws: the standard error is 0.016
    assert abs(skipped.mean() - 0.3) < 0.07
    assert (abs(skipped.mean(0) - 0.3) < 0.13).all()  # every layer, the standard error being 0.032
    assert len(np.unique(skipped, axis=0)) > 8  # independently of each other
    np.testing.assert_array_equal(results[:3], states(keys)[:3])


def test_a_dropped_layer_is_not_computed():
    module, params, batch = model(**NOTHING_RANDOM | {"layerdrop": 0.5})

    def conditionals(deterministic):
        apply = partial(module.apply, deterministic=deterministic, rngs=random_streams(0))
        return jax.jit(apply).lower({"params": params}, **batch).as_text().count("stablehlo.case")

    assert conditionals(deterministic=False) > conditionals(deterministic=True)
    broken = jax.tree.map(lambda leaf: leaf, params)
    broken["wav2vec2_bert"]["encoder"]["layers"] = jax.tree.map(
        lambda leaf: np.full_like(leaf, np.nan), params["wav2vec2_bert"]["encoder"]["layers"]
    )
    always = module.clone(config=module.config.replace(layerdrop=1.0))
    options = {"deterministic": False, "rngs": random_streams(0), "output_attentions": True}
    output = jax.jit(lambda: always.apply({"params": broken}, **batch, **options))()
    assert np.isfinite(output.loss)
    assert not any(np.asarray(probabilities).any() for probabilities in output.attentions)


#: How often each rate is drawn from in one pass: the encoder's layers are traced once.
DROPOUTS = {
    "hidden_dropout": 5,  # before the layers, in ffn1, ffn2, the feed-forward before the adapter, and the adapter's
    "activation_dropout": 4,  # in those four
    "attention_dropout": 3,  # probabilities of the encoder and the adapter, and the encoder's attended values
    "feat_proj_dropout": 1,
    "final_dropout": 1,
    "conformer_conv_dropout": 2,  # after the convolution module, and after the adapter's attention
}


def draws(jaxpr):
    """How many operations of a traced function, inner functions included, make random bits."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "random_bits"
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                count += draws(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize("name", DROPOUTS)
def test_every_dropout_acts_in_training_alone(name):
    module, params, batch = model(**NOTHING_RANDOM | FULL | {name: 0.5})
    run = partial(module.apply, {"params": params}, **batch)
    in_training = jax.make_jaxpr(lambda rngs: run(deterministic=False, rngs=rngs).logits)(random_streams(0))
    in_evaluation = jax.make_jaxpr(lambda: run(deterministic=True).logits)()
    assert draws(in_evaluation.jaxpr) == 0
    assert draws(in_training.jaxpr) == DROPOUTS[name]


def gradients(module, params, batch, **options):
    """The loss and its gradients, compiled without attention probabilities, so that long inputs go in blocks."""

    @partial(jax.jit, compiler_options=QUICK)
    def run(params):
        return jax.value_and_grad(lambda params: module.apply({"params": params}, **batch, **options).loss)(params)

    return run(params)


def assert_close(one, other):
    """The same numbers in another order of summation."""
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, np.abs(theirs).max()))


def test_recomputation_and_unrolling_change_no_number():
    training = {"deterministic": False, "rngs": random_streams(3)}
    module, params, batch = model(layerdrop=0.3, mask_time_length=2, hidden_dropout=0.1)
    expected = gradients(module, params, batch, **training)
    for change in ({"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 2}):
        assert_close(gradients(module.clone(**change), params, batch, **training), expected)
