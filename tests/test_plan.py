"""jaxtune plan: what a step costs by count and by compiler, what fits, what is fastest."""

import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import jax
import pytest

from jaxtune import aot, assemble, cli, config, estimate, setup, sharding, tree
from jaxtune.errors import ConfigError, ModelError
from jaxtune.hf import load
from jaxtune.models import families
from jaxtune.plan import command, facts, hlo, report, search, sizes, topologies
from jaxtune.plan.facts import Facts

GIB = 2**30
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
D, F, Q, K, V, T, B, R = 256, 384, 256, 128, 512, 128, 4, 16
LAYER = {"qkv": D * (Q + 2 * K), "o": Q * D, "in": 2 * D * F, "down": F * D}
N = 2 * sum(LAYER.values())
# Both sides of every adapted matrix of a layer: q, k, v, o, gate, up, down.
SIDES = (D + Q) + 2 * (D + K) + (Q + D) + 3 * (D + F)

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(SMALL))
    return tmp_path / "base"


@pytest.fixture
def page(folder, monkeypatch) -> Path:
    """A config file of the small model, and a cache of plans of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    file = folder.parent / "page.py"
    file.write_text(
        "from jaxtune.config import default_config\n"
        'TOPOLOGY = "v5litepod-1"\n'
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.model.path = {str(folder)!r}\n"
        f"    config.data.max_length, config.train.batch_size = {T}, {B}\n"
        "    config.train.steps = 1000\n"
        "    return config\n"
    )
    return file


def _config(folder: Path, **changes: Any) -> config.Config:
    base = {"model.path": str(folder), "data.max_length": T, "train.batch_size": B}
    return config.replaced(config.Config(), base | {"model.remat": "full"} | changes)


def _assembled(folder: Path, mesh=None, **changes: Any):
    settings = _config(folder, **changes)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1]) if mesh is None else mesh
    return settings, assemble.assemble(settings, folder, mesh, weights=False), mesh


def _flops(folder: Path, **changes: Any) -> estimate.Flops:
    settings, assembly, _ = _assembled(folder, **changes)
    return estimate.flops(settings, assembly)


def test_a_frozen_matrix_costs_four_and_its_adapter_six(folder):
    counted = _flops(folder, **{"model.remat": "none"})
    seen = 4 * (T + 1) / 2 * Q
    assert counted.projections == 4 * N
    assert counted.adapters == 2 * 6 * R * SIDES
    assert counted.attention == 2 * 3.5 * seen
    assert counted.head == 4 * D * V
    assert (counted.again, counted.attention_again) == (0, 0)


def test_full_fine_tuning_costs_six(folder):
    counted = _flops(folder, **{"lora.r": 0, "model.remat": "none"})
    assert (counted.projections, counted.adapters, counted.head) == (6 * N, 0, 6 * D * V)


def test_layers_below_the_lowest_adapter_cost_two(folder):
    counted = _flops(folder, **{"lora.layers_to_transform": (1,), "model.remat": "full"})
    assert counted.projections == (2 + 4) * N / 2
    assert counted.adapters == 6 * R * SIDES
    assert counted.attention == (1 + 3.5) * 4 * (T + 1) / 2 * Q
    assert counted.attention_again == 4 * (T + 1) / 2 * Q


@pytest.mark.parametrize(
    ("policy", "again", "attention"),
    [
        # Nobody asks again for what the last projection gives: it is only added to the stream.
        ("full", ("qkv", "o", "in"), 1),
        ("attention", ("o", "in"), 0),
        ("projections", ("o",), 0),
    ],
)
def test_what_remat_does_again(folder, policy, again, attention):
    counted = _flops(folder, **{"model.remat": policy, "lora.target_modules": ("q_proj",)})
    low, high = 2 * R * D, 2 * R * Q
    both = low + (high if "qkv" in again else 0)
    assert counted.again == 2 * (2 * sum(LAYER[name] for name in again) + both)
    assert counted.attention_again == 2 * attention * 4 * (T + 1) / 2 * Q


def test_keys_that_a_token_sees(folder):
    _, assembly, _ = _assembled(folder)
    window = families.read(SMALL | {"model_type": "mistral", "sliding_window": 3})[1]
    both_ways = families.read(sizes.shipped()["facebookai/xlm-roberta-base"])[1]
    assert estimate.keys_seen(assembly.model, 0, 4) == (1 + 2 + 3 + 4) / 4
    assert estimate.keys_seen(window, 0, 5) == (1 + 2 + 3 + 3 + 3) / 5
    assert estimate.keys_seen(both_ways, 0, 5) == 5


def test_only_the_experts_a_token_visits_count():
    model = families.read(sizes.shipped()["qwen/qwen3-30b-a3b"])[1]
    found = estimate.matrices(model, 0)
    experts = sum(m.size for name, m in found.items() if ".experts." in name)
    assert experts == 3 * 2048 * 768 * 8
    active = 48 * sum(m.size for m in found.values()) + 2048 * 151936
    assert active == pytest.approx(3.0e9, rel=0.02)  # A3B


@pytest.mark.parametrize("policy", ["none", "projections", "attention", "full"])
def test_the_count_is_what_xla_compiles(folder, policy):
    settings, assembly, mesh = _assembled(folder, **{"model.remat": policy})
    program = setup.program(settings, assembly, 1)
    compiled = aot.compile_step(settings, assembly, program, mesh)
    hidden = ("attention", "vocabulary")
    counts = hlo.count(compiled.hlo, trips=dict.fromkeys(hidden, 1), apart=hidden)
    counted = estimate.flops(settings, assembly)
    wanted = counted.projections + counted.adapters + counted.again
    assert counts.flops / (B * T) == pytest.approx(wanted, rel=1e-6)
    assert counts.unknown == {}
    assert compiled.arguments == estimate.memory(settings, assembly, program, mesh).arguments


@pytest.mark.parametrize("changes", [{"model.remat": "none"}, {"lora.r": 0}])
def test_the_large_temporaries_are_in_what_xla_compiles(folder, changes):
    """Each by its bytes, and those that are kept as arrays over both layers and all rows."""
    settings, assembly, mesh = _assembled(folder, **changes)
    compiled = aot.compile_step(settings, assembly, setup.program(settings, assembly, 1), mesh)
    entry = {"f32": 4, "bf16": 2}
    arrays = {
        (math.prod(map(int, shape.split(","))) * entry[kind], shape.startswith(f"2,{B},"))
        for kind, shape in re.findall(r"\b(f32|bf16)\[([\d,]+)\]", compiled.hlo)
    }
    found = estimate.temporaries(settings, assembly, mesh)
    stacked = {name: size for name, size in found.items() if "of all layers" in name}
    assert ("activation's inputs in float32 of all layers" in stacked) == (len(stacked) > 1)
    assert {name for name, size in stacked.items() if (size, True) not in arrays} == set()
    gradients = {name: size for name, size in found.items() if name.startswith("gradient of ")}
    assert len(gradients) == len(assembly.trained)
    assert {size for size in gradients.values() if (size, False) not in arrays} == set()
    assert found["logits of a chunk"] == 128 * V * 4


def test_what_is_made_anew_is_named_among_equals(folder):
    """Full fine-tuning: a gradient, its weight and its moment are as large as each other."""
    settings, assembly, mesh = _assembled(folder, **{"lora.r": 0, "data.max_length": 16})
    largest = aot.largest(settings, assembly, setup.program(settings, assembly, 1), mesh)
    sizes = [buffer.bytes for buffer in largest]
    assert sizes == sorted(sizes, reverse=True)
    of = [buffer.name for buffer in largest if buffer.bytes == 2 * D * F * 4]
    assert of[:3] == [
        "gradient of layers.0-1.mlp.down_proj.kernel",
        "layers.0-1.mlp.down_proj.kernel",
        "mu of layers.0-1.mlp.down_proj.kernel",
    ]


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_bytes_of_a_device(folder, shards):
    settings = _config(folder, **{"mesh.fsdp": shards})
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:shards])
    settings, assembly, _ = _assembled(folder, mesh, **{"mesh.fsdp": shards})
    found = estimate.memory(settings, assembly, setup.program(settings, assembly, 1), mesh)
    norms = (2 * 2 + 1) * D
    scales = 2 * 7 * 4  # alpha / r of each adapter, float32
    assert found.base == 2 * ((N + 2 * V * D) // shards + norms) + scales
    assert found.batch == B * T * 5 * 4 // shards  # tokens, targets, segments, positions, ...
    assert found.optimizer >= 2 * found.adapters
    assert found.saved == 2 * 2 * B * T * D // shards


def test_the_two_ways_in_which_a_tpu_runs_out_of_memory():
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (186.70G) exceeds available HBM (15.75G)."
    )
    late = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.\n\n"
        "Largest program allocations in hbm:\n\n"
        '  1. Size: 512.00M\n     Operator: op_name="jit(f)/dot_general"\n     Shape: bf16[1]\n'
        "  2. Size: 2.00G\n     Shape: bf16[2]\n"
    )
    assert aot.read_out_of_memory(early) == (int(186.70 * GIB), int(15.75 * GIB), ())
    needed, available, buffers = aot.read_out_of_memory(late)
    assert (needed, available) == (int(17.5 * GIB), int(15.75 * GIB))
    assert buffers == ((2 * GIB, "a buffer"), (GIB // 2, "jit(f)/dot_general"))
    assert aot.read_out_of_memory("INTERNAL: something else") == (0, 0, ())


def _resolved(settings, mesh) -> str:
    """The policy of the config, which is also the model's."""
    assembly = assemble.assemble(settings, Path(settings.model.path), mesh, weights=False)
    found, resolved = aot.resolve_remat(settings, assembly, mesh)
    assert tree.merge(resolved.graphdef, resolved.shapes).remat == found.model.remat
    assert (
        resolved.graphdef == assemble.assemble(found, assembly.folder, mesh, weights=False).graphdef
    )
    return found.model.remat


