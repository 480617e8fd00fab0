"""Weights and outputs that TensorFlow itself wrote; ``tensorflow_hubert/make_fixture.py`` made them."""

from pathlib import Path

import jax
import numpy as np
import pytest

from speech_flax import HubertForCTC, HubertModel

FIXTURE = Path(__file__).parent / "tensorflow_hubert"

#: Both in float32; TensorFlow adds -1e8 to masked scores and orders its sums differently.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURE / "outputs.npz") as file:
        return dict(file)


def test_ctc_model_loads_tensorflow_weights_and_computes_the_same(expected):
    module, params = HubertForCTC.from_pretrained(FIXTURE)

    @jax.jit
    def apply(params):
        waveforms, mask, labels = expected["waveforms"], expected["mask"], jax.numpy.asarray(expected["labels"])
        return module.apply({"params": params}, waveforms, mask, labels=labels, output_hidden_states=True)

    output = apply(params)
    np.testing.assert_allclose(output.hidden_states, expected["hidden_states"], atol=TOLERANCE)
    np.testing.assert_allclose(output.logits, expected["logits"], atol=TOLERANCE)
    assert float(output.loss) == pytest.approx(expected["loss"].item(), rel=1e-5)


def test_bare_model_takes_the_weights_of_its_part(expected):
    params = HubertModel.from_pretrained(FIXTURE)[1]
    whole = HubertForCTC.from_pretrained(FIXTURE)[1]["hubert"]
    jax.tree.map(np.testing.assert_array_equal, params, whole)
