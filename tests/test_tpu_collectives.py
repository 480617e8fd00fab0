"""Gathers and sums of gradients, compiled to machine code for slices on which the axes of a mesh lie differently.

Some of what the TPU compiler schedules it then has no code for: nothing less than compiling to the end shows that.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from speech_flax.layers.collectives import compiler_options
from speech_flax.layers.linear import sharded_product
from speech_flax.layers.sharding import BATCH_AXES
from speech_flax.training.experiment import MeshSettings
from speech_flax.training.sharding import make_mesh
from speech_flax.training.tpu_slices import parse_slice, prepare_compiler, slice_devices

pytestmark = pytest.mark.tpu

#: Slice, and devices that share parameters.
SLICES = [
    ("v5e:2x4", 8), ("v5e:4x4", 16), ("v5e:4x4", 4), ("v5e:4x8", 16), ("v5e:4x8", 32), ("v5e:8x8", 16),
    ("v5e:16x16", 16), ("v5e:16x16", 32), ("v5p:2x2x2", 8), ("v5p:4x4x4", 16), ("v6e:2x4", 8), ("v6e:8x8", 16),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiler():
    prepare_compiler()


@pytest.mark.parametrize(("name", "fsdp"), SLICES)
def test_gradients_of_sharded_weights_compile_to_machine_code(name, fsdp):
    slice_ = parse_slice(name)
    mesh = make_mesh(MeshSettings(data=slice_.num_chips // fsdp, fsdp=fsdp), slice_devices(slice_))

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    def loss(kernels, inputs):
        for kernel in kernels:
            inputs = jnp.tanh(sharded_product(inputs, kernel, ("fsdp", None)))
        return jnp.square(inputs.astype(jnp.float32)).sum()

    inputs = array((slice_.num_chips, 256, 1024), jnp.bfloat16, BATCH_AXES)
    kernels = [array((1024, 1024), jnp.float32, "fsdp", None)] * 3
    options = compiler_options(mesh.devices.flat[0].device_kind, mesh.size)
    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.grad(loss), out_shardings=[kernel.sharding for kernel in kernels], compiler_options=options
        )
        compiled = gradient.trace(kernels, inputs).lower(lowering_platforms=("tpu",)).compile()
    own = 3 * 1024 * 1024 * 4 // fsdp  # bytes of the gradients that one device keeps
    assert own <= compiled.memory_analysis().output_size_in_bytes < 1.01 * own
