"""Convert a checkpoint to this library or back: ``python convert_torch_weights.py SOURCE DESTINATION [--check]``."""

import sys

from speech_flax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
