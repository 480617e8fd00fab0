"""Linear layers with sharded weights: the numbers of a plain product, on every mesh."""

import json
import os
import subprocess
import sys

import pytest

from speech_flax.layers.collectives import compiler_options

#: On eight devices: relative differences from the plain product, and the types that gradients are summed in.
SCRIPT = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from speech_flax.layers import collectives
from speech_flax.layers.collectives import sum_scatter
from speech_flax.layers.linear import Linear, sharded_product

def difference(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.abs(one - other).max() / np.abs(other).max())

def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)

results = {}
inputs, kernel, cotangent = normal(0, 16, 5, 24), normal(1, 24, 40), normal(2, 16, 5, 40)
plain = jax.vjp(jnp.matmul, inputs, kernel)
plain = (plain[0], *plain[1](cotangent))
meshes = [((1, 8, 1), ""), ((2, 4, 1), ""), ((2, 2, 2), ""), ((1, 8, 1), "TPU v6 lite"), ((2, 2, 2), "TPU v5")]
for sizes, kind in meshes:
    collectives._device_kind = lambda: kind
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for axes in (("fsdp", "tensor"), ("tensor", "fsdp"), ("fsdp", None)):
        def both(inputs, kernel, cotangent):
            output, pull = jax.vjp(lambda inputs, kernel: sharded_product(inputs, kernel, axes), inputs, kernel)
            return output, *pull(cotangent)
        with jax.set_mesh(mesh):
            rows, own = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(*axes))
            compiled = jax.jit(both, in_shardings=(rows, own, rows), out_shardings=(rows, rows, own))
            sharded = compiled(inputs, kernel, cotangent)
        results[f"{sizes} {axes} {kind}"] = max(map(difference, sharded, plain))

mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
terms = normal(3, 8, 16, 24)  # one for each device
for rows, columns, kind in ((16, 24, ""), (8, 3, ""), (8, 1, ""), (16, 24, "TPU v6 lite")):
    collectives._device_kind = lambda: kind
    for dimension in range(2):
        own = terms[:, :rows, :columns] if dimension == 0 else terms[:, :rows, :columns].swapaxes(1, 2)
        scattered = jax.jit(jax.shard_map(
            lambda term: sum_scatter(term[0], "fsdp", dimension), mesh=mesh, in_specs=P("fsdp"),
            out_specs=P("fsdp") if dimension == 0 else P(None, "fsdp"), check_vma=False,
        ))(own)
        results[f"sum of {rows} x {columns} along {dimension} {kind}"] = difference(scattered, own.sum(0))

collectives._device_kind = lambda: ""

# The values are bfloat16's own, their sum is not: it must be taken in float32.
ones, small = jnp.ones((8, 1, 8), jnp.bfloat16), jnp.full((8, 1, 8), 1.0, jnp.bfloat16).at[1:].set(2.0**-10)
with jax.set_mesh(mesh):
    product = lambda kernel: (sharded_product(ones, kernel, ("fsdp", None)) * small).sum().astype("float32")
    gradient = jax.jit(jax.grad(product))(jnp.zeros((8, 8)))
results["bfloat16"] = difference(gradient, jnp.full((8, 8), 1 + 7 * 2.0**-10))

# Rows that the devices cannot share: as when parameters are made from one row.
inputs = normal(4, 3, 8)
with jax.set_mesh(mesh):
    output, params = Linear(8).init_with_output(jax.random.key(0), inputs)
results["rows"] = difference(output, inputs @ params["params"]["kernel"])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, float]:
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_sharded_products_and_their_gradients_are_those_of_whole_ones(results):
    """In float32 the order of a few dozen terms differs: by a few roundings of 6e-8."""
    assert {name: error for name, error in results.items() if name.startswith("(") and error > 1e-6} == {}
    assert sum(name.startswith("(") for name in results) == 15


def test_every_device_gets_its_part_of_a_sum(results):
    assert {name: error for name, error in results.items() if name.startswith("sum") and error > 1e-6} == {}


def test_gradients_of_bfloat16_products_are_summed_in_float32(results):
    assert results["bfloat16"] < 1e-6  # bfloat16 would lose all but the first term: 7e-3


def test_rows_that_devices_cannot_share_are_multiplied_whole(results):
    assert results["rows"] < 1e-6


def test_the_compiler_is_told_to_communicate_beside_other_work(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    gather = "xla_tpu_enable_sparse_core_collective_offload_all_gather"
    assert compiler_options("TPU v6 lite", 8)[gather] and not compiler_options("cpu", 8)
    for kind in ("TPU v5 lite", "TPU v5", "TPU v4"):
        assert compiler_options(kind, 16) == {"xla_tpu_enable_async_all_to_all": True}
    assert not compiler_options("TPU v5 lite", 32)  # refused there
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{gather}=false")
    assert gather not in compiler_options("TPU v6 lite", 8) and len(compiler_options("TPU v6 lite", 8)) == 4
