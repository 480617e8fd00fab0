"""The choice between formulations by platform: what is traced, and what runs."""

import jax
import jax.numpy as jnp
import pytest

from speech_flax.kernels.platforms import for_platform


@pytest.fixture
def traced():
    """Formulations that note that they were traced, and the names of those that were."""
    names = []

    def formulation(name, number):
        def run(array):
            names.append(name)
            return array + number

        return run

    choices = {name: formulation(name, number) for number, name in enumerate(("default", "cpu", "tpu"))}
    return lambda array: for_platform(array, **choices), names


def test_a_mesh_says_what_is_traced(traced):
    choose, names = traced
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert jax.jit(choose)(jnp.zeros(())) == 1
    assert names == ["cpu"]


def test_without_a_mesh_the_program_that_is_lowered_decides(traced):
    choose, names = traced
    lowered = jax.jit(choose).trace(jnp.zeros(())).lower(lowering_platforms=("tpu",)).as_text()
    assert set(names) == {"default", "cpu", "tpu"}
    assert "2.0" in lowered and "1.0" not in lowered
    assert jax.jit(choose)(jnp.zeros(())) == 1
