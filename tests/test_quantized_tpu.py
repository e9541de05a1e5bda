"""What the TPU's own compiler makes of quantised kernels; no TPU is needed."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxtune import aot, assemble, config, setup, sharding
from jaxtune.config import MeshConfig
from jaxtune.kernels import quantize
from jaxtune.plan import topologies
from tests import tiny

pytestmark = pytest.mark.slow
GIB = 2**30
USABLE = 15.75  # GiB of a v5e chip that programs may use
LLAMA_8B = tiny.SIZES | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
SMALL = tiny.SIZES | {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048,
    "max_position_embeddings": 4096,
}  # fmt: skip


def compiled(folder: Path, hf: dict[str, Any], topology: str, mesh: MeshConfig, **changes: Any):
    """(the compiled step, its assembly, bytes of its arguments as their shapes have it)."""
    (folder / "config.json").write_text(json.dumps(hf))
    values = config.Config().to_dict()
    values["model"] |= {"path": str(folder), "remat": "full"} | changes
    values["data"] |= {"train": "rows", "max_length": 2048}
    grid = sharding.make_mesh(mesh, topologies.devices(topologies.find(topology)))
    values["train"] |= {"batch_size": grid.size}
    asked = config.freeze(values)
    assembly = assemble.assemble(asked, folder, grid, weights=False)
    program = setup.program(asked, assembly, 100)
    inputs = setup.abstract_inputs(asked, assembly, program, grid)
    size = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(inputs)
    )
    return aot.compile_step(asked, assembly, program, grid), assembly, size


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_arguments_are_as_large_as_they_look_and_no_table_is_gathered(scheme):
    layout = quantize.Layout(scheme, (1024, 2816), (None, None))
    place = SingleDeviceSharding(topologies.devices(topologies.find("v5e:1x1"))[0])
    x_BTI, values, scale = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in [
            ((1, 2048, 1024), jnp.bfloat16),
            *((array.shape, array.dtype) for array in (layout.values, layout.scale)),
        ]
    )
    step = jax.jit(lambda x, v, s: quantize.matmul(x, v, s, layout))
    program = step.lower(x_BTI, values, scale).compile()
    wanted = sum(math.prod(a.shape) * a.dtype.itemsize for a in (x_BTI, values, scale))
    analysis = program.memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes == pytest.approx(wanted, rel=1e-3)
    text = program.as_text() or ""
    assert " gather(" not in text
    if scheme == "int8":  # the values are converted on their way into the product
        assert analysis.temp_size_in_bytes < 2**20


@pytest.mark.parametrize(("scheme", "kind"), [("int8", "s8"), ("nf4", "u8")])
def test_over_fsdp_it_is_the_values_that_travel(tmp_path, scheme, kind):
    found, assembly, size = compiled(tmp_path, SMALL, "v5e:2x2", MeshConfig(), quantize=scheme)
    sizes = {math.prod(layout.shape[1:]) for layout in assembly.quantized.values()}
    packed = {math.prod(layout.values.shape[1:]) for layout in assembly.quantized.values()}
    gathers = re.findall(
        r"= \(?(?:[^=]*, )?(\w+)\[([\d,]+)\][^=]* all-gather(?:-done)?\(", found.hlo
    )
    numbers = [(dtype, math.prod(map(int, shape.split(",")))) for dtype, shape in gathers]
    assert {n for dtype, n in numbers if dtype == kind} >= packed
    assert not [n for dtype, n in numbers if dtype in ("bf16", "f32") and n in sizes]
    assert found.arguments == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(("scheme", "most"), [("int8", 12.0), ("int4", 8.6), ("nf4", 8.6)])
def test_llama_8b_fits_on_one_chip(tmp_path, scheme, most):
    found, _, size = compiled(tmp_path, LLAMA_8B, "v5e:1x1", MeshConfig(), quantize=scheme)
    assert found.arguments == pytest.approx(size, rel=0.01)
    assert found.total / GIB < most < USABLE