def test_auto_on_a_cpu_keeps_what_the_machine_has_room_for(folder, monkeypatch):
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    automatic = _config(folder, **{"model.remat": "auto"})
    assert _resolved(automatic, mesh) == "none"
    monkeypatch.setattr(aot, "cpu_share", lambda base: 1)
    assert _resolved(automatic, mesh) == "full"
    fixed = _config(folder, **{"model.remat": "attention"})
    assert _resolved(fixed, mesh) == "attention"


def test_auto_is_the_first_that_fits(folder, monkeypatch):
    """Policies that cannot fit by what is known exactly are not compiled at all."""
    topology = topologies.find("v5litepod-1")
    mesh = facts.mesh_of(_config(folder), topology)
    compiled = []

    def compile_step(settings, assembly, program, mesh):
        compiled.append(settings.model.remat)
        if settings.model.remat != "attention":
            raise aot.OutOfMemory(2 * GIB, GIB, ())
        return aot.Compiled(None, 1, 1, 0, 0, 0.0, 0.0)

    monkeypatch.setattr(aot, "compile_step", compile_step)
    automatic = _config(folder, **{"model.remat": "auto"})
    assert _resolved(automatic, mesh) == "attention"
    assert compiled == ["none", "projections", "attention"]

    compiled.clear()
    settings, assembly, _ = _assembled(folder, **{"model.remat": "none"})
    least = estimate.memory(settings, assembly, setup.program(settings, assembly, 1), mesh)
    monkeypatch.setattr(aot, "memory_of", lambda device: least.arguments + least.saved - 1)
    assert _resolved(automatic, mesh) == "attention"
    assert compiled == ["projections", "attention"]


