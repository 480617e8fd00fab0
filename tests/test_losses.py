import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_flax.losses import compact_labels, ctc_loss, reduce_ctc
from speech_flax.losses import ctc as losses_module

FRAMES, LABELS, VOCABULARY = 12, 6, 5


@functools.partial(jax.jit, static_argnames="blank_id")
def losses_and_gradient(logits, logit_lengths, labels, label_lengths, weights, blank_id=0):
    """Losses, feasibility, and the gradient of the weighted sum of the feasible losses."""

    def total(logits):
        losses, feasible = ctc_loss(logits, logit_lengths, labels, label_lengths, blank_id=blank_id)
        return (jnp.where(feasible, losses, 0.0) * weights).sum(), (losses, feasible)

    (_, (losses, feasible)), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    return losses, feasible, gradient


def of_torch(logits, logit_lengths, labels, label_lengths, weights, blank_id=0, dtype=torch.float64):
    """The same from PyTorch, which writes NaN into the gradient of infeasible rows unless told to zero them."""
    logits = torch.tensor(np.asarray(logits), dtype=dtype, requires_grad=True)
    arguments = [torch.tensor(np.asarray(ids)).long() for ids in (labels, logit_lengths, label_lengths)]
    log_probs = logits.log_softmax(-1).transpose(0, 1)
    arguments[0] = arguments[0].clamp(min=0)
    compute = functools.partial(torch.nn.functional.ctc_loss, log_probs, *arguments, blank=blank_id, reduction="none")
    losses = compute()
    (compute(zero_infinity=True) * torch.tensor(weights)).sum().backward()
    return losses.detach().numpy(), np.isfinite(losses.detach().numpy()), logits.grad.numpy()


