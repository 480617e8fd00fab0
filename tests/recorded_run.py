"""The training command, noting the utterances of every step: ``recorded_run.py NOTES SECONDS ARGUMENTS...``.

Each step takes ``SECONDS`` longer, so that signals find it at work. A line of ``NOTES`` holds a step and its ids.
"""

import json
import sys
import time
from pathlib import Path

from speech_flax.cli import main
from speech_flax.training.programs import Programs

if __name__ == "__main__":
    notes, seconds, *arguments = sys.argv[1:]
    train = Programs.train

    def noted(self, state, batch):
        with Path(notes).open("a") as file:
            file.write(json.dumps([batch.step, batch.ids]) + "\n")
        time.sleep(float(seconds))
        return train(self, state, batch)

    Programs.train = noted
    sys.exit(main(["train", *arguments]))