def test_shipped_sizes_are_models_we_read():
    wanted = {
        "meta-llama/Llama-3.1-8B": 8_030_261_248,
        "meta-llama/Llama-3.1-70B": 70_553_706_496,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3-30B-A3B": 30_532_122_624,
        "google/gemma-3-12b-it": 11_766_034_176,
    }
    shipped = sizes.shipped()
    assert len(shipped) > 60
    for hub_id, hf in shipped.items():
        _, model = families.read(hf)
        count = sum(math.prod(leaf.shape) for leaf in load.leaves_of(model).values())
        known = {name.lower(): size for name, size in wanted.items()}.get(hub_id)
        assert known in (None, count), hub_id


def test_where_a_config_is_looked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sizes, "_from_hub", lambda path: asked.append(path) or '{"from": "hub"}')
    (tmp_path / "config.json").write_text('{"from": "folder"}')
    with sizes.folder_of(str(tmp_path)) as found:
        assert json.loads((found / "config.json").read_text()) == {"from": "folder"}
    with sizes.folder_of("Meta-Llama/llama-3.1-8b") as found:
        assert json.loads((found / "config.json").read_text())["hidden_size"] == 4096
    assert asked == []
    with sizes.folder_of("someone/unknown") as found:
        assert json.loads((found / "config.json").read_text()) == {"from": "hub"}
    assert asked == ["someone/unknown"]


