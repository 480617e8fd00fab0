"""A corpus that takes milliseconds to make: every letter is a tone, and a transcript spells the tones of its audio."""

import csv
from pathlib import Path

import numpy as np
import soundfile
import yaml

TONES = {"a": 300.0, "b": 700.0, "c": 1500.0, "d": 2600.0}
RATE = 16_000

#: The smallest model that has every part: two layers, two heads.
TINY_MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_depthwise_kernel_size": 3,
    "left_max_position_embeddings": 4,
    "right_max_position_embeddings": 2,
    "mask_time_length": 2,
}


def write_corpus(directory: Path, sizes: dict[str, int], seed: int = 0) -> Path:
    """Write ``<split>.csv`` and WAV files for every split; utterances last .2 to .8 s."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for split, size in sizes.items():
        with (directory / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["audio", "text"])
            for index in range(size):
                words = ("".join(random.choice(list(TONES), random.integers(1, 4))) for _ in range(1 + index % 3))
                text = " ".join(words)
                name = f"{split}-{index:03d}.wav"
                soundfile.write(directory / name, speak(text, random), RATE)
                writer.writerow([name, text])
    return directory


def speak(text: str, random: np.random.Generator) -> np.ndarray:
    """80 ms of tone or silence per character, with a little noise."""
    times = np.arange(int(0.08 * RATE)) / RATE
    parts = [0.3 * np.sin(2 * np.pi * TONES.get(character, 0.0) * times) for character in text]
    audio = np.concatenate(parts)
    return (audio + 0.003 * random.standard_normal(audio.size)).astype(np.float32)


def write_config(path: Path, corpus: Path, run_directory: Path, **fields: object) -> Path:
    """A YAML file that trains the tiny model on ``corpus``; ``fields`` replace top-level ones."""
    config = {
        "run_directory": str(run_directory),
        "steps": 8,
        "log_every": 2,
        "evaluate_every": 4,
        "checkpoint_every": 2,
        "cache_directory": None,
        "data": {"train": {"path": str(corpus)}, "batch_seconds": 4.0, "batch_size": 8, "num_buckets": 1},
        "model": {"config": TINY_MODEL},
        "optimizer": {"learning_rate": 1e-3},
    }
    path.write_text(yaml.safe_dump({**config, **fields}))
    return path