def random_case(seed, batch, frames=FRAMES, labels=LABELS, vocabulary=VOCABULARY, scale=2.0):
    """Random logits, lengths and labels; about half of the small cases are infeasible."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(scale=scale, size=(batch, frames, vocabulary)).astype(np.float32),
        rng.integers(1, frames + 1, batch).astype(np.int32),
        rng.integers(1, vocabulary, (batch, labels)).astype(np.int32),
        rng.integers(0, labels + 1, batch).astype(np.int32),
        rng.uniform(0.5, 2.0, batch).astype(np.float32),
    )


@st.composite
def cases(draw, batch=3):
    blank_id = draw(st.sampled_from([0, 2, VOCABULARY - 1]))
    symbols = st.integers(0, VOCABULARY - 1).filter(lambda symbol: symbol != blank_id)
    rows = st.lists(st.lists(symbols, max_size=LABELS), min_size=batch, max_size=batch)
    targets = draw(rows)
    labels = np.full((batch, LABELS), -100, np.int32)
    for row, target in enumerate(targets):
        labels[row, : len(target)] = target
    logit_lengths = draw(st.lists(st.integers(1, FRAMES), min_size=batch, max_size=batch))
    logits, *_, weights = random_case(draw(st.integers(0, 2**16)), batch, scale=draw(st.sampled_from([0.0, 1.0, 20.0])))
    return (
        (logits, np.int32(logit_lengths), labels, np.int32([len(target) for target in targets]), weights),
        blank_id,
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_losses_and_gradients_are_those_of_torch(case):
    arguments, blank_id = case
    losses, feasible, gradient = losses_and_gradient(*arguments, blank_id=blank_id)
    expected_losses, expected_feasible, expected_gradient = of_torch(*arguments, blank_id=blank_id)
    np.testing.assert_array_equal(feasible, expected_feasible)
    # float32 against float64; the losses reach several hundreds
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6, atol=2e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**16))
def test_padding_has_no_influence_and_no_gradient(case, seed):
    (logits, logit_lengths, labels, label_lengths, weights), blank_id = case
    rng = np.random.default_rng(seed)
    padded_frames = np.arange(FRAMES) >= logit_lengths[:, None]
    padded_labels = np.arange(LABELS) >= label_lengths[:, None]
    other_logits, other_labels = logits.copy(), labels.copy()
    other_logits[padded_frames] = rng.choice([np.nan, 1e30, -7.0])
    other_labels[padded_labels] = rng.integers(-100, 100, padded_labels.sum())
    here = losses_and_gradient(logits, logit_lengths, labels, label_lengths, weights, blank_id=blank_id)
    there = losses_and_gradient(other_logits, logit_lengths, other_labels, label_lengths, weights, blank_id=blank_id)
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    gradient = np.asarray(here[2])
    assert not gradient[padded_frames].any()
    assert not gradient[~np.asarray(here[1])].any()


def log_likelihood_by_enumeration(logits, target, blank_id=0):
    """Over all alignments, one by one."""
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scores = [
        sum(log_probs[frame, symbol] for frame, symbol in enumerate(path))
        for path in itertools.product(range(logits.shape[-1]), repeat=len(logits))
        if [symbol for symbol, _ in itertools.groupby(path) if symbol != blank_id] == list(target)
    ]
    return np.logaddexp.reduce(scores) if scores else -np.inf


def test_tiny_cases_equal_the_sum_over_all_alignments():
    targets = [target for length in range(4) for target in itertools.product([1, 2], repeat=length)]
    lengths = [1 + index % 4 for index in range(len(targets))]
    lengths += [4] * len(targets)
    targets += targets
    logits = np.random.default_rng(0).normal(size=(len(targets), 4, 3))
    labels = np.zeros((len(targets), 3), np.int32)
    for row, target in enumerate(targets):
        labels[row, : len(target)] = target
    label_lengths = np.int32([len(target) for target in targets])
    losses, feasible = jax.jit(ctc_loss)(np.float32(logits), np.int32(lengths), labels, label_lengths)
    expected = [
        -log_likelihood_by_enumeration(row[:frames], target)
        for row, frames, target in zip(logits, lengths, targets, strict=True)
    ]
    np.testing.assert_allclose(losses, expected, atol=2e-6)
    np.testing.assert_array_equal(feasible, np.isfinite(expected))
    assert 0 < feasible.sum() < len(targets)


@pytest.mark.parametrize("target", [(), (1,), (1, 1), (2, 1)])
def test_gradient_is_the_finite_difference_of_the_enumeration(target):
    logits = np.random.default_rng(1).normal(size=(4, 3))
    labels = np.zeros((1, 2), np.int32)
    labels[0, : len(target)] = target
    _, _, gradient = losses_and_gradient(
        jnp.float32(logits)[None], jnp.int32([4]), labels, jnp.int32([len(target)]), jnp.ones(1)
    )
    step = 1e-5
    for index in np.ndindex(*logits.shape):
        moved = np.zeros_like(logits)
        moved[index] = step
        rise = log_likelihood_by_enumeration(logits + moved, target)
        fall = log_likelihood_by_enumeration(logits - moved, target)
        assert gradient[0][index] == pytest.approx(-(rise - fall) / (2 * step), abs=2e-6)


def test_long_utterances_keep_their_precision():
    logits, _, labels, _, _ = random_case(0, 2, frames=1500, labels=200, vocabulary=32, scale=3.0)
    arguments = (logits, np.int32([1500, 1300]), labels, np.int32([200, 150]), np.ones(2, np.float32))
    losses, _, gradient = losses_and_gradient(*arguments)
    expected_losses, _, expected_gradient = of_torch(*arguments)
    # losses of about 7000, of which float32 resolves 5e-4; a recursion without scaling is wrong by 6e-3 in both
    np.testing.assert_allclose(losses, expected_losses, atol=1.5e-3)
    np.testing.assert_allclose(gradient, expected_gradient, atol=3e-4)


def test_infeasible_rows_are_infinite_without_gradient():
    logits, _, labels, _, weights = random_case(2, 4)
    labels[:] = [1, 1, 2, 3, 4, 1]
    lengths, label_lengths = np.int32([2, 3, 5, 7]), np.int32([2, 2, 6, 6])  # 1 1 needs three frames, all need seven
    losses, feasible, gradient = losses_and_gradient(logits, lengths, labels, label_lengths, weights)
    np.testing.assert_array_equal(feasible, [False, True, False, True])
    np.testing.assert_array_equal(np.isposinf(losses), [True, False, True, False])
    np.testing.assert_array_equal(np.abs(gradient).sum((1, 2)) > 0, [False, True, False, True])
    # without the zeroing in between, too
    whole = jax.jit(jax.grad(lambda *arrays: ctc_loss(*arrays)[0].sum()))(logits, lengths, labels, label_lengths)
    assert np.isfinite(whole).all()
    assert not whole[0].any()


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_labels_beyond_the_vocabulary_have_no_loss(monkeypatch, platform):
    if platform == "default":
        monkeypatch.setattr(losses_module, "for_platform", lambda *arrays, cpu, default: default(*arrays))
    logits = np.random.default_rng(0).standard_normal((3, 9, 5)).astype(np.float32)
    labels = np.array([[1, 5], [1, 5], [1, 4]])
    losses, _ = jax.jit(ctc_loss)(logits, np.array([9, 9, 9]), labels, np.array([2, 1, 2]))
    np.testing.assert_array_equal(np.isnan(losses), [True, False, False])


@pytest.mark.parametrize("blank_id", [-1, 5])
def test_blank_must_be_in_the_vocabulary(blank_id):
    with pytest.raises(ValueError, match=f"is {blank_id}, which is no symbol of a vocabulary of 5"):
        ctc_loss(jnp.zeros((1, 4, 5)), jnp.array([4]), jnp.array([[1]]), jnp.array([1]), blank_id=blank_id)


def test_empty_labels_and_empty_rows():
    logits, *_ = random_case(3, 2)
    blank_only = -jax.nn.log_softmax(logits)[:, :, 0].cumsum(1)
    for width in (0, 3):
        labels, zeros = np.zeros((2, width), np.int32), np.zeros(2, np.int32)
        losses, feasible, gradient = losses_and_gradient(logits, np.int32([5, 0]), labels, zeros, np.ones(2))
        np.testing.assert_allclose(losses, [blank_only[0, 4], 0.0], rtol=1e-6)
        assert feasible.all()
        expected = jax.nn.softmax(logits[0, :5]).at[:, 0].add(-1.0)
        np.testing.assert_allclose(gradient[0, :5], expected, atol=1e-6)
        assert not gradient[1].any()


def test_bfloat16_logits_are_summed_in_float32():
    logits, *rest, weights = random_case(4, 2)
    rest[0][:] = FRAMES
    logits = jnp.asarray(logits, jnp.bfloat16)
    losses, _, gradient = losses_and_gradient(logits, *rest, weights)
    exact, _, exact_gradient = losses_and_gradient(logits.astype(jnp.float32), *rest, weights)
    assert losses.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(losses, exact)
    np.testing.assert_array_equal(gradient, exact_gradient.astype(jnp.bfloat16))


def test_accelerators_formulation_gives_the_same(monkeypatch):
    arguments = random_case(5, 4)
    here = losses_and_gradient(*arguments)
    monkeypatch.setattr(losses_module, "for_platform", lambda *operands, cpu, default: default(*operands))
    there = jax.jit(losses_and_gradient.__wrapped__)(*arguments)
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_compiles_for_tpu_without_a_gather_of_the_scores():
    text = losses_and_gradient.trace(*random_case(5, 4)).lower(lowering_platforms=("tpu",)).as_text()
    assert f"4x{FRAMES}x{LABELS}xf32" in text
    gathers = [line for line in text.splitlines() if "stablehlo.gather" in line]
    assert gathers  # the two final alphas, maybe through one function
    assert not any(f"{FRAMES}x{VOCABULARY}" in line for line in gathers)


def test_compact_labels_drops_negatives_anywhere():
    labels = jnp.int32([[5, -100, 0, -1, 7], [-100] * 5, [1, 2, 3, 4, 5]])
    compact, lengths = compact_labels(labels)
    np.testing.assert_array_equal(compact, [[5, 0, 7, 0, 0], [0] * 5, [1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(lengths, [3, 0, 5])
    compact, lengths = compact_labels(labels, (labels != -100) & (labels != 0))
    np.testing.assert_array_equal(compact[0], [5, -1, 7, 0, 0])
    np.testing.assert_array_equal(lengths, [3, 0, 5])


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("all_feasible", [False, True])
def test_reductions_are_those_of_torch_on_flattened_labels(reduction, zero_infinity, all_feasible):
    logits, *_ = random_case(6, 3)
    labels = np.int32([[1, -100, 3, 3, -100, -100], [-100] * 6, [4, 3, 2, -1, 1, 1]])
    lengths = np.int32([FRAMES, 7, FRAMES if all_feasible else 5])
    inside = labels >= 0
    expected = torch.nn.functional.ctc_loss(
        torch.tensor(logits).log_softmax(-1).transpose(0, 1),
        torch.tensor(labels[inside]).long(),
        torch.tensor(lengths).long(),
        torch.tensor(inside.sum(-1)).long(),
        reduction=reduction,
        zero_infinity=zero_infinity,
    )
    compact, label_lengths = compact_labels(jnp.asarray(labels))
    losses, feasible = jax.jit(ctc_loss)(logits, lengths, compact, label_lengths)
    reduced = reduce_ctc(losses, feasible, label_lengths, reduction=reduction, zero_infinity=zero_infinity)
    np.testing.assert_allclose(reduced, expected.numpy(), rtol=1e-5)
    assert bool(feasible.all()) is all_feasible


def test_mean_divides_by_labels_then_by_utterances():
    losses, feasible = jnp.float32([25.1919, 18.0715, jnp.inf]), jnp.array([True, True, False])
    reduce = functools.partial(reduce_ctc, reduction="mean")
    # an empty target divides by one
    assert reduce(losses[:2], feasible[:2], jnp.int32([0, 2]), zero_infinity=False) == pytest.approx(17.1138, abs=1e-4)
    # an utterance whose loss was zeroed still counts in the mean
    assert reduce(losses[1:], feasible[1:], jnp.int32([2, 9]), zero_infinity=True) == pytest.approx(4.5179, abs=1e-4)
    with pytest.raises(ValueError, match="'sum', 'mean' or 'none', not 'average'"):
        reduce_ctc(losses, feasible, jnp.int32([1, 1, 1]), reduction="average", zero_infinity=True)


SHARDED = """
import re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from speech_flax.losses import ctc_loss
mesh = jax.make_mesh((4,), ("data",))
rows = NamedSharding(mesh, PartitionSpec("data"))
gradient = jax.jit(jax.grad(lambda *arrays: ctc_loss(*arrays)[0].sum()), in_shardings=(rows,) * 4, out_shardings=rows)
ids = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8,), (8, 10), (8,))]
text = gradient.lower(jax.ShapeDtypeStruct((8, 50, 32), jnp.float32), *ids).compile().as_text()
assert "f32[2,50,32]" in text, "each device holds two rows"
print(sorted(set(re.findall("all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text))))
"""


def test_rows_on_different_devices_do_not_talk():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
