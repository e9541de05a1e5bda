"""What a step costs, counted from the config: floating point operations a token, bytes a device.

No compiler is asked. The operations are exact for products; bytes of parameters and optimizer are
exact, those of activations a lower bound (`Bytes.saved`) or a guess (`Bytes.working`).

Letters: D model width, F inner width of the feed-forward block, Q all query heads together, K all
key heads, V vocabulary, T tokens of a row, r rank of an adapter.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import optim, setup, sharding, tree
from jaxtune.assemble import Assembly
from jaxtune.config import Config
from jaxtune.kernels import vocabulary
from jaxtune.models.blocks import LayerConfig
from jaxtune.step import Program


class Matrix(NamedTuple):
    """A projection: a token is multiplied with `visits` of its kind (experts; else 1)."""

    inputs: int
    outputs: int
    visits: int = 1

    @property
    def size(self) -> int:
        return self.inputs * self.outputs * self.visits


class Flops(NamedTuple):
    """Operations a token of one step, forward and backward, by where they fall."""

    projections: float  # frozen or trained matrices of the layers
    adapters: float
    attention: float
    head: float
    attention_again: float  # forward once more, where remat does not keep its output
    again: float  # of the other parts, what remat does once more

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def useful(self) -> float:
        """Without what is done again: for a frozen base 4N and its adapters' 6N."""
        return self.total - self.attention_again - self.again


class Bytes(NamedTuple):
    """Memory of one device, by what it holds."""

    base: int  # frozen leaves
    adapters: int  # trained leaves, also those of a full fine-tune
    optimizer: int
    batch: int
    saved: int  # activations kept for the backward pass, at least
    working: int  # gradients, one layer's own, gathered weights, the head's chunk: a guess

    @property
    def arguments(self) -> int:
        return self.base + self.adapters + self.optimizer + self.batch


def matrices(model: LayerConfig, layer: int) -> dict[str, Matrix]:
    """{name inside the layer: projection}, as `self_attn.q_proj`."""
    width, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    if model.fused_qkv:
        found = {"self_attn.qkv_proj": Matrix(width, q + 2 * kv)}
    else:
        found = {
            "self_attn.q_proj": Matrix(width, q),
            "self_attn.k_proj": Matrix(width, kv),
            "self_attn.v_proj": Matrix(width, kv),
        }
    found["self_attn.o_proj"] = Matrix(q, width)
    sparse, _ = model.kind(layer)
    if sparse and model.experts is not None:
        own, visits = model.experts.intermediate_size, model.experts.per_token
        found["mlp.router"] = Matrix(width, model.experts.count)
        for name in ("gate_proj", "up_proj"):
            found[f"mlp.experts.{name}"] = Matrix(width, own, visits)
        found["mlp.experts.down_proj"] = Matrix(own, width, visits)
        return found
    if model.mlp == "fused":
        found["mlp.gate_up_proj"] = Matrix(width, 2 * inner)
    else:
        found["mlp.up_proj"] = Matrix(width, inner)
    if model.mlp == "gated":
        found["mlp.gate_proj"] = Matrix(width, inner)
    found["mlp.down_proj"] = Matrix(inner, width)
    return found


def keys_seen(model: LayerConfig, layer: int, length: int) -> float:
    """Keys that a token of a row of one document sees in a layer, on average."""
    window = model.windows[layer] if model.windows else 0
    if not model.causal:
        return min(length, 2 * window + 1) if window else length
    window = min(window or length, length)
    return window - window * (window - 1) / (2 * length)


# Projections that a policy computes again in the backward pass (models/stacks.py), by last name.
_ATTENTION_IN = {"q_proj", "k_proj", "v_proj", "qkv_proj"}
_MLP_IN = {"gate_proj", "up_proj", "gate_up_proj", "router"}
_REDONE: dict[str, set[str]] = {
    "none": set(),
    "projections": {"o_proj", "down_proj"},
    "attention": {"o_proj", "down_proj"} | _MLP_IN,
    "full": {"o_proj", "down_proj"} | _MLP_IN | _ATTENTION_IN,
    "offload": {"o_proj", "down_proj"} | _MLP_IN | _ATTENTION_IN,
}
_SAVES_CONTEXT = {"none", "projections", "attention"}


