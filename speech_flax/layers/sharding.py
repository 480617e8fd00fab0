"""Where arrays live on a mesh: activations by row of the batch, parameters as one table says."""

import math
import re
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped

#: Mesh axes that the rows of a batch are spread over.
BATCH_AXES = ("data", "fsdp")

# Pattern of the whole parameter path -> axes. Leaves under encoder/layers carry a leading axis of layers.
_NORM = r"(\w*layer_norm|layer_norm\w*)/(scale|bias)"
_WIDENING = r"(intermediate_dense|linear_q|linear_k|linear_v|linear_pos|pointwise_conv1|q_proj|k_proj|v_proj)"
_NARROWING = r"(output_dense|linear_out|pointwise_conv2|out_proj)"
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
    # Encoder layers of both families
    (rf"encoder/layers/(.*/)?{_NORM}", P()),
    (rf"encoder/layers/.*/{_WIDENING}/kernel", P(None, "fsdp", "tensor")),
    (rf"encoder/layers/.*/{_NARROWING}/kernel", P(None, "tensor", "fsdp")),
    (rf"encoder/layers/.*/({_WIDENING}|{_NARROWING})/bias", P()),
    # Kernels of convolutions over frames are whole everywhere: they are small, and a sharded one makes the partitioner
    # send activations around instead (all-to-all over channels).
    (r"encoder/layers/.*/depthwise_conv/kernel", P(None, None, None, None)),
    (r"encoder/layers/.*/(distance_embedding/embedding|pos_bias_[uv])", P()),
    (r"encoder/layers/adapter_layer/norm/(scale|bias)", P()),
    (r"encoder/layers/adapter_layer/linear_1/kernel", P(None, "fsdp", None)),
    (r"encoder/layers/adapter_layer/linear_2/kernel", P(None, None, "fsdp")),
    (r"encoder/layers/adapter_layer/linear_[12]/bias", P()),
    # What comes before them
    (r"feature_extractor/conv_layers_\d+/conv/kernel", P()),
    (r"feature_extractor/conv_layers_\d+/conv/bias", P()),
    (rf"feature_extractor/conv_layers_\d+/{_NORM}", P()),
    (rf"feature_projection/{_NORM}", P()),
    (r"feature_projection/projection/kernel", P(None, "fsdp")),
    (r"feature_projection/projection/bias", P()),
    (r"masked_spec_embed", P()),
    (r"encoder/pos_conv_embed/conv/(kernel|weight_[gv]|bias)", P()),
    (r"encoder/pos_conv_embed/batch_norm/(scale|bias|mean|var)", P()),
    (rf"encoder/{_NORM}", P()),
    # What comes after them
    (rf"adapter/(.*/)?{_NORM}", P()),
    (r"adapter/(.*/)?(proj|linear_[qkv]|intermediate_dense)/kernel", P("fsdp", "tensor")),
    (r"adapter/.*/(linear_out|output_dense)/kernel", P("tensor", "fsdp")),
    (r"adapter/.*/(residual_conv|self_attn_conv)/kernel", P(None, None, "fsdp")),
    (r"adapter/.*/bias(?<!norm/bias)", P()),
    (rf"intermediate_ffn/{_WIDENING}/kernel", P("fsdp", "tensor")),
    (rf"intermediate_ffn/{_NARROWING}/kernel", P("tensor", "fsdp")),
    (r"intermediate_ffn/.*/bias", P()),
    # Heads: all but the largest are small, and some of their widths odd
    (r"lm_head/kernel", P("fsdp", None)),
    (r"lm_head/bias", P()),
    (r"(projector|classifier|feature_extractor|tdnn_\d+/kernel)/(kernel|bias)", P()),
    (r"layer_weights|objective/weight", P()),
)


class ShardingError(ValueError):
    """A mesh that does not fit the devices, the batch or the model."""


def parameter_spec(path: str) -> P:
    """The axes of the parameter at ``path`` (below the base model's or the head's name).

    Raises:
        ShardingError: when no rule, or more than one, matches.
    """
    matches = [spec for pattern, spec in PARAMETER_RULES if re.fullmatch(rf"(\w+/)?{pattern}", path)]
    if len(matches) != 1:
        raise ShardingError(f"{len(matches)} sharding rules match the parameter {path}; exactly one must")
    return matches[0]


def shard_batch(activations: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
    """Keep the rows of ``activations`` where they are, and everything else whole.

    Without it the partitioner may gather the global batch where parameters are sharded. Outside of a mesh with the
    batch axes this is the identity.
    """
    return activations if batch_shards() == 1 else jax.lax.with_sharding_constraint(activations, P(BATCH_AXES))


def map_rows(
    function: Callable[..., PyTree], *arrays: Shaped[Array, "batch ..."], whole: tuple[Array, ...] = ()
) -> PyTree:
    """``function(*arrays, *whole)``, each device computing it for its own rows alone; ``whole`` has none.

    For what treats every row by itself but which the partitioner cannot cut: it gathers the global batch for a Fourier
    transform on the CPU, for instance. Rows that the devices cannot share equally are not cut.
    """
    if batch_shards() == 1 or arrays[0].shape[0] % batch_shards():
        return function(*arrays, *whole)
    specs = (*(P(BATCH_AXES) for _ in arrays), *(P() for _ in whole))
    return jax.shard_map(function, in_specs=specs, out_specs=P(BATCH_AXES), check_vma=False)(*arrays, *whole)


def sum_over_rows(function: Callable[..., Array], *arrays: Shaped[Array, "batch ..."]) -> Array:
    """``function(*arrays)``, a sum over rows: each device computes it for its own, and one message adds the results.

    For sums that go through more numbers than they end with: the partitioner would send those around.
    """
    if batch_shards() == 1 or arrays[0].shape[0] % batch_shards():
        return function(*arrays)

    def of_own_rows(*arrays: Array) -> Array:
        return jax.lax.psum(function(*arrays), BATCH_AXES)

    return jax.shard_map(of_own_rows, in_specs=P(BATCH_AXES), out_specs=P(), check_vma=False)(*arrays)


def batch_shards(*axes: str) -> int:
    """Into how many parts the mesh that is set cuts a batch, along ``axes`` of it or all; 1 without such a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return 1
    return math.prod(mesh.shape[name] for name in axes or BATCH_AXES)
