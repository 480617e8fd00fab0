"""Train a model: ``python train.py --config configs/quickstart.yaml``; the same as ``speech-flax train``."""

import sys

from speech_flax.cli import main
from speech_flax.huge_pages import start_with_huge_pages

if __name__ == "__main__":
    start_with_huge_pages()
    sys.exit(main(["train", *sys.argv[1:]]))
