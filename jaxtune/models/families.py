"""One row per model family: how to read its config.json, and what its tensors are called.

Key tables map the path of one layer's parameter to the Hugging Face tensor, `{i}` being the layer.
A `kernel` is stored transposed there (outputs first); everything else keeps its shape.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.layers import ACTIVATIONS, Rope


@dataclass(frozen=True)
class Family:
    config: Callable[[Mapping[str, Any]], DecoderConfig]
    keys: Mapping[str, str]
    ignored: tuple[str, ...] = ()  # regexes of tensors that old checkpoints carry and nobody reads

    def tensor(self, path: str) -> str:
        """`layers.3.mlp.up_proj.kernel` -> `model.layers.3.mlp.up_proj.weight`."""
        match = re.match(r"layers\.(\d+)\.(.*)", path)
        if match is None:
            return self.keys[path]
        return self.keys["layers.{i}." + match[2]].format(i=match[1])

    def module(self, path: str) -> str:
        """The Hugging Face module that owns a parameter: its tensor's name without `.weight`."""
        return self.tensor(path).rsplit(".", 1)[0]


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ModelError for one we do not have, naming the closest."""
    name = hf.get("model_type")
    if name not in FAMILIES:
        close = difflib.get_close_matches(str(name), FAMILIES, n=1)
        hint = f" (closest: {close[0]})" if close else ""
        raise ModelError(
            f"model_type {name!r} is not supported", fix=f"one of {', '.join(FAMILIES)}{hint}"
        )
    return FAMILIES[name]


def _llama(hf: Mapping[str, Any]) -> DecoderConfig:
    try:
        hidden, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
        return DecoderConfig(
            vocab_size=int(hf["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(hf["intermediate_size"]),
            num_layers=int(hf["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(hf.get("num_key_value_heads") or heads),
            head_dim=int(hf.get("head_dim") or hidden // heads),
            max_position=int(hf.get("max_position_embeddings") or 2048),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            activation=_known("hidden_act", hf.get("hidden_act", "silu"), ACTIVATIONS),
            rope=_rope(hf),
            qkv_bias=bool(hf.get("attention_bias", False)),
            o_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise ModelError(
            f"config.json has no {error}", fix="the checkpoint's own config"
        ) from error


def _rope(hf: Mapping[str, Any]) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    found = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = found.get("rope_type", found.get("type", "default"))
    theta = float(found.get("rope_theta", hf.get("rope_theta", 10000.0)))
    _known("rope_type", kind, ("default", "linear", "llama3"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=float(found["factor"]))
    return Rope(
        theta,
        kind,
        factor=float(found["factor"]),
        low_freq_factor=float(found["low_freq_factor"]),
        high_freq_factor=float(found["high_freq_factor"]),
        original_max_position=int(found["original_max_position_embeddings"]),
    )


def _known(field: str, value: Any, known: Iterable[str]) -> Any:
    if value not in known:
        raise ModelError(f"config.json has {field} {value!r}", fix=f"one of {', '.join(known)}")
    return value


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LINEARS = [f"self_attn.{n}" for n in _ATTENTION] + [f"mlp.{n}" for n in _MLP]
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LAYER = "layers.{i}."

LLAMA_KEYS = {
    "embed_tokens.embedding": "model.embed_tokens.weight",
    **{f"{_LAYER}{n}.kernel": f"model.{_LAYER}{n}.weight" for n in _LINEARS},
    **{f"{_LAYER}{n}.bias": f"model.{_LAYER}{n}.bias" for n in _LINEARS},
    **{f"{_LAYER}{n}.scale": f"model.{_LAYER}{n}.weight" for n in _NORMS},
    "norm.scale": "model.norm.weight",
    "lm_head.embedding": "lm_head.weight",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, LLAMA_KEYS, ignored=(r"\.rotary_emb\.inv_freq$",)),
}
