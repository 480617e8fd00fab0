"""Write ``references/*.npz`` with Transformers 4.37.2: ``PYTHONPATH=tests python -m parity.make_references [PART ...]``

Needs neither JAX nor this library. Arguments select variants by a part of their name; without any, all are made that
have no file yet.
"""

import json
import sys
import tempfile
from pathlib import Path

import transformers

from . import tokenizer_cases
from .comparison import save_reference, stored
from .run_torch import build, run
from .variant import BATCHES
from .variants import VARIANTS


def main(wanted: list[str]) -> None:
    if transformers.__version__ != "4.37.2":
        sys.exit(f"the references are those of Transformers 4.37.2, not of {transformers.__version__}")
    with tempfile.TemporaryDirectory() as directory:
        answers = tokenizer_cases.answers(transformers.Wav2Vec2CTCTokenizer, Path(directory))
    tokenizer_cases.REFERENCE.write_text(json.dumps(answers, sort_keys=True) + "\n", encoding="utf-8")
    for variant in VARIANTS:
        if any(part in variant.id for part in wanted) if wanted else not variant.reference.exists():
            model = build(variant)
            save_reference(variant, {batch: stored(run(variant, batch, model), batch == "masked") for batch in BATCHES})
            print(f"{variant.reference.name}: {variant.reference.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
