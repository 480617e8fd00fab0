"""Measure every variant and write ``docs/parity.md``: ``PYTHONPATH=tests python -m parity.write_table``."""

import json
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

FULL_SIZE = """
## Full size

Models of the published sizes with random weights and a CTC head, in float32 on a CPU, two utterances of different
lengths: `python convert_torch_weights.py MODEL --check --gradients`. *Activation* is the largest error of any value in
any hidden state or in the logits, over the root mean square of that layer (limit 0.0001); *gradient* the largest norm
of an error over the norm of the gradient of that parameter (limit 0.001).

| model | against | activation | loss, relative | parameters | gradient |
|---|---|---|---|---|---|
"""

COLUMNS = (
    "| variant | 4.37.2: forward | loss | gradient | {0}: forward | loss | gradient |\n|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    text, model = HEAD + full_size(), None
    for variant in VARIANTS:
        if variant.model != model:
            model = variant.model
            text += f"\n## {model}\n\n" + COLUMNS.format(transformers.__version__)
        cells = [cell for differences in _measure(variant) for cell in _cells(differences)]
        text += f"| {variant.name} | {' | '.join(cells)} |\n"
        print(f"{variant.id}: {' '.join(cells)}", flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")


def full_size() -> str:
    """The table of the stored reports of full-size models."""
    rows = []
    for path in sorted(PAGE.parent.glob("parity/*/parity.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        errors = {row["name"]: row["relative"] for row in report["rows"]}
        activation = max(error for name, error in errors.items() if name not in ("inputs", "loss"))
        gradient = max(row["l2"] for row in report["gradients"])
        model = f"[{path.parent.name}]({path.relative_to(PAGE.parent)})"
        versions = ", ".join(f"{name} {version}" for name, version in report["reference"].items())
        measured = f"{activation:.0e} | {errors['loss']:.0e} | {len(report['gradients'])} | {gradient:.0e}"
        rows.append(f"| {model} | {versions} | {measured} |\n")
    return FULL_SIZE + "".join(rows)


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
