"""What PyTorch computes with a model: inputs, every hidden state, outputs, loss and gradients, in one file.

The file is made on a machine with torch and transformers, and compared with on any other; see :mod:`.evidence`.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from speech_flax.configuration import HubertConfig, SpeechConfig
from speech_flax.conversion.safetensors_file import read_metadata, read_safetensors, write_safetensors
from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor

SAMPLE_RATE = 16_000
GRADIENT = "gradients."
#: Outputs of the model classes, in the order of computation.
OUTPUTS = ("extract_features", "last_hidden_state", "embeddings", "logits")
_FORMAT = "speech_flax reference 1"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A stored reference.

    Attributes:
      path: The file.
      tensors: ``waveform.<row>``, ``inputs``, ``attention_mask``, ``labels`` (CTC), ``hidden_states.<n>``, the outputs,
        ``loss``, and ``gradients.<name>`` if they were asked for.
      architecture: Class of the model.
      versions: Of the libraries that computed it.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    architecture: str
    versions: Mapping[str, str]

    @property
    def compatibility(self) -> str:
        """Whose behaviour the reference shows."""
        return "transformers-4.37" if self.versions["transformers"].startswith("4.") else "transformers-5"


def example_waveforms() -> list[Float[np.ndarray, "samples"]]:
    """Two utterances of different, odd lengths: a voice-like buzz with gliding formants and noise, always the same."""
    random = np.random.default_rng(0)
    waveforms = []
    for samples in (2 * SAMPLE_RATE + 77, int(1.3 * SAMPLE_RATE) + 1):
        time = np.arange(samples) / SAMPLE_RATE
        pitch = 120 + 30 * np.sin(2 * np.pi * 1.7 * time)
        phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
        formant = 900 + 500 * np.sin(2 * np.pi * 0.9 * time)
        voice = sum(
            np.exp(-(((number * pitch - formant) / 600) ** 2)) * np.sin(number * phase) for number in range(1, 25)
        )
        loudness = 0.55 + 0.45 * np.sin(2 * np.pi * 3.1 * time)
        waveforms.append((0.05 * voice * loudness + 0.003 * random.standard_normal(samples)).astype(np.float32))
    return waveforms


def example_labels(config: SpeechConfig, rows: int) -> Int[np.ndarray, "rows labels"]:
    """Label ids for the CTC loss: no blank, a repeat, rows of different lengths padded with -100."""
    symbols = [symbol for symbol in range(config.vocab_size) if symbol != config.pad_token_id]
    labels = np.array(
        [[symbols[(3 * row + position // 2) % len(symbols)] for position in range(6)] for row in range(rows)]
    )
    labels[1:, 4:] = -100
    return labels


def output_weights(shape: Sequence[int]) -> Float[np.ndarray, "..."]:
    """Fixed weights that make a scalar of any output, for the gradients of models without CTC loss."""
    size = int(np.prod(shape))
    return (np.cos(np.arange(size)) / size).astype(np.float32).reshape(shape)


def main_output(architecture: str) -> str:
    """Name of the output that a model class is there for."""
    return "last_hidden_state" if architecture.endswith("Model") else "logits"


def write_reference(
    path: Path, directory: Path, config: SpeechConfig, waveforms: Sequence[np.ndarray], *, gradients: bool
) -> None:
    """Run Transformers' model in ``directory`` on ``waveforms`` and write what it computes to ``path``.

    Raises:
      ImportError: torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"a side-by-side run needs {error.name}: pip install torch transformers, or make the reference on "
            "a machine that has them (--write-reference FILE) and compare with --reference FILE"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    architecture = config.architectures[0]
    model = getattr(transformers, architecture).from_pretrained(directory, attn_implementation="eager").float().eval()
    extractor = _torch_extractor(directory, config)
    encoded = extractor(
        list(waveforms), sampling_rate=SAMPLE_RATE, padding=True, return_attention_mask=True, return_tensors="pt"
    )
    inputs = encoded.get("input_features", encoded.get("input_values"))
    arguments = {"attention_mask": encoded["attention_mask"], "output_hidden_states": True}
    tensors: dict[str, Any] = {f"waveform.{row}": waveform for row, waveform in enumerate(waveforms)}
    tensors |= {"inputs": inputs, "attention_mask": encoded["attention_mask"]}
    is_ctc = architecture.endswith("ForCTC")
    if is_ctc:
        labels = example_labels(config, len(waveforms))
        tensors["labels"] = labels
        arguments["labels"] = torch.from_numpy(labels)
    with torch.set_grad_enabled(gradients):
        outputs = model(inputs, **arguments)
        main = outputs[main_output(architecture)]
        loss = outputs.loss if is_ctc else (main * torch.from_numpy(output_weights(main.shape))).sum()
    if gradients:
        loss.backward()
    tensors |= {f"hidden_states.{number}": state for number, state in enumerate(outputs.hidden_states)}
    tensors |= {name: outputs[name] for name in OUTPUTS if name in outputs}
    tensors["loss"] = loss
    if gradients:
        tensors |= {
            GRADIENT + name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    _write(path, tensors, {"architecture": architecture, "versions": json.dumps(versions)})


def _torch_extractor(directory: Path, config: SpeechConfig) -> Any:
    """Transformers' feature extractor of the model, or the usual one of the family."""
    import transformers

    is_hubert = isinstance(config, HubertConfig)
    kind = transformers.Wav2Vec2FeatureExtractor if is_hubert else transformers.SeamlessM4TFeatureExtractor
    if (directory / "preprocessor_config.json").is_file():
        return kind.from_pretrained(directory)
    return kind(**default_extractor(config))


def default_extractor(config: SpeechConfig) -> dict[str, Any]:
    """Arguments of the feature extractor for a model that comes without one."""
    if isinstance(config, HubertConfig):
        return {"do_normalize": True, "return_attention_mask": True}
    mel_bins = config.feature_projection_input_dim // 2
    return {"feature_size": mel_bins, "num_mel_bins": mel_bins, "stride": 2}


def _write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    def arrays() -> Iterator[np.ndarray]:
        for tensor in tensors.values():
            yield tensor.detach().numpy() if hasattr(tensor, "detach") else tensor

    layout = {
        name: (tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))
        for name, tensor in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f".{path.name}.incomplete")
    try:
        write_safetensors(incomplete, layout, arrays(), {"format": _FORMAT, **metadata})
        incomplete.replace(path)
    finally:
        incomplete.unlink(missing_ok=True)


def read_reference(path: Path) -> Reference:
    """Open a reference.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFileError: it is damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make it with --write-reference on a machine with torch")
    tensors, metadata = read_safetensors(path), read_metadata(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointFileError(f"{path} is no reference of this library; make one with --write-reference")
    return Reference(path, tensors, metadata["architecture"], json.loads(metadata["versions"]))
