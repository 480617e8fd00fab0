"""Train a model: ``python train.py --config configs/quickstart.yaml``; the same as ``speech-flax train``."""

import sys

from speech_flax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
