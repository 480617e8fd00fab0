"""Measure every variant and write ``docs/parity.md``: ``PYTHONPATH=tests python -m parity.write_table``."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import transformers

from . import run_jax, run_torch
from .comparison import FORWARD, GRADIENT, LOSS, Differences, compare, load_reference
from .variant import BATCHES, Variant
from .variants import VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"

HEAD = f"""# Parity with Transformers

Largest differences between this library and Hugging Face Transformers, in float32 on a CPU: random tiny models in which
every parameter is drawn at random (norms too), three utterances of 13 encoder frames without an attention mask, and the
same with lengths of 13, 9 and 6 frames. *Forward* is the largest absolute difference in any output: logits or last
state, all hidden states, all attention probabilities. *Loss* is absolute. *Gradient* is that of the loss with respect
to every parameter, relative to the largest element of that parameter's gradient (at least a thousandth of the largest
gradient of the model). The test suite allows {FORWARD:g}, {LOSS:g} and {GRADIENT:g}.

Transformers 4.37.2 means its stored results (`tests/parity/references`, gradients by random projections); Transformers
{transformers.__version__} ran beside us. Written by `PYTHONPATH=tests python -m parity.write_table`.
"""

COLUMNS = (
    "| variant | 4.37.2: forward | loss | gradient | {0}: forward | loss | gradient |\n|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    text, model = HEAD, None
    for variant in VARIANTS:
        if variant.model != model:
            model = variant.model
            text += f"\n## {model}\n\n" + COLUMNS.format(transformers.__version__)
        cells = [cell for differences in _measure(variant) for cell in _cells(differences)]
        text += f"| {variant.name} | {' | '.join(cells)} |\n"
        print(f"{variant.id}: {' '.join(cells)}", flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")


def _measure(variant: Variant) -> Iterator[list[Differences]]:
    """Differences by batch: from the stored results, then from the installed Transformers."""
    ours, expected = run_jax.run(variant, "transformers-4.37"), load_reference(variant)
    yield [compare(ours[batch], expected[batch]) for batch in BATCHES]
    ours, reference = run_jax.run(variant, variant.compatibility_of_5), run_torch.build(variant)
    yield [compare(ours[batch], run_torch.run(variant, batch, reference)) for batch in BATCHES]


def _cells(differences: list[Differences]) -> list[str]:
    return [f"{max(getattr(one, kind) for one in differences):.0e}" for kind in ("forward", "loss", "gradient")]


if __name__ == "__main__":
    main()
