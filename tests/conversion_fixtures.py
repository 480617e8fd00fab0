"""Checkpoints in the genuine layouts of every format, made from Transformers' own random models.

The names are spelled out here by hand, apart from the library's rule tables, so that a slip in one shows.
"""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

WAV2VEC2_BERT = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "feature_projection_input_dim": 12,
    "conv_depthwise_kernel_size": 5,
    "classifier_proj_size": 10,
    "tdnn_dim": [8, 8, 8, 8, 12],
    "tdnn_kernel": [3, 3, 2, 1, 1],
    "xvector_output_dim": 6,
}
ADAPTER = {
    "add_adapter": True,
    "num_adapter_layers": 2,
    "output_hidden_size": 20,
    "use_intermediate_ffn_before_adapter": True,
}
HUBERT = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 10,
}
LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
#: Architecture and fields of the models that the matrix is filled with.
MODELS = {
    "w2v-bert": ("Wav2Vec2BertModel", WAV2VEC2_BERT),
    "w2v-bert relative": ("Wav2Vec2BertModel", {**WAV2VEC2_BERT, "position_embeddings_type": "relative"}),
    "w2v-bert rotary adapter ctc": (
        "Wav2Vec2BertForCTC",
        {**WAV2VEC2_BERT, **ADAPTER, "position_embeddings_type": "rotary"},
    ),
    "w2v-bert adapter": ("Wav2Vec2BertModel", {**WAV2VEC2_BERT, **ADAPTER, "output_hidden_size": 16}),
    "w2v-bert wide adapter": (
        "Wav2Vec2BertModel",
        {**WAV2VEC2_BERT, "add_adapter": True, "adapter_kernel_size": 8, "adapter_stride": 8},
    ),
    "w2v-bert sequence": (
        "Wav2Vec2BertForSequenceClassification",
        {**WAV2VEC2_BERT, "use_weighted_layer_sum": True, "num_labels": 4},
    ),
    "w2v-bert frames": ("Wav2Vec2BertForAudioFrameClassification", {**WAV2VEC2_BERT, "num_labels": 3}),
    "w2v-bert speaker": ("Wav2Vec2BertForXVector", {**WAV2VEC2_BERT, "num_labels": 5}),
    "hubert base": ("HubertModel", HUBERT),
    "hubert base ctc": ("HubertForCTC", HUBERT),
    "hubert large": ("HubertModel", {**HUBERT, **LARGE}),
    "hubert large ctc": ("HubertForCTC", {**HUBERT, **LARGE}),
    "hubert usual": ("HubertModel", {**HUBERT, "hidden_size": 128, "num_hidden_layers": 1}),
    "hubert adapters ctc": ("HubertForCTC", {**HUBERT, **LARGE, "adapter_attn_dim": 5}),
    "hubert sequence": (
        "HubertForSequenceClassification",
        {**HUBERT, "use_weighted_layer_sum": True, "num_labels": 4},
    ),
    "hubert batch norm": ("HubertModel", {**HUBERT, "conv_pos_batch_norm": True}),
}
#: Published sizes, for tests that are slow.
FULL_SIZE = {
    "full hubert-base": ("HubertModel", {}),
    "full hubert-base sequence": ("HubertForSequenceClassification", {"use_weighted_layer_sum": True, "num_labels": 4}),
    "full hubert-large ctc": (
        "HubertForCTC",
        {**LARGE, "vocab_size": 11, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096},
    ),
    "full hubert-xlarge": (
        "HubertModel",
        {**LARGE, "hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 5120},
    ),
    "full w2v-bert-2.0": ("Wav2Vec2BertModel", {}),
    "full w2v-bert-2.0 adapter": ("Wav2Vec2BertModel", {"add_adapter": True}),
}  # fmt: skip


def random_model(name: str) -> torch.nn.Module:
    """A model of Transformers whose every parameter is random, scales and biases of norms too."""
    architecture, fields = (MODELS | FULL_SIZE)[name]
    torch.manual_seed(len(name))
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def old_weight_norm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that weight normalisation had before PyTorch 2.1."""
    spelling = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, tensor in state.items():
        for new, old in spelling.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def write_transformers(model: torch.nn.Module, directory: Path, form: str) -> None:
    """A Transformers directory in one of the forms that are found on the hub."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if form.startswith("old weight norm"):
        state = old_weight_norm(state)
    if form.endswith("safetensors") and "sharded" not in form:
        save_file(state, directory / "model.safetensors", {"format": "pt"})
    elif form in ("float16", "bfloat16"):
        kind = getattr(torch, form)
        state = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        save_file(state, directory / "model.safetensors", {"format": "pt"})
    elif form == "sharded safetensors":
        for shard, names in _shards(state, directory / "model.safetensors").items():
            save_file({name: state[name] for name in names}, directory / shard, {"format": "pt"})
    elif form in ("bin", "old weight norm bin"):
        torch.save(state, directory / "pytorch_model.bin")
    elif form == "legacy bin":
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == "sharded bin":
        for shard, names in _shards(state, directory / "pytorch_model.bin").items():
            torch.save({name: state[name] for name in names}, directory / shard)
    else:
        raise ValueError(form)


def _shards(state: dict[str, torch.Tensor], path: Path) -> dict[str, list[str]]:
    names = list(state)
    half = len(names) // 2
    stem, suffix = path.name.split(".")
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": part for i, part in enumerate((names[:half], names[half:]))}
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    path.with_name(path.name + ".index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards


class Dictionary:
    """Pickles as fairseq's dictionary does."""

    def __init__(self, symbols: list[str]):
        self.symbols = ["<s>", "<pad>", "</s>", "<unk>", *symbols]
        self.count = [1] * len(self.symbols)
        self.indices = {symbol: index for index, symbol in enumerate(self.symbols)}
        self.bos_word, self.pad_word, self.eos_word, self.unk_word = self.symbols[:4]
        self.bos_index, self.pad_index, self.eos_index, self.unk_index, self.nspecial = 0, 1, 2, 3, 4


def _renamed(state: dict[str, torch.Tensor], substitutions: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in substitutions:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        else:
            raise ValueError(name)
        renamed[name] = tensor.clone()
    return renamed


def fairseq_file(model: torch.nn.Module, path: Path, settings: bool = True) -> None:
    """A HuBERT checkpoint of fairseq, with dictionaries and settings as objects of its classes."""
    norm = r"2.1" if model.config.feat_extract_norm == "layer" else "2"
    base = [
        (r"^masked_spec_embed$", "mask_emb"),
        (r"^feature_extractor\.conv_layers\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
        (r"^feature_extractor\.conv_layers\.(\d+)\.layer_norm\.", rf"feature_extractor.conv_layers.\1.{norm}."),
        (r"^feature_projection\.layer_norm\.", "layer_norm."),
        (r"^feature_projection\.projection\.", "post_extract_proj."),
        (r"^encoder\.pos_conv_embed\.conv\.(weight_[gv])$", r"encoder.pos_conv.0.\1"),
        (r"^encoder\.pos_conv_embed\.batch_norm\.", "encoder.pos_conv.0."),
        (r"^encoder\.pos_conv_embed\.conv\.", f"encoder.pos_conv.{int(model.config.conv_pos_batch_norm)}."),
        (r"^encoder\.layer_norm\.", "encoder.layer_norm."),
        (r"^encoder\.layers\.(\d+)\.attention\.", r"encoder.layers.\1.self_attn."),
        (r"^encoder\.layers\.(\d+)\.layer_norm\.", r"encoder.layers.\1.self_attn_layer_norm."),
        (r"^encoder\.layers\.(\d+)\.feed_forward\.intermediate_dense\.", r"encoder.layers.\1.fc1."),
        (r"^encoder\.layers\.(\d+)\.feed_forward\.output_dense\.", r"encoder.layers.\1.fc2."),
        (r"^encoder\.layers\.(\d+)\.final_layer_norm\.", r"encoder.layers.\1.final_layer_norm."),
    ]
    state = old_weight_norm(model.state_dict())
    cfg = {
        "_name": "hubert",
        "encoder_attention_heads": model.config.num_attention_heads,
        "layer_norm_first": model.config.do_stable_layer_norm,
        "activation_fn": "gelu",
        "conv_feature_layers": "[({0},10,5)] + [({0},3,2)] * 4 + [({0},2,2)] * 2".format(model.config.conv_dim[0]),
    }
    fine_tuned = hasattr(model, "lm_head")
    if fine_tuned:
        head = {"w2v_encoder.proj." + name.split(".")[1]: one for name, one in state.items() if "lm_head" in name}
        body = {name.removeprefix("hubert."): one for name, one in state.items() if "lm_head" not in name}
        weights = {f"w2v_encoder.w2v_model.{name}": one for name, one in _renamed(body, base).items()} | head
        task = {"target_dictionary": Dictionary([*"|ETAON", "H"][: model.config.vocab_size - 4])}
        cfg = {"_name": "hubert_ctc", "w2v_args": {"model": cfg}}
    else:
        weights = _renamed(state, base)
        weights |= {"label_embs_concat": torch.randn(12, 4), "final_proj.weight": torch.randn(4, 16)}
        weights["final_proj.bias"] = torch.randn(4)
        task = {"dictionaries": [Dictionary(["0", "1", "2"])]}
    content = {"args": None, "cfg": {"model": cfg} if settings else None, "model": weights, "task_state": task}
    content |= {"optimizer_history": [{"num_updates": 7}], "extra_state": {"epoch": 1}}
    _save_as_fairseq(content, path)


def _save_as_fairseq(content: dict, path: Path) -> None:
    """``torch.save`` with our dictionary class under the name of fairseq's."""
    import sys
    import types

    modules = {name: types.ModuleType(name) for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary")}
    modules["fairseq.data.dictionary"].Dictionary = Dictionary
    sys.modules |= modules
    home, Dictionary.__module__ = Dictionary.__module__, "fairseq.data.dictionary"
    try:
        torch.save(content, path)
    finally:
        Dictionary.__module__ = home
        for name in modules:
            del sys.modules[name]


def seamless_file(model: torch.nn.Module, path: Path) -> None:
    """w2v-BERT 2.0 as it was released."""
    layer = r"^encoder\.layers\.(\d+)\."
    weights = _renamed(
        model.state_dict(),
        [
            (r"^masked_spec_embed$", "mask_emb"),
            (r"^feature_projection\.layer_norm\.", "layer_norm."),
            (r"^feature_projection\.projection\.", "post_extract_proj."),
            (layer + r"ffn(1|2)_layer_norm\.", r"encoder.layers.\1.ffn\2.layer_norm."),
            (layer + r"ffn(1|2)\.intermediate_dense\.", r"encoder.layers.\1.ffn\2.w_1."),
            (layer + r"ffn(1|2)\.output_dense\.", r"encoder.layers.\1.ffn\2.w_2."),
            (layer + r"self_attn\.linear_(q|k|v|out)\.", r"encoder.layers.\1.self_attn.\2_proj."),
            (layer + r"self_attn\.distance_embedding\.", r"encoder.layers.\1.self_attn.rel_k_embedding."),
            (layer + r"conv_module\.depthwise_layer_norm\.", r"encoder.layers.\1.conv_module.layer_norm2."),
            (layer + r"(self_attn_layer_norm|final_layer_norm|conv_module)\.", r"encoder.layers.\1.\2."),
        ],
    )
    weights |= {"quantizer.vars": torch.randn(1, 6, 4), "quantizer.weight_proj.weight": torch.randn(6, 16)}
    weights |= {f"{name}.weight": torch.randn(4, 4) for name in ("project_q", "final_proj", "mlm_proj")}
    weights |= {"encoder.layer_norm.weight": torch.ones(16), "encoder.layer_norm.bias": torch.zeros(16)}
    torch.save({"model": weights}, path)


def fairseq2_file(model: torch.nn.Module, path: Path) -> None:
    """w2v-BERT 2.0 with the names of fairseq2, adapter included."""
    state = {name.removeprefix("wav2vec2_bert."): one for name, one in model.state_dict().items()}
    state = {name: one for name, one in state.items() if "lm_head" not in name and not name.startswith("adapter.proj")}
    layer, adapter = r"^encoder\.layers\.(\d+)\.", r"^adapter\.layers\.(\d+)\."
    weights = _renamed(
        state,
        [
            (r"^masked_spec_embed$", "masker.temporal_mask_embed"),
            (r"^feature_projection\.layer_norm\.", "encoder_frontend.post_extract_layer_norm."),
            (r"^feature_projection\.projection\.", "encoder_frontend.model_dim_proj."),
            (layer + r"ffn(1|2)\.intermediate_dense\.", r"encoder.layers.\1.ffn\2.inner_proj."),
            (layer + r"ffn(1|2)\.output_dense\.", r"encoder.layers.\1.ffn\2.output_proj."),
            (layer + r"self_attn\.linear_out\.", r"encoder.layers.\1.self_attn.output_proj."),
            (layer + r"self_attn\.linear_pos\.", r"encoder.layers.\1.self_attn.sdpa.r_proj."),
            (layer + r"self_attn\.linear_(q|k|v)\.", r"encoder.layers.\1.self_attn.\2_proj."),
            (layer + r"self_attn\.distance_embedding\.", r"encoder.layers.\1.self_attn.sdpa.rel_k_embed."),
            (layer + r"self_attn\.pos_bias_(u|v)$", r"encoder.layers.\1.self_attn.sdpa.\2_bias"),
            (layer + r"conv_module\.layer_norm\.", r"encoder.layers.\1.conv_layer_norm."),
            (layer + r"conv_module\.depthwise_layer_norm\.", r"encoder.layers.\1.conv.layer_norm."),
            (layer + r"conv_module\.", r"encoder.layers.\1.conv."),
            (layer + r"final_layer_norm\.", r"encoder.layers.\1.layer_norm."),
            (layer + r"(ffn1_layer_norm|ffn2_layer_norm|self_attn_layer_norm)\.", r"encoder.layers.\1.\2."),
            (r"^intermediate_ffn\.intermediate_dense\.", "encoder.proj1."),
            (r"^intermediate_ffn\.output_dense\.", "encoder.proj2."),
            (adapter + r"self_attn\.linear_out\.", r"encoder.adaptor_layers.\1.self_attn.output_proj."),
            (adapter + r"self_attn\.linear_(q|k|v)\.", r"encoder.adaptor_layers.\1.self_attn.\2_proj."),
            (adapter + r"ffn\.intermediate_dense\.", r"encoder.adaptor_layers.\1.ffn.inner_proj."),
            (adapter + r"ffn\.output_dense\.", r"encoder.adaptor_layers.\1.ffn.output_proj."),
            (adapter, r"encoder.adaptor_layers.\1."),
        ],
    )
    weights |= {"quantizer.entries": torch.randn(1, 6, 4), "quantizer.num_updates": torch.zeros(())}
    weights |= {"final_proj.weight": torch.randn(4, 4), "final_target_proj.weight": torch.randn(4, 4)}
    torch.save({"model": weights, "fs2": True}, path)


def s3prl_file(model: torch.nn.Module, path: Path) -> None:
    """The head of a sequence classification model, as s3prl keeps it apart from the model below."""
    import argparse

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    downstream = {f"projector.{name}": state[f"projector.{name}"] for name in ("weight", "bias")}
    downstream |= {f"model.post_net.linear.{name}": state[f"classifier.{name}"] for name in ("weight", "bias")}
    config = {"downstream_expert": {"modelrc": {"select": "UtteranceLevel", "UtteranceLevel": {"pooling": "Mean"}}}}
    content = {"Downstream": downstream, "Featurizer": {"weights": state["layer_weights"]}, "Config": config}
    torch.save(content | {"Args": argparse.Namespace(upstream="hubert"), "Step": 3, "Epoch": 0}, path)


def tensorflow_file(state: dict[str, np.ndarray], path: Path) -> None:
    """``tf_model.h5`` of a HuBERT CTC model as Keras lays it out."""
    with h5py.File(path, "w") as file:
        for name, tensor in state.items():
            is_norm = "norm" in name
            group = "hubert" if name.startswith("hubert.") else "lm_head"
            name = re.sub(r"\.(conv_layers|layers)\.(\d+)\.", r"/\1.\2/", name)
            parts = [
                piece if re.search(r"layers\.\d", piece) else piece.replace(".", "/") for piece in re.split("/", name)
            ]
            name = "/".join(parts)
            if name.endswith("/parametrizations/weight/original0"):
                name, tensor = name.replace("parametrizations/weight/original0", "weight_g"), tensor.reshape(-1, 1, 1)
            elif name.endswith("/parametrizations/weight/original1"):
                name = name.replace("parametrizations/weight/original1", "weight_v")
            elif is_norm:
                name = name.replace("/weight", "/gamma").replace("/bias", "/beta")
            elif name.endswith("/weight"):
                name, tensor = name.replace("/weight", "/kernel"), tensor.T
            file[f"{group}/tf_hubert_for_ctc/{name}:0"] = tensor
