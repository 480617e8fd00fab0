"""What is compared: a model class with a configuration, its inputs and its weights. NumPy alone."""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np

REFERENCES = Path(__file__).parent / "references"

#: Fields that make each family tiny; everything else keeps its default.
TINY = {
    "Wav2Vec2Bert": {
        "vocab_size": 7,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "feature_projection_input_dim": 6,
        "conv_depthwise_kernel_size": 5,
        "left_max_position_embeddings": 4,
        "right_max_position_embeddings": 2,
        "classifier_proj_size": 10,
        "num_labels": 4,
        "tdnn_dim": (8, 8, 9),
        "tdnn_kernel": (3, 2, 1),
        "tdnn_dilation": (1, 2, 1),
        "xvector_output_dim": 6,
    },
    "Hubert": {
        "vocab_size": 7,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "conv_dim": (8, 8, 10),
        "conv_kernel": (6, 3, 2),
        "conv_stride": (4, 2, 1),
        "num_conv_pos_embeddings": 6,
        "num_conv_pos_embedding_groups": 3,
        "classifier_proj_size": 10,
        "num_labels": 4,
    },
}

#: Every variant runs on the same values twice: all frames valid and no mask, and the lengths of the variant.
BATCHES = ("unmasked", "masked")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model class and what its configuration changes.

    Attributes:
      model: Name of the class, in both libraries.
      name: What is special about the variant, in file names and in the table.
      config: Fields that differ from the tiny configuration of the family.
      labels: ``"ctc"``, ``"classes"``, ``"frames"`` or ``None``: a fixed weighted sum of the last state is the loss.
      mask_time_indices: Whether frames are replaced by the mask embedding.
      lengths: Valid encoder frames of each item in the masked batch; the longest is the number of frames.
      differs_in_5: Transformers 5 computes something else; the live comparison sets ``compatibility`` accordingly.
    """

    model: str
    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    labels: str | None = None
    mask_time_indices: bool = False
    lengths: tuple[int, ...] = (13, 9, 6)
    differs_in_5: bool = False

    @property
    def id(self) -> str:
        return f"{self.model}-{self.name}".replace(",", "").replace(" ", "-")

    @property
    def family(self) -> str:
        return next(family for family in TINY if self.model.startswith(family))

    @property
    def fields(self) -> dict[str, Any]:
        return TINY[self.family] | self.config

    @property
    def compatibility_of_5(self) -> str:
        """The setting that computes what Transformers 5 does; the default one if that is the same: compiled once."""
        return "transformers-5" if self.differs_in_5 else "transformers-4.37"

    @property
    def reference(self) -> Path:
        return REFERENCES / f"{self.id}.npz"


def random_state(name: str) -> np.random.RandomState:
    """A stream of its own for every name; NumPy promises that RandomState never changes."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter by its name in Transformers: none is trivial, and activations stay of order one."""
    draws = random_state(name).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return np.exp(0.3 * draws)
    if name.endswith(("original0", "weight_g")):
        return np.abs(1 + 0.3 * draws)
    if len(shape) < 2:
        return 1 + 0.3 * draws if name.endswith(".weight") else 0.3 * draws
    return draws / np.float32(np.sqrt(np.prod(shape[1:])))


def inputs(variant: Variant, batch: str) -> dict[str, np.ndarray]:
    """Arguments of the model, as Transformers names them; what lies in the padding is as random as the rest."""
    frames, count = max(variant.lengths), len(variant.lengths)
    lengths = variant.lengths if batch == "masked" else (frames,) * count
    random = random_state("inputs")
    if variant.family == "Wav2Vec2Bert":
        values = random.standard_normal((count, frames, variant.fields["feature_projection_input_dim"]))
        arguments, sizes = {"input_features": values.astype(np.float32)}, lengths
    else:
        sizes = [samples_of(length, variant.fields) for length in lengths]
        values = random.standard_normal((count, max(sizes)))
        arguments = {"input_values": values.astype(np.float32)}
    if batch == "masked":
        mask = np.arange(max(sizes)) < np.array(sizes)[:, None]
        arguments["attention_mask"] = mask.astype(np.int32)
    if variant.mask_time_indices:
        arguments["mask_time_indices"] = random.uniform(size=(count, frames)) < 0.3
    if variant.labels == "ctc":
        arguments["labels"] = np.array([[3, -100, 3, 1], [5, 2, -100, -100], [-100, 4, -100, -100]], np.int32)[:count]
    elif variant.labels == "classes":
        arguments["labels"] = np.array([2, 0, 3], np.int32)[:count]
    elif variant.labels == "frames":
        classes = random.randint(0, variant.fields["num_labels"], (count, frames))
        arguments["labels"] = np.eye(variant.fields["num_labels"], dtype=np.float32)[classes]
    return arguments


def samples_of(frames: int, fields: dict[str, Any]) -> int:
    """A number of samples that the convolutions of HuBERT make ``frames`` frames of: a few more than the fewest."""
    for kernel, stride in zip(reversed(fields["conv_kernel"]), reversed(fields["conv_stride"]), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames + 1


def probe(shape: tuple[int, ...]) -> np.ndarray:
    """Weights of the states in the loss of a model without labels."""
    return random_state("probe").standard_normal(shape).astype(np.float32)


def sketch(name: str, gradient: np.ndarray) -> np.ndarray:
    """Four random projections of a gradient, which keep its length: what is stored of it."""
    directions = random_state("sketch " + name).standard_normal((4, gradient.size))
    return (directions @ gradient.ravel().astype(np.float64) / 2).astype(np.float32)
