"""Every variant against the stored results of Transformers 4.37.2, and against the installed Transformers."""

import pytest

from . import run_jax
from .comparison import compare, load_reference
from .variant import BATCHES, REFERENCES, Variant
from .variants import VARIANTS

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.id)


def test_every_reference_belongs_to_a_variant():
    assert {variant.reference for variant in VARIANTS} == set(REFERENCES.glob("*.npz"))


@each_variant
def test_equals_transformers_4(variant: Variant):
    expected = load_reference(variant)
    ours = run_jax.run(variant, "transformers-4.37")
    for batch in BATCHES:
        compare(ours[batch], expected[batch]).check()


@each_variant
def test_equals_the_installed_transformers(variant: Variant):
    from . import run_torch

    ours = run_jax.run(variant, variant.compatibility_of_5)
    model = run_torch.build(variant)
    for batch in BATCHES:
        compare(ours[batch], run_torch.run(variant, batch, model)).check()
