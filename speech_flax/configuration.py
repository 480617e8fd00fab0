"""Model configurations: the fields, defaults and file format of Hugging Face Transformers, as frozen dataclasses."""

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, ClassVar

CONFIG_FILE = "config.json"

#: What a classifier learns; see ``SpeechConfig.problem``.
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")

#: Whose behaviour the models reproduce where implementations differ; see ``SpeechConfig.compatibility``.
COMPATIBILITIES = ("transformers-4.37", "transformers-5", "fairseq", "corrected")


#: Fields that are at least 1, where they are given.
_COUNTS = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "mask_time_length")
_COUNTS += ("mask_feature_length", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "adapter_stride")


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """Returns ``value`` as the type that ``hint`` names, taking JSON's lists for tuples and whole numbers for floats.

    Raises:
      TypeError: the value does not fit; the message names the field.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        element = typing.get_args(hint)[0]
        return tuple(_coerced(f"{name}[{i}]", item, element) for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", None) if typing.get_origin(hint) is None else str(hint)
    raise TypeError(f"config field {name!r} must be {wanted}, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """What both model families share, and how a configuration is read and written.

    Configurations are immutable and hashable, so that they can be attributes of Flax modules. Fields of a
    ``config.json`` that this library does not use (``transformers_version``, say) are kept in ``additional_fields``
    as (name, JSON text) pairs and written back.

    ``compatibility`` says whose behaviour counts where implementations differ, known bugs included:
    ``"transformers-4.37"`` (default), ``"transformers-5"`` or ``"fairseq"``; ``"corrected"`` has none of the bugs: an
    utterance gives the same outputs alone and padded in a batch. It is written to ``config.json`` unless it is the
    default.
    """

    model_type: ClassVar[str]
    #: Fields of the published sizes, by the name that :meth:`named` takes.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    compatibility: str = COMPATIBILITIES[0]
    vocab_size: int | None = None
    layerdrop: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0

    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False

    pad_token_id: int = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    output_hidden_states: bool = False
    output_attentions: bool = False
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None
    architectures: tuple[str, ...] | None = None
    additional_fields: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if self.ctc_loss_reduction not in ("sum", "mean", "none"):
            raise ValueError(f"ctc_loss_reduction must be 'sum', 'mean' or 'none', not {self.ctc_loss_reduction!r}")
        if self.compatibility not in COMPATIBILITIES:
            known = ", ".join(map(repr, COMPATIBILITIES))
            raise ValueError(f"compatibility must be one of {known}, not {self.compatibility!r}")
        if self.problem_type not in (None, *PROBLEMS):
            known = ", ".join(map(repr, PROBLEMS))
            raise ValueError(f"problem_type must be one of {known}, not {self.problem_type!r}")
        for name, value in vars(self).items():
            if name in _COUNTS and value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
            if (name == "layerdrop" or name.endswith(("_dropout", "_prob"))) and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {value}")
        if self.attention_dropout == 1:
            raise ValueError("attention_dropout must be below 1: nothing would be attended to")

    @classmethod
    def named(cls, name: str, **changes: Any) -> "SpeechConfig":
        """The architecture of a published model: its sizes and norms, with every rate and switch at its default.

        Raises:
          ValueError: an unknown name; the message lists those that are known.
          TypeError: see :meth:`replace`, which ``changes`` go through.
        """
        if name not in cls.PRESETS:
            raise ValueError(f"{cls.__name__} has no size {name!r}; known are {', '.join(map(repr, cls.PRESETS))}")
        return cls(**cls.PRESETS[name]).replace(**changes)

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def has_mask_embedding(self) -> bool:
        """Whether the model has the vector that SpecAugment puts in place of masked frames."""
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0

    @property
    def problem(self) -> str:
        """What a classifier learns: ``problem_type``, by default a value if there is one label, else one of several."""
        if self.problem_type is not None:
            return self.problem_type
        return PROBLEMS[0] if self.num_labels == 1 else PROBLEMS[1]

    @property
    def label2id(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.id2label)}

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names that :meth:`from_dict` understands."""
        return (*(f.name for f in dataclasses.fields(cls) if f.name != "additional_fields"), "num_labels")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "SpeechConfig":
        """Builds a configuration from the content of a ``config.json``.

        Raises:
          TypeError: a value has the wrong type.
          ValueError: a value is impossible, or ``model_type`` names another family.
        """
        fields = dict(fields)
        model_type = fields.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"this is a configuration of a {model_type!r} model, not of {cls.model_type!r}")
        fields.pop("label2id", None)
        num_labels = fields.pop("num_labels", None)
        if isinstance(fields.get("id2label"), dict):
            labels = {int(index): label for index, label in fields["id2label"].items()}
            if sorted(labels) != list(range(len(labels))):
                raise ValueError(f"id2label must name the labels 0 to {len(labels) - 1}, not {sorted(labels)}")
            fields["id2label"] = tuple(labels[index] for index in sorted(labels))
        if num_labels is not None:
            named = fields.setdefault("id2label", tuple(f"LABEL_{index}" for index in range(num_labels)))
            if len(named) != num_labels:
                raise ValueError(f"id2label names {len(named)} labels, and num_labels is {num_labels}")
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)} - {"additional_fields"}
        additional = tuple((name, json.dumps(value)) for name, value in sorted(fields.items()) if name not in known)
        values = {name: _coerced(name, value, hints[name]) for name, value in fields.items() if name in known}
        return cls(**values, additional_fields=additional)

    def to_dict(self) -> dict[str, Any]:
        """The content of the ``config.json`` that Transformers reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "additional_fields"}
        fields["id2label"] = {str(index): label for index, label in enumerate(self.id2label)}
        fields["label2id"] = self.label2id
        fields["model_type"] = self.model_type
        if self.compatibility == COMPATIBILITIES[0]:
            del fields["compatibility"]
        return fields | {name: json.loads(text) for name, text in self.additional_fields}

    def replace(self, **changes: Any) -> "SpeechConfig":
        """A copy with some fields changed, each checked as :meth:`from_dict` checks it; ``num_labels`` works too.

        Raises:
          TypeError: a value has the wrong type, or a name is no field of this configuration.
        """
        unknown = set(changes) - set(self.field_names())
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {sorted(unknown)[0]!r}")
        current = self.to_dict()
        if "num_labels" in changes:
            current.pop("id2label")
        return type(self).from_dict(current | changes)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> "SpeechConfig":
        """Reads ``config.json`` in a local directory.

        Raises:
          FileNotFoundError: the directory holds no ``config.json``.
        """
        path = Path(directory) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path} does not hold a JSON object")
        config = cls.from_dict(fields)
        return config.replace(**changes) if changes else config

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes ``config.json`` into ``directory``, which is made if it does not exist."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(directory) / CONFIG_FILE).write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec2BertConfig(SpeechConfig):
    """Configuration of a Wav2Vec2-BERT model (Seamless Communication et al. 2023, arXiv:2312.05187, section 3.2.1).

    Field names and defaults are those of ``transformers.Wav2Vec2BertConfig``; the defaults describe
    ``facebook/w2v-bert-2.0`` (580 M parameters).

    Raises:
      ValueError: an unknown ``position_embeddings_type``, an even ``conv_depthwise_kernel_size``, an intermediate
        feed-forward layer without adapter, an adapter kernel too wide for its stride, or a ``hidden_size`` that the
        heads do not divide.
    """

    model_type: ClassVar[str] = "wav2vec2-bert"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"w2v-bert-2.0": {}}

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    feature_projection_input_dim: int = 160
    hidden_act: str = "swish"

    hidden_dropout: float = 0.0
    activation_dropout: float = 0.0
    attention_dropout: float = 0.0
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    conformer_conv_dropout: float = 0.1

    position_embeddings_type: str | None = "relative_key"
    rotary_embedding_base: int = 10000
    max_source_positions: int = 5000
    left_max_position_embeddings: int = 64
    right_max_position_embeddings: int = 8
    conv_depthwise_kernel_size: int = 31

    add_adapter: bool = False
    adapter_kernel_size: int = 3
    adapter_stride: int = 2
    num_adapter_layers: int = 1
    adapter_act: str = "relu"
    use_intermediate_ffn_before_adapter: bool = False
    output_hidden_size: int | None = None

    classifier_proj_size: int = 768
    tdnn_dim: tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512

    def __post_init__(self):
        super().__post_init__()
        if self.output_hidden_size is None:
            object.__setattr__(self, "output_hidden_size", self.hidden_size)
        if self.position_embeddings_type not in (None, "relative_key", "relative", "rotary"):
            raise ValueError(
                "position_embeddings_type must be 'relative_key', 'relative', 'rotary' or None, "
                f"not {self.position_embeddings_type!r}"
            )
        if self.conv_depthwise_kernel_size % 2 == 0:
            raise ValueError(f"conv_depthwise_kernel_size must be odd, not {self.conv_depthwise_kernel_size}")
        if self.use_intermediate_ffn_before_adapter and not self.add_adapter:
            raise ValueError("use_intermediate_ffn_before_adapter needs add_adapter to be true")
        widest = 2 * (self.adapter_stride // 2) + 1  # Transformers pads by half the stride and counts half the kernel
        if self.add_adapter and self.adapter_kernel_size > widest and self.compatibility != "corrected":
            raise ValueError(
                f"adapter_kernel_size {self.adapter_kernel_size} leaves fewer frames than are counted with "
                f"adapter_stride {self.adapter_stride}, where Transformers fails too; take {widest} at most, or set "
                "compatibility to 'corrected'"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    def replace(self, **changes: Any) -> "SpeechConfig":
        if "hidden_size" in changes and self.output_hidden_size == self.hidden_size:
            changes = {"output_hidden_size": None} | changes  # it follows the hidden size
        return super().replace(**changes)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Audio samples per frame of logits at 10 ms per spectrogram frame and 80 mel bins (as in Transformers 5)."""
        ratio = self.feature_projection_input_dim * 2
        return ratio * self.adapter_stride**self.num_adapter_layers if self.add_adapter else ratio


