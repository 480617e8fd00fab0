"""One optimizer step: schedules, weight decay, groups of parameters, skipped steps, rows that do not count."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.models.wav2vec2_bert import Wav2Vec2BertForCTC
from speech_flax.training.experiment import ExperimentError, OptimizerSettings
from speech_flax.training.optimizer import Optimizer, decay_mask, learning_rate_schedule
from speech_flax.training.step import TrainState, train_step
from speech_flax.training.task import RowResults, Task


def rates(steps: int = 100, **settings) -> np.ndarray:
    schedule = learning_rate_schedule(OptimizerSettings(learning_rate=1.0, **settings), steps)
    return np.array([schedule(step) for step in range(steps)])


def test_every_schedule_rises_linearly_to_the_peak():
    for name in ("tri_stage", "linear", "cosine"):
        np.testing.assert_allclose(rates(schedule=name, warmup=0.1)[:10], np.arange(1, 11) / 10, rtol=1e-6)


def test_tri_stage_holds_and_then_decays_exponentially():
    rate = rates(schedule="tri_stage", warmup=0.1, hold=0.4, final_scale=0.05)
    np.testing.assert_allclose(rate[10:50], 1.0)
    decay = 0.05 ** (np.arange(50) / 50)
    np.testing.assert_allclose(rate[50:], decay, rtol=1e-5)


def test_linear_and_cosine_decay_to_the_final_rate():
    down = np.arange(90) / 90
    linear = rates(schedule="linear", warmup=0.1, final_scale=0.1)[10:]
    np.testing.assert_allclose(linear, 1 - 0.9 * down, rtol=1e-5)
    cosine = rates(schedule="cosine", warmup=0.1, final_scale=0.1)[10:]
    np.testing.assert_allclose(cosine, 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * down)), rtol=1e-4)


def test_schedules_of_one_and_two_steps_are_positive():
    for name in ("tri_stage", "linear", "cosine"):
        assert (rates(1, schedule=name) > 0).all() and (rates(2, schedule=name) > 0).all()


#: Every parameter of Wav2Vec2-BERT with an adapter that weight decay applies to.
DECAYED = {
    "adapter/layers_0/ffn/intermediate_dense/kernel",
    "adapter/layers_0/ffn/output_dense/kernel",
    "adapter/layers_0/residual_conv/kernel",
    "adapter/layers_0/self_attn/linear_k/kernel",
    "adapter/layers_0/self_attn/linear_out/kernel",
    "adapter/layers_0/self_attn/linear_q/kernel",
    "adapter/layers_0/self_attn/linear_v/kernel",
    "adapter/layers_0/self_attn_conv/kernel",
    "encoder/layers/conv_module/depthwise_conv/kernel",
    "encoder/layers/conv_module/pointwise_conv1/kernel",
    "encoder/layers/conv_module/pointwise_conv2/kernel",
    "encoder/layers/ffn1/intermediate_dense/kernel",
    "encoder/layers/ffn1/output_dense/kernel",
    "encoder/layers/ffn2/intermediate_dense/kernel",
    "encoder/layers/ffn2/output_dense/kernel",
    "encoder/layers/self_attn/distance_embedding/embedding",
    "encoder/layers/self_attn/linear_k/kernel",
    "encoder/layers/self_attn/linear_out/kernel",
    "encoder/layers/self_attn/linear_q/kernel",
    "encoder/layers/self_attn/linear_v/kernel",
    "feature_projection/projection/kernel",
    "lm_head/kernel",
}


def names(tree: dict, wanted: object = True) -> list[str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return sorted("/".join(entry.key for entry in path) for path, leaf in leaves if leaf == wanted)


@pytest.fixture(scope="module")
def wav2vec2_bert_params() -> dict:
    config = Wav2Vec2BertConfig(
        vocab_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=2, add_adapter=True
    )
    model = Wav2Vec2BertForCTC(config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 160))))["params"]


def test_weight_decay_applies_to_matrices_alone(wav2vec2_bert_params):
    decayed = [name.removeprefix("wav2vec2_bert/") for name in names(decay_mask(wav2vec2_bert_params))]
    assert set(decayed) == DECAYED


def test_frozen_parameters_are_named_by_patterns(wav2vec2_bert_params):
    optimizer = Optimizer(OptimizerSettings(), 10, ("feature_projection", "layer_norm"))
    held = names(optimizer.held(wav2vec2_bert_params))
    assert "wav2vec2_bert/feature_projection/projection/kernel" in held
    assert all("feature_projection" in name or "layer_norm" in name for name in held)
    with pytest.raises(ExperimentError, match="matches 'feature_extractor'"):
        Optimizer(OptimizerSettings(), 10, ("feature_extractor",)).held(wav2vec2_bert_params)
    with pytest.raises(ExperimentError, match="nothing to train"):
        Optimizer(OptimizerSettings(), 10, (".",)).held(wav2vec2_bert_params)


class Line(nn.Module):
    """A base model of one weight, and a head of one."""

    @nn.compact
    def __call__(self, inputs):
        base = nn.Dense(1, use_bias=False, name="hubert", kernel_init=nn.initializers.constant(2.0))
        head = nn.Dense(1, use_bias=False, name="head", kernel_init=nn.initializers.constant(3.0))
        return head(base(inputs[:, None]))[:, 0]


@dataclasses.dataclass(frozen=True)
class Square(Task):
    """The loss of a row is the square of the line's value at the row's number; infinite above 1e6."""

    model = Line()

    def results(self, params, batch, *, deterministic, rngs=None):
        values = self.model.apply({"params": params}, batch["inputs"])
        losses = jnp.where(batch["inputs"] > 1e6, jnp.inf, values**2)
        losses = jnp.where(batch["valid"], losses, 0.0)
        return RowResults(losses, jnp.zeros(losses.shape, bool), {})


def batch(*inputs: float, valid: list[bool] | None = None) -> dict:
    rows = len(inputs)
    mask = jnp.array(valid if valid is not None else [True] * rows)
    return {"inputs": jnp.array(inputs), "valid": mask, "sample_lengths": jnp.full(rows, 16_000)}


def stepper(settings: OptimizerSettings, **options):
    optimizer = Optimizer(settings, 1000, options.pop("frozen", ()))
    state = TrainState.create(Line().init(jax.random.key(0), jnp.zeros(1))["params"], optimizer)

    @jax.jit
    def step(state, rows):
        return train_step(state, rows, task=Square(), optimizer=optimizer, seed=0, **options)

    return state, step


PLAIN = OptimizerSettings(learning_rate=0.1, warmup=0.0, weight_decay=0.0, max_gradient_norm=1e9)


def test_loss_is_the_mean_over_valid_rows_whatever_the_accumulation():
    rows = batch(1.0, 2.0, 5.0, 7.0, 1.0, 9.0, 9.0, 9.0, valid=[True] * 5 + [False] * 3)
    results = []
    for accumulation in (1, 2, 4):
        state, step = stepper(PLAIN, accumulation=accumulation)
        state, metrics = step(state, rows)
        np.testing.assert_allclose(metrics.loss, 36 * (1 + 4 + 25 + 49 + 1) / 5, rtol=1e-6)
        assert metrics.utterances == 5 and metrics.audio_samples == 5 * 16_000
        results.append(state.params)
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), results[0], other)


def test_rows_that_are_not_valid_change_nothing():
    state, step = stepper(PLAIN)
    one, of_two = step(state, batch(2.0, 3.0))
    other, of_four = step(state, batch(2.0, 3.0, 1e30, -5.0, valid=[True, True, False, False]))
    assert of_two.loss == of_four.loss and of_two.gradient_norm == of_four.gradient_norm
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_step_that_is_not_finite_leaves_parameters_and_moments_and_is_counted():
    state, step = stepper(PLAIN)
    state, _ = step(state, batch(1.0, 2.0))
    after, _ = step(state, batch(1.0, 2e6))
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.optimizer), (after.params, after.optimizer))
    assert (after.step, after.skipped, after.skipped_in_a_row) == (2, 1, 1)
    after, _ = step(after, batch(1.0, 2e6))
    assert (after.step, after.skipped, after.skipped_in_a_row) == (3, 2, 2)
    after, _ = step(after, batch(1.0, 2.0))
    assert (after.step, after.skipped, after.skipped_in_a_row) == (4, 2, 0)
    assert not np.array_equal(after.params["head"]["kernel"], state.params["head"]["kernel"])


def test_spike_is_skipped_once_the_average_is_known():
    still = dataclasses.replace(PLAIN, learning_rate=1e-9)
    state, step = stepper(still, spike_factor=10.0)
    state, _ = step(state, batch(1.0))
    early, _ = step(state, batch(4.0))  # 16 times the loss, but too early to tell
    assert early.skipped == 0
    for _ in range(60):
        state, _ = step(state, batch(1.0))
    spiked, metrics = step(state, batch(4.0))
    assert spiked.skipped == 1 and metrics.skipped_in_a_row == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, spiked.params)
    assert spiked.average_loss == state.average_loss
    assert step(state, batch(3.0))[0].skipped == 0  # 9 times


def test_small_losses_are_no_yardstick_for_a_spike():
    state, step = stepper(dataclasses.replace(PLAIN, learning_rate=1e-9), spike_factor=10.0)
    for _ in range(60):
        state, metrics = step(state, batch(0.01))
    assert metrics.loss < 0.01 and metrics.gradient_norm < 0.01
    assert step(state, batch(0.3))[0].skipped == 0  # 900 times as much, but 3.2
    assert step(state, batch(1.0))[0].skipped == 1


def test_averages_of_the_head_do_not_judge_the_whole_model():
    settings = dataclasses.replace(PLAIN, learning_rate=1e-9, head_only_steps=60)
    state, head_step = stepper(settings, spike_factor=1.5, head_only=True)
    _, whole_step = stepper(settings, spike_factor=1.5)
    for _ in range(60):
        state, head_metrics = head_step(state, batch(1.0))
    after, metrics = whole_step(state, batch(1.0))
    assert metrics.gradient_norm > 1.5 * head_metrics.gradient_norm, "it would be a spike beside the head's"
    assert after.skipped == 0 and after.averaged == 1 and after.average_norm == metrics.gradient_norm
    for _ in range(60):
        after, _ = whole_step(after, batch(1.0))
    assert whole_step(after, batch(2.0))[0].skipped == 1


def test_gradients_are_clipped_by_their_global_norm():
    state, step = stepper(dataclasses.replace(PLAIN, max_gradient_norm=0.5, epsilon=1.0, betas=(0.0, 0.0)))
    after, metrics = step(state, batch(1.0))
    # d(w u)^2: (2 w u^2, 2 w^2 u) = (36, 24), its norm 43.27; Adam without moments divides g by |g| + epsilon.
    np.testing.assert_allclose(metrics.gradient_norm, np.hypot(36, 24), rtol=1e-6)
    clipped = 0.5 * np.array([36, 24]) / np.hypot(36, 24)
    moved = np.array([2.0 - after.params["hubert"]["kernel"].item(), 3.0 - after.params["head"]["kernel"].item()])
    np.testing.assert_allclose(moved, 0.1 * clipped / (clipped + 1), rtol=1e-4)


def test_a_gradient_norm_of_zero_turns_clipping_off():
    rows = batch(1.0)
    unclipped, expected = (stepper(dataclasses.replace(PLAIN, max_gradient_norm=norm)) for norm in (0.0, 1e9))
    (state, step), (other, other_step) = unclipped, expected
    after = step(state, rows)[0].params
    assert not np.array_equal(after["head"]["kernel"], state.params["head"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, after, other_step(other, rows)[0].params)


def kernels(state: TrainState) -> tuple[float, float]:
    return state.params["hubert"]["kernel"].item(), state.params["head"]["kernel"].item()


def test_head_has_a_learning_rate_of_its_own():
    state, step = stepper(dataclasses.replace(PLAIN, head_learning_rate=0.3))
    base, head = kernels(step(state, batch(1.0))[0])
    np.testing.assert_allclose((2.0 - base, 3.0 - head), (0.1, 0.3), rtol=1e-4)  # Adam's first step is the rate


def test_reported_learning_rate_is_the_one_taken_and_skipped_steps_do_not_count():
    settings = dataclasses.replace(PLAIN, warmup=0.004)
    state, step = stepper(settings)
    schedule = learning_rate_schedule(settings, 1000)
    reported = []
    for inputs in (1.0, 2e6, 1.0, 1.0, 1.0):
        state, metrics = step(state, batch(inputs))
        reported.append(float(metrics.learning_rate))
    np.testing.assert_allclose(reported, [schedule(taken) for taken in (0, 1, 1, 2, 3)], rtol=1e-6)
    assert reported[0] < reported[1] < reported[3] < reported[4]


def test_frozen_parameters_keep_their_values_and_have_no_moments():
    decaying = dataclasses.replace(PLAIN, weight_decay=0.1)
    state, step = stepper(decaying, frozen=("hubert",))
    assert len([leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (1, 1)]) == 2
    base, head = kernels(step(state, batch(1.0))[0])
    assert base == 2.0 and head < 3.0


def test_base_model_begins_afresh_after_the_steps_of_the_head():
    settings = dataclasses.replace(PLAIN, head_only_steps=2)
    state, head_step = stepper(settings, head_only=True)
    _, whole_step = stepper(settings)
    for _ in range(2):
        state, _ = head_step(state, batch(1.0))
        assert kernels(state)[0] == 2.0
    assert kernels(state)[1] < 2.85
    base, _ = kernels(whole_step(state, batch(1.0))[0])
    np.testing.assert_allclose(2.0 - base, 0.1, rtol=1e-4)  # as in a first step: the moments were not touched before