class Hub(http.server.BaseHTTPRequestHandler):
    """Is there, and never well; counts what it is asked."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.asked.append(f"{self.command} {self.path}")
        self.send_error(503)

    do_GET = do_HEAD

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_does_not_answer_is_asked_once(offline):
    """In a process of its own: the hub's address and whether to ask it are read at import."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    program = (
        "from jaxtune.plan import sizes\n"
        "try: sizes.folder_of('someone/unknown').__enter__()\n"
        "except sizes.ModelError as error: print(error.line())"
    )
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": offline}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | hub, capture_output=True, text=True
    )
    server.shutdown()
    asked = [line for line in Hub.asked if "someone/unknown" in line]
    assert asked == ["HEAD /someone/unknown/resolve/main/config.json"] * (offline == "0")
    assert done.stderr == ""
    assert "'someone/unknown' is no folder here, not in the shipped table" in done.stdout
    assert ("503" if offline == "0" else "offline mode is enabled") in done.stdout


def test_a_model_that_is_nowhere():
    with pytest.raises(ModelError, match="does not exist"), sizes.folder_of("./not-here"):
        pass
    with pytest.raises(ConfigError, match=r"model\.path is empty"), sizes.folder_of(""):
        pass


def _facts(needed: int, available: int = 16 * GIB, **changes: Any) -> Facts:
    values: dict[str, Any] = {
        "fits": needed <= available,
        "needed": needed,
        "available": available,
        "buffers": ((GIB, "lm_head.embedding"), (GIB // 2, "a"), (GIB // 4, "b")),
        "arguments": GIB,
        "temporaries": needed - GIB,
        "parts": {"base": GIB // 2, "adapters": 0, "optimizer": GIB // 4, "batch": 0},
        "flops": 1.97e14,  # a second of a v5e
        "flops_a_token": {"projections": 4.0, "again": 2.0},
        "hbm": 4.1e11,
        "ici": {"all-gather": 2e10},
        "dcn": {},
        "unknown": (),
        "tokens": 1000,
        "seconds": 1.0,
    }
    return Facts(**(values | changes))


def test_a_plan_is_kept_and_recalled(folder, page, monkeypatch):
    made = []

    def make(settings, where, topology, before):
        before()
        made.append(settings.model.remat)
        return _facts(2 * GIB)

    monkeypatch.setattr(facts, "_compile", make)
    one, topology = _config(folder), topologies.find("v5litepod-8")
    first = facts.facts(one, folder, topology)
    again = facts.facts(one, folder, topology)
    assert (first.recalled, again.recalled) == (False, True)
    known = {"buffers": (), "unknown": (), "recalled": False}
    assert again._replace(**known) == first._replace(**known)
    assert made == ["full"]
    # What does not change the program asks for nothing new; what does, does.
    facts.facts(config.replaced(one, {"optim.lr": 1e-5, "data.train": "x"}), folder, topology)
    assert len(made) == 1
    facts.facts(_config(folder, **{"lora.r": 8}), folder, topology)
    facts.facts(one, folder, topologies.find("v6e-8"))
    facts.facts(one, folder, topologies.find("2xv5litepod-8"))
    assert len(made) == 4
    asked = []
    facts.facts(one, folder, topology, lambda: asked.append("known"))
    facts.facts(_config(folder, **{"lora.r": 4}), folder, topology, lambda: asked.append("new"))
    assert asked == ["new"]
    for kept in facts.cache_folder().glob("*.json"):
        kept.write_text(kept.read_text()[:40])
    assert facts.facts(one, folder, topology).needed == 2 * GIB
    assert len(made) == 6
    for kept in facts.cache_folder().glob("*.json"):
        kept.write_text('{"fits": true}')
    assert facts.facts(one, folder, topology).needed == 2 * GIB
    assert len(made) == 7


def test_floors_of_a_step():
    topology = topologies.find("v5litepod-8")
    assert report.floors(topology, _facts(GIB)) == pytest.approx(
        {"compute": 1.0, "hbm": 0.5, "ici": 0.1, "dcn": 0.0}
    )
    settings = config.replaced(config.Config(), {"train.steps": 7200})
    result = report.summary(settings, topology, _facts(2 * GIB), price=2.0)
    assert result["bound_by"] == "compute"
    assert result["tokens_per_second_at_most"] == 1000
    assert result["hours_at_least"] == pytest.approx(2.0)
    assert result["cost_at_least"] == pytest.approx(2.0 * 8 * 2.0)
    assert result["memory_per_chip_gib"] == 2.0
    assert sum(result["parts_gib"].values()) == pytest.approx(16.0)
    assert result["flops_per_token"] == 6.0


def test_two_devices_a_chip_are_added_up():
    result = report.summary(config.Config(), topologies.find("tpu7x-8"), _facts(2 * GIB))
    assert (result["chips"], result["devices"]) == (4, 8)
    assert result["memory_per_chip_gib"] == 4.0
    assert result["available_per_chip_gib"] == 32.0
    # Twice the bytes of a device over the links of a chip.
    assert result["floor_seconds"]["ici"] == pytest.approx(2 * 2e10 / 600e9)


def test_hours_from_the_lines_of_a_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n\n' * 100)
    changes = {"data.train": str(rows), "train.epochs": 3.0, "train.batch_size": 8}
    settings = config.replaced(config.Config(), changes | {"data.packing": False})
    assert report.steps_of(settings) == (38, False)
    assert report.steps_of(config.replaced(settings, {"data.packing": True})) == (38, True)
    assert report.steps_of(config.replaced(settings, {"data.train": "a/hub-id"})) == (None, False)
    assert report.steps_of(config.replaced(settings, {"train.steps": 5})) == (5, False)


class Compiler:
    """Stands in for the compiler: memory and time by rule, and a record of what was asked."""

    def __init__(self, available: int, needed, seconds=lambda settings: 1.0):
        self.available, self.needed, self.seconds = available, needed, seconds
        self.asked: list[config.Config] = []

    def __call__(self, settings, folder, topology):
        self.asked.append(settings)
        return _facts(self.needed(settings), self.available, flops=1.97e14 * self.seconds(settings))


def _watch(done: int, all_: int, text: str) -> None:
    assert 0 <= done <= all_
    assert not text.startswith("None")


ROOM = {"none": 40, "projections": 30, "attention": 20, "full": 10, "offload": 8}


def _needs(settings: config.Config) -> int:
    """GiB: activations by policy, shared by micro-batches; the base by shards and bits."""
    base = {"none": 16, "int8": 8, "nf4": 4}[settings.model.quantize]
    shards = 8 if settings.mesh.fsdp == -1 else settings.mesh.fsdp
    return GIB * (base // shards + ROOM[settings.model.remat] // settings.train.grad_accum)


def test_the_search_compiles_what_may_be_best_and_stops(folder, monkeypatch):
    slower = {"none": 1.0, "projections": 1.1, "attention": 1.3, "full": 1.5, "offload": 2.0}
    compiler = Compiler(16 * GIB, _needs, lambda s: slower[s.model.remat])
    monkeypatch.setattr(search, "facts", compiler)
    topology = topologies.find("v5litepod-8")
    settings = _config(folder, **{"train.batch_size": 32})
    found = search.search(settings, folder, topology, _watch)
    assert [f.seconds for f in found] == sorted(f.seconds for f in found)
    assert all(_needs(f.point.config) <= 16 * GIB for f in found)
    fitting = [slower[s.model.remat] for s in compiler.asked if _needs(s) <= 16 * GIB]
    assert found[0].seconds == pytest.approx(min(fitting))
    assert len(compiler.asked) < 40
    # Nothing is compiled that needs at least what has already failed.
    for number, later in enumerate(compiler.asked):
        for earlier in compiler.asked[:number]:
            if _needs(earlier) > 16 * GIB and earlier.mesh == later.mesh:
                same = earlier.model.quantize == later.model.quantize
                fewer = later.train.grad_accum <= earlier.train.grad_accum
                heavier = ROOM[later.model.remat] >= ROOM[earlier.model.remat]
                assert not (same and fewer and heavier)


def test_a_search_ends_with_its_time(folder, monkeypatch):
    compiler = Compiler(16 * GIB, _needs)
    monkeypatch.setattr(search, "facts", compiler)
    search.search(_config(folder), folder, topologies.find("v5litepod-8"), _watch, seconds=-1.0)
    assert compiler.asked == []


def test_a_search_begins_nothing_that_would_end_too_late(folder, monkeypatch):
    """Compiling takes 100 s a point, by a clock of the test's own: two of them fit into 280 s."""
    clock = [0.0]
    compiler = Compiler(16 * GIB, _needs)

    def facts(*args):
        clock[0] += 100.0
        return compiler(*args)

    monkeypatch.setattr(search, "facts", facts)
    monkeypatch.setattr(search.time, "monotonic", lambda: clock[0])
    topology = topologies.find("v5litepod-8")
    search.search(_config(folder), folder, topology, _watch, seconds=280.0)
    assert len(compiler.asked) == 2
    assert clock == [200.0]


def test_meshes_fill_the_slice(folder):
    settings = _config(folder)
    found = [*search.meshes(settings, topologies.find("2xv5litepod-16"), experts=False)]
    assert all(math.prod(mesh.values()) == 16 for mesh in found)
    assert {"mesh.data": 16, "mesh.fsdp": 1, "mesh.expert": 1, "mesh.tensor": 1} in found
    assert {"mesh.data": 2, "mesh.fsdp": 4, "mesh.expert": 1, "mesh.tensor": 2} in found
    experts = [*search.meshes(settings, topologies.find("v5litepod-8"), experts=True)]
    assert {"mesh.data": 1, "mesh.fsdp": 1, "mesh.expert": 8, "mesh.tensor": 1} in experts


def test_the_nearest_setting_is_the_smallest_change(folder, monkeypatch):
    topology = topologies.find("v5litepod-8")
    settings = _config(folder, **{"model.remat": "none", "train.batch_size": 32})
    monkeypatch.setattr(search, "facts", Compiler(16 * GIB, _needs))
    near = search.nearest(settings, folder, topology, _watch)
    assert near is not None
    assert near[0] == {"model.remat": "full"}
    # Where activations are not what is too large, another base is.
    large = Compiler(7 * GIB, lambda s: (1 if s.model.quantize == "int8" else 9) * GIB)
    monkeypatch.setattr(search, "facts", large)
    monkeypatch.setattr(search, "_bases", lambda config: ["none", "int8"])
    small = config.replaced(settings, {"model.remat": "full"})
    near = search.nearest(small, folder, topology, _watch, most=20)
    assert near is not None
    assert near[0] == {"model.quantize": "int8"}


def test_what_does_not_fit_is_one_line_and_code_2(page, monkeypatch, capsys):
    monkeypatch.setattr(command, "facts", lambda *args: _facts(20 * GIB))
    monkeypatch.setattr(
        command, "nearest", lambda *args: ({"train.grad_accum": 4}, _facts(10 * GIB))
    )
    assert cli.main(["plan", f"--config={page}", "--config.model.remat=full", "--json"]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert "needs 20.00 GiB of a v5litepod-1 chip's 16.00" in last
    assert "lm_head.embedding 1.00, a 0.50, b 0.25 GiB" in last
    assert last.endswith("try: --config.train.grad_accum=4 (compiled: 10.00 GiB)")
    assert json.loads(out)["fits"] is False
    monkeypatch.setattr(command, "nearest", lambda *args: None)
    assert cli.main(["plan", f"--config={page}", "--config.model.remat=full"]) == 2
    assert "try: more chips" in capsys.readouterr().err


def test_the_verb_asks_for_what_it_lacks(page, capsys):
    page.write_text(page.read_text().replace('TOPOLOGY = "v5litepod-1"\n', ""))
    assert cli.main(["plan", f"--config={page}"]) == 2
    assert "no topology to plan for" in capsys.readouterr().err
    assert cli.main(["plan", f"--config={page}", "--topology=v5e-3"]) == 2
    assert "did you mean v5e" in capsys.readouterr().err
    assert cli.main(["plan"]) == 2
    assert "no config file" in capsys.readouterr().err


def test_a_plan_by_the_tpu_compiler(page, capsys):
    """The whole verb on a small model: the compiler's own numbers, and the page."""
    flags = [f"--config={page}", "--config.model.remat=full", "--price=1.2"]
    assert cli.main(["plan", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["topology"] == "v5litepod-1"
    assert result["fits"] is True
    assert result["available_per_chip_gib"] == 15.75
    assert result["flops_per_token_hlo"] == pytest.approx(result["flops_per_token"], rel=1e-3)
    assert result["loops_counted_once"] == []
    assert 0 < result["memory_per_chip_gib"] < 0.1
    assert sum(result["parts_gib"].values()) == pytest.approx(15.75)
    assert result["collective_bytes"] == {}
    assert result["step_seconds_floor"] == max(result["floor_seconds"].values())
    assert cli.main(["plan", *flags]) == 0  # recalled
    out, err = capsys.readouterr()
    for words in ("memory of a chip", "base (frozen)", "fits", "tokens/s, at most", "not meas"):
        assert words in out
    assert result["from_cache"] is False
    assert "From the cache: this was compiled before, in " in out
    assert "compiling" not in err
    # A small model has small numbers: each has a unit in which it is not nought.
    assert " 0.00 " not in out
    assert " 0.0 " not in out
    assert "peaks of a v5e chip (197 TFLOP/s in bf16, 820 GB/s from memory, " in out.replace(
        "\n", ""
    )
    assert "MFU, at most" in out


def test_nothing_is_said_to_compile_that_is_refused(page, capsys, monkeypatch):
    monkeypatch.setattr(aot, "compile_step", lambda *args, **more: pytest.fail("compiled"))
    flags = [f"--config={page}", "--config.model.remat=full"]
    assert cli.main(["plan", *flags, "--config.lora.target_modules=nothing"]) == 2
    assert "compiling" not in capsys.readouterr().err


def test_full_fine_tuning_has_no_adapters():
    full = config.replaced(config.Config(), {"lora.r": 0})
    topology = topologies.find("v5litepod-8")
    assert "adapters" not in report.summary(full, topology, _facts(GIB))["parts_gib"]
    assert report.summary(full, topology, _facts(GIB))["parts_gib"]["trained_weights"] == 0
    assert "adapters" in report.summary(config.Config(), topology, _facts(GIB))["parts_gib"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 s"),
        (4.56e-7, "s", "456 ns"),
        (0.00031, "s", "310 us"),
        (0.9996, "s", "1 s"),
        (12345.0, "s", "12,300 s"),
        (1.97e14, "FLOP/s", "197 TFLOP/s"),
        (9999e12, "FLOP", "10,000 TFLOP"),
        (999.9e9, "FLOP", "1 TFLOP"),
        (3.125e9, "B/s", "3.12 GB/s"),
    ],
)
def test_numbers_have_units_of_their_size(value, unit, text):
    assert report.scaled(value, unit) == text


def test_sizes_and_durations_have_units_of_their_size():
    assert [report.size_of(n) for n in (15.75, 0.05, 3e-5, 0.0)] == [
        "15.75 GiB", "51.20 MiB", "31 KiB", "0 KiB"
    ]  # fmt: skip
    assert [report.duration(n) for n in (7200, 5e6, 90, 0.002)] == [
        "2 h", "1,389 h", "1.5 min", "2 ms"
    ]  # fmt: skip


def test_what_a_run_would_refuse_is_refused_before_compiling(folder):
    with pytest.raises(ConfigError, match="6 rows do not divide over 4 devices"):
        command.plan(_config(folder, **{"train.batch_size": 6}), "v5litepod-4")