def _hubert_size(hidden_size: int, num_hidden_layers: int, intermediate_size: int) -> dict[str, Any]:
    """What HuBERT large and xlarge share: layer norm in every convolution, and before every sub-layer."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 16,
        "intermediate_size": intermediate_size,
        "feat_extract_norm": "layer",
        "conv_bias": True,
        "do_stable_layer_norm": True,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubertConfig(SpeechConfig):
    """Configuration of a HuBERT model (Hsu et al. 2021, arXiv:2106.07447, table 1).

    Field names and defaults are those of ``transformers.HubertConfig``, with the fields that its models read without
    declaring them: ``adapter_attn_dim``, ``add_adapter`` and ``output_hidden_size``. The defaults describe HuBERT base
    (94 M parameters); large has 315 M, xlarge 963 M.

    Raises:
      ValueError: ``conv_dim``, ``conv_stride`` and ``conv_kernel`` of different lengths, an unknown
        ``feat_extract_norm``, a ``hidden_size`` that the heads or the groups of the positional convolution do not
        divide, or an ``output_hidden_size`` that no layer could make.
    """

    model_type: ClassVar[str] = "hubert"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "hubert-base": {},
        "hubert-large": _hubert_size(1024, 24, 4096),
        "hubert-xlarge": _hubert_size(1280, 48, 5120),
    }

    vocab_size: int | None = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    do_stable_layer_norm: bool = False

    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_layer_norm: bool = True
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1

    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    conv_pos_batch_norm: bool = False

    adapter_attn_dim: int | None = None
    add_adapter: bool = False
    output_hidden_size: int | None = None

    classifier_proj_size: int = 256

    def __post_init__(self):
        super().__post_init__()
        lengths = {name: len(getattr(self, name)) for name in ("conv_dim", "conv_stride", "conv_kernel")}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"the convolutional layers need one entry each; there are: {listed}")
        if self.feat_extract_norm not in ("group", "layer"):
            raise ValueError(f"feat_extract_norm must be 'group' or 'layer', not {self.feat_extract_norm!r}")
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {name} {getattr(self, name)}")
        if self.add_adapter and self.output_hidden_size not in (None, self.hidden_size):
            raise ValueError(
                f"HuBERT has no adapter that could make output_hidden_size {self.output_hidden_size} of hidden_size "
                f"{self.hidden_size}; leave add_adapter false"
            )

    @property
    def num_feat_extract_layers(self) -> int:
        """Convolutional layers."""
        return len(self.conv_dim)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Audio samples per frame of logits."""
        return math.prod(self.conv_stride)
