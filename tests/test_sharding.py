"""Where parameters live on a mesh: one rule for each, and sizes that fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

import speech_flax
from speech_flax.layers.sharding import ShardingError, parameter_spec
from speech_flax.training.experiment import MeshSettings, OptimizerSettings
from speech_flax.training.optimizer import Optimizer, decay_mask
from speech_flax.training.sharding import check_heads, make_mesh, state_shardings
from speech_flax.training.step import TrainState

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
BERT_VARIANTS = [
    *({"position_embeddings_type": kind} for kind in ("relative_key", "relative", "rotary", None)),
    {
        "add_adapter": True,
        "num_adapter_layers": 2,
        "output_hidden_size": 8,
        "use_intermediate_ffn_before_adapter": True,
    },
    {"use_weighted_layer_sum": True, "mask_time_prob": 0.0},
]
HUBERT_SMALL = {
    **SMALL,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embedding_groups": 2,
}
HUBERT_VARIANTS = [
    {},
    {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True, "adapter_attn_dim": 4},
    {"conv_pos_batch_norm": True, "feat_proj_layer_norm": False},
    {"use_weighted_layer_sum": True},
]
HEADS = ("Model", "ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector")


def variants():
    for family, small, changes, inputs in (
        ("Wav2Vec2Bert", SMALL, BERT_VARIANTS, jnp.zeros((1, 64, 160))),
        ("Hubert", HUBERT_SMALL, HUBERT_VARIANTS, jnp.zeros((1, 3200))),
    ):
        for head in HEADS:
            for change in changes:
                if hasattr(speech_flax, family + head) and not (change.get("add_adapter") and "Classification" in head):
                    yield pytest.param(family, head, {**small, **change}, inputs, id=f"{family}{head}-{change}")


def parameters(family: str, head: str, fields: dict, inputs) -> dict:
    config = getattr(speech_flax, f"{family}Config").from_dict(fields)
    model = getattr(speech_flax, family + head)(config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))["params"]


def paths(tree: dict) -> list[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [("/".join(entry.key for entry in path), leaf.shape) for path, leaf in leaves]


@pytest.mark.parametrize(("family", "head", "fields", "inputs"), list(variants()))
def test_every_parameter_has_exactly_one_rule_of_its_rank(family, head, fields, inputs):
    for path, shape in paths(parameters(family, head, fields, inputs)):
        spec = parameter_spec(path)  # raises unless exactly one rule matches
        assert len(spec) <= len(shape), path
        if path.endswith(("kernel", "weight_v")) and "encoder/layers" in path:
            assert len(spec) == len(shape) and spec[0] is None, f"{path}: the axis of layers stays whole"


def test_parameter_without_a_rule_is_refused():
    with pytest.raises(ShardingError, match="0 sharding rules match the parameter encoder/surprise/kernel"):
        parameter_spec("encoder/surprise/kernel")


def test_weight_decay_of_hubert_spares_norms_and_biases():
    for variant in HUBERT_VARIANTS:
        params = parameters("Hubert", "ForCTC", {**HUBERT_SMALL, **variant}, jnp.zeros((1, 3200)))
        leaves = jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
        decayed = {"/".join(entry.key for entry in path) for path, decays in leaves if decays}
        assert {name for name, _ in paths(params)} - decayed == {
            name
            for name, _ in paths(params)
            if name.endswith(("/bias", "/scale", "/mean", "/var")) or name.endswith("masked_spec_embed")
        }


@pytest.fixture(scope="module")
def state() -> TrainState:
    params = parameters("Wav2Vec2Bert", "ForCTC", SMALL, jnp.zeros((1, 64, 160)))
    return jax.eval_shape(lambda: TrainState.create(params_like(params), Optimizer(OptimizerSettings(), 10)))


def params_like(shapes: dict) -> dict:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def test_moments_live_where_their_parameter_does(state):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    shardings = state_shardings(state, mesh)
    leaves = jax.tree_util.tree_flatten_with_path(shardings)[0]
    specs = {jax.tree_util.keystr(path): sharding.spec for path, sharding in leaves}
    own = {name.removeprefix(".params"): spec for name, spec in specs.items() if name.startswith(".params")}
    sharded = 0
    for name, spec in own.items():
        moments = [other for key, other in specs.items() if key.endswith((f".mu{name}", f".nu{name}"))]
        assert moments == [spec, spec], name
        sharded += spec != P()
    assert sharded > 10
    assert specs[".step"] == specs[".average_norm"] == P()


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def test_width_that_an_axis_does_not_divide_says_what_to_change(state):
    with pytest.raises(ShardingError, match=r"mesh.fsdp = 3 does not divide the width \d+ of .*kernel; choose 1"):
        state_shardings(state, abstract_mesh(1, 3, 1))


def test_heads_that_an_axis_does_not_divide_say_what_to_change():
    check_heads(abstract_mesh(2, 1, 4), 16)
    message = "mesh.tensor = 8 does not divide the model's 12 attention heads; choose 1, 2 or 4"
    with pytest.raises(ShardingError, match=re.escape(message)):
        check_heads(abstract_mesh(1, 1, 8), 12)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (-1, 2, 1), (-1, -1, 1), (0, 1, 1), (1, -2, 1)])
def test_mesh_that_does_not_fit_one_device_is_refused(sizes):
    with pytest.raises(ShardingError, match="mesh"):
        make_mesh(MeshSettings(*sizes), jax.devices()[:1])


@pytest.mark.parametrize(("sizes", "devices", "fsdp"), [((-1, 16, 1), 1, 1), ((-1, 16, 1), 8, 8), ((2, 1, 3), 4, 1)])
def test_mesh_for_another_number_of_devices_says_which_would_fit(sizes, devices, fsdp):
    stand_ins = [jax.devices()[0]] * devices
    with pytest.raises(ShardingError) as raised:
        make_mesh(MeshSettings(*sizes), stand_ins)
    assert f"does not fit {devices} device(s)" in str(raised.value)
    assert f"--mesh.data -1 --mesh.fsdp {fsdp} --mesh.tensor 1 would fit" in str(raised.value)