def flops(config: Config, assembly: Assembly) -> Flops:
    """Operations a token of a row of `data.max_length`, one document, every token with a loss.

    A frozen matrix costs 2 an entry forward and 2 for the gradient that passes through it, a
    trained one 2 more; below the lowest trained layer nothing runs backwards.
    """
    model, policy = assembly.model, config.model.remat
    length = min(config.data.max_length, model.max_position)
    lowest = _lowest_trained(assembly)
    full = {  # modules whose own matrix is trained
        single.rsplit(".", 1)[0]
        for path, group in assembly.groups.items()
        if group != optim.FROZEN and ".lora." not in path
        for single in tree.layer_paths(path)
    }
    projections = adapters = attention = attention_again = again = 0.0
    for layer in range(model.num_layers):
        backward = layer >= lowest
        seen = 4 * keys_seen(model, layer, length) * model.num_heads * model.head_dim
        attention += seen * (3.5 if backward else 1)
        if backward and policy not in _SAVES_CONTEXT:
            attention_again += seen
        for name, matrix in matrices(model, layer).items():
            path, last = f"layers.{layer}.{name}", name.rsplit(".", 1)[-1]
            trained = path in full
            projections += matrix.size * (2 + 2 * backward + 2 * trained)
            spec = assembly.targets.get(path)
            rank = 0 if spec is None else spec.rank
            low, high = (2 * rank * side * matrix.visits for side in matrix[:2])
            adapters += (low + high) * 3
            if not backward or policy == "none":
                continue
            again += low
            # What is only added to the stream is no one's residual: it is not computed again.
            if last in _REDONE[policy] and (last != "down_proj" or model.norms != "pre"):
                again += 2 * matrix.size + high
    head = _head(assembly)
    return Flops(projections, adapters, attention, head, attention_again, again)


def _head(assembly: Assembly) -> float:
    model = assembly.model
    if model.num_labels:
        return 0.0
    own = (
        "lm_head.embedding" if "lm_head.embedding" in assembly.groups else "embed_tokens.embedding"
    )
    trained = assembly.groups[own] != optim.FROZEN
    return (6.0 if trained else 4.0) * model.hidden_size * model.vocab_size


def _lowest_trained(assembly: Assembly) -> int:
    """The first layer that something is trained in, or below which nothing is frozen: 0."""
    lowest = assembly.model.num_layers
    for path, group in assembly.groups.items():
        if group == optim.FROZEN:
            continue
        layers = tree.layer_range(path)
        if layers is None:
            lowest = 0 if path.startswith("embed_") else lowest
        else:
            lowest = min(lowest, layers.start)
    return lowest


def memory(config: Config, assembly: Assembly, program: Program, mesh: Mesh) -> Bytes:
    """Bytes of one device while it steps."""
    state, frozen, batch = setup.abstract_inputs(config, assembly, program, mesh)
    saved, working = activations(config, assembly, mesh)
    return Bytes(
        base=local_bytes(frozen),
        adapters=local_bytes(state.trainable),
        optimizer=local_bytes((state.step, state.opt_state)),
        batch=local_bytes(batch),
        saved=saved,
        working=working,
    )


def local_bytes(leaves: Any) -> int:
    """Bytes on one device of abstract arrays with shardings; layouts pad some of them."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(leaves))


def leaf_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """The same of one."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.ceil(math.prod(shape) * _bits(leaf.dtype) / 8)


def _bits(dtype: Any) -> int:
    """Of one entry; four for int4, which numpy keeps in eight."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.dtype(dtype).itemsize * 8


def tokens_a_device(config: Config, mesh: Mesh) -> int:
    """Of one micro-batch."""
    shards = math.prod(mesh.shape[axis] for axis in (*sharding.BATCH, sharding.CONTEXT))
    rows = config.train.batch_size // config.train.grad_accum
    return math.ceil(rows * config.data.max_length / shards)


def saved_by_name(config: Config, assembly: Assembly, mesh: Mesh) -> dict[str, int]:
    """{what is kept of every layer for the backward pass: bytes on one device}, at least.

    Each is one array over all layers that run backwards.
    """
    model, policy = assembly.model, config.model.remat
    split = mesh.shape["tensor"]
    entry = jnp.dtype(config.model.dtype).itemsize
    q, kv = (n * model.head_dim // split for n in (model.num_heads, model.num_kv_heads))
    width, inner = model.hidden_size, model.intermediate_size // split
    sparse = model.experts is not None
    if sparse and model.experts is not None:
        inner = model.experts.intermediate_size * model.experts.per_token // split
    bytes_of = {"layer inputs": entry * width}
    if policy in ("attention", "projections", "none"):
        bytes_of |= {"queries": entry * q, "keys": entry * kv, "values": entry * kv}
        bytes_of["attention outputs"] = entry * q
    if policy == "none" or (policy == "projections" and not sparse):
        bytes_of["up projections"] = entry * inner
    if policy == "projections" and not sparse and model.mlp != "plain":
        bytes_of["gate projections"] = entry * inner
    if policy == "none":
        # Norms and the activation compute in float32, and keep what they were given there.
        bytes_of |= dict.fromkeys(
            ("activation's inputs in float32", "activation's slopes in float32"), 4 * inner
        )
        bytes_of |= dict.fromkeys(("activations", "inputs of down_proj"), entry * inner)
        bytes_of |= dict.fromkeys(("norm inputs", "second norm inputs"), 4 * width)
        bytes_of |= dict.fromkeys(("normalised inputs", "second normalised inputs"), entry * width)
    if policy == "offload":
        bytes_of = {}
    rows = (model.num_layers - _lowest_trained(assembly)) * tokens_a_device(config, mesh)
    return {name: size * rows for name, size in bytes_of.items()}


def temporaries(config: Config, assembly: Assembly, mesh: Mesh) -> dict[str, int]:
    """{the large arrays that a step makes and drops: bytes on one device}, by name."""
    model = assembly.model
    entry, tokens = jnp.dtype(config.model.dtype).itemsize, tokens_a_device(config, mesh)
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    kept = saved_by_name(config, assembly, mesh)
    found = {f"{name} of all layers": size for name, size in kept.items()}
    found |= {f"gradient of {path}": leaf_bytes(leaf) for path, leaf in assembly.trained.items()}
    if fsdp > 1:
        found |= {
            f"{name} of one layer, gathered": entry * matrix.inputs * matrix.outputs // tensor
            for name, matrix in matrices(model, 0).items()
        }
        found["inputs of the head, gathered"] = entry * tokens * fsdp * model.hidden_size
    if not model.num_labels:
        with jax.set_mesh(mesh):
            chunk = vocabulary.chunk_tokens(model.vocab_size // fsdp)
        found["logits of a chunk"] = 4 * chunk * model.vocab_size // fsdp
    return found


def activations(config: Config, assembly: Assembly, mesh: Mesh) -> tuple[int, int]:
    """(kept for the backward pass at least, working set at a guess), bytes a device."""
    model = assembly.model
    entry, tokens = jnp.dtype(config.model.dtype).itemsize, tokens_a_device(config, mesh)
    saved = sum(saved_by_name(config, assembly, mesh).values())
    sizes = matrices(model, 0).values()
    outputs = sum(m.outputs * m.visits for m in sizes) // mesh.shape["tensor"]
    own = tokens * entry * (outputs + 4 * model.hidden_size)
    fsdp = mesh.shape["fsdp"]
    gathered = 0
    if fsdp > 1:
        stored = jnp.dtype(config.model.param_dtype).itemsize
        gathered = sum(m.inputs * m.outputs for m in sizes) * stored // mesh.shape["tensor"]
    rows = tokens * fsdp  # those of all that share the table
    head = 2 * rows * model.hidden_size * entry + 3 * 256 * model.vocab_size // fsdp * 4
    gradients = local_bytes(assembly.trained)
    return saved, max(own + gathered, head) + gradients
