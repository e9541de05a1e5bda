"""The causal families: one function and one key table each.

Defaults are those of transformers' config classes, for published files leave fields out. Both ways
to write rotary settings are read: `rope_parameters` (transformers 5), `rope_theta` with
`rope_scaling` (4).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.models.blocks import Experts
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import Family, Fields, sliding_layers, unknown_fields
from jaxtune.models.layers import ACTIVATIONS
from jaxtune.models.rope import Rope, rope_table, single_rope


def decoder(f: Fields, defaults: Mapping[str, Any], **switches: Any) -> DecoderConfig:
    """What nearly all families share; `switches` are fields of DecoderConfig that they set."""

    def number(name: str, default: Any = None) -> int:
        value = f.get(name)
        value = defaults.get(name, default) if value is None else value
        return int(f.need(name) if value is None else value)

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim", hidden // heads)
    layers = number("num_hidden_layers")
    max_position = number("max_position_embeddings", 2048)
    act = "hidden_activation" if "hidden_activation" in defaults else "hidden_act"
    bias = bool(f.get("attention_bias", False))
    values: dict[str, Any] = {
        "vocab_size": number("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": number("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": number("num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_position": max_position,
        "norm_eps": float(f.get("rms_norm_eps") or defaults.get("rms_norm_eps", 1e-6)),
        "activation": f.one_of(act, defaults.get(act, "silu"), ACTIVATIONS),
        "qkv_bias": bias,
        "o_bias": bias,
        "tie_embeddings": bool(f.get("tie_word_embeddings", defaults.get("tie", False))),
    }
    if "ropes" not in switches:
        values["ropes"] = (single_rope(f, defaults, head_dim, max_position),)
    return DecoderConfig(**(values | switches))


def _llama(f: Fields) -> DecoderConfig:
    return decoder(f, {}, mlp_bias=bool(f.get("mlp_bias", False)))


def _mistral(f: Fields) -> DecoderConfig:
    defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
    return decoder(f, defaults, windows=_all(f, f.get("sliding_window", 4096)))


def _qwen2(f: Fields) -> DecoderConfig:
    defaults = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
    return decoder(f, defaults, qkv_bias=True, o_bias=False, windows=_qwen_windows(f))


def _qwen3(f: Fields) -> DecoderConfig:
    defaults = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}
    return decoder(f, defaults, qk_norm="head", windows=_qwen_windows(f))


def _qwen_windows(f: Fields) -> tuple[int, ...]:
    last_full = int(f.get("max_window_layers", 28))
    return _typed(f, _switched_window(f, 4096), lambda i: i >= last_full)


def _switched_window(f: Fields, default: int | None = None) -> int:
    """A window that counts only where use_sliding_window says so; 0 is none."""
    f.pass_over("max_window_layers")
    window = int(f.get("sliding_window", default) or 0)
    return window if f.get("use_sliding_window") else 0


_GEMMA: dict[str, Any] = {"head_dim": 256, "tie": True, "max_position_embeddings": 8192}


def _gemma(f: Fields) -> DecoderConfig:
    f.pass_over("hidden_activation")  # transformers 5 goes by hidden_act; its gelu is the tanh form
    act = f.one_of("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS)
    return decoder(
        f,
        _GEMMA | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        activation="gelu_pytorch_tanh" if act == "gelu" else act,
        norm="rms_plus_one",
        embed_scale=math.sqrt(int(f.need("hidden_size"))),
    )


def _gemma2(f: Fields) -> DecoderConfig:
    window = int(f.get("sliding_window", 4096) or 0)
    return _gemma23(
        f,
        {"hidden_size": 2304, "num_hidden_layers": 26},
        windows=_typed(f, window, lambda i: i % 2 == 0, layers=26),
        softcap=float(f.get("attn_logit_softcapping", 50.0) or 0),
        final_softcap=float(f.get("final_logit_softcapping", 30.0) or 0),
    )


def _gemma3(f: Fields) -> DecoderConfig:
    period = int(f.get("sliding_window_pattern") or 6)
    window = int(f.get("sliding_window", 4096) or 0)
    layers = int(f.get("num_hidden_layers", 26))
    kinds = sliding_layers(f, layers, lambda i: (i + 1) % period != 0)
    f.pass_over("attn_logit_softcapping")  # stored, and not used by transformers
    both = dict(f.get("rope_parameters") or {})
    full = both.get("full_attention") or {"rope_theta": f.get("rope_theta", 1e6)}
    local = both.get("sliding_attention") or {"rope_theta": f.get("rope_local_base_freq", 1e4)}
    full = full | (f.get("rope_scaling") or {})
    head_dim = int(f.get("head_dim", 256))
    positions = int(f.get("max_position_embeddings", 131072))
    return _gemma23(
        f,
        {"hidden_size": 2304, "max_position_embeddings": 131072, "vocab_size": 262208}
        | {"num_hidden_layers": 26},
        qk_norm="head",
        windows=tuple(window if sliding else 0 for sliding in kinds),
        ropes=(
            rope_table(full, 1e6, head_dim, positions),
            rope_table(local, 1e4, head_dim, positions),
        ),
        rope_of=tuple(map(int, kinds)),
        final_softcap=float(f.get("final_logit_softcapping") or 0),
    )


def _gemma23(f: Fields, defaults: dict[str, Any], **switches: Any) -> DecoderConfig:
    f.pass_over("hidden_act")  # an older field that hidden_activation has taken the place of
    sizes = {"vocab_size": 256000, "intermediate_size": 9216, "num_attention_heads": 8}
    more = {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh"}
    return decoder(
        f,
        _GEMMA | sizes | more | defaults,
        norm="rms_plus_one",
        norms="sandwich",
        embed_scale=math.sqrt(int(f.get("hidden_size", 2304))),
        query_scale=float(f.get("query_pre_attn_scalar", 256)) ** -0.5,
        **switches,
    )


def _gemma3_wrapper(f: Fields) -> DecoderConfig:
    f.pass_over("vision_config", "mm_tokens_per_image")
    f.pass_over("boi_token_index", "eoi_token_index", "image_token_index")
    text = Fields(f.need("text_config"))
    config, unknown = _gemma3(text), unknown_fields(text)
    if unknown:
        raise ModelError(
            f"config.json has text_config fields jaxtune does not know: {', '.join(unknown)}",
            fix="the published config.json",
        )
    tied = bool(f.get("tie_word_embeddings", True))
    return replace(config, tie_embeddings=tied, final_softcap=0.0)  # the wrapper caps no logits


def _phi3(f: Fields) -> DecoderConfig:
    # The field outside of the rotary settings rules, also by its default.
    original = int(f.get("original_max_position_embeddings") or 4096)
    for name in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini, where they are one
        f.one_of(name, 1, (1,))
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original": original}
    windows = _all(f, f.get("sliding_window"))
    return decoder(f, defaults, fused_qkv=True, mlp="fused", windows=windows)


def _smollm3(f: Fields) -> DecoderConfig:
    layers = int(f.need("num_hidden_layers"))
    every = int(f.get("no_rope_layer_interval", 4))
    turns = f.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    window = _switched_window(f)
    defaults = {"num_key_value_heads": 4, "rope_theta": 2e6, "tie": True}
    config = decoder(
        f,
        defaults | {"max_position_embeddings": 32768},
        mlp_bias=bool(f.get("mlp_bias", False)),
        windows=_typed(f, window, lambda i: bool(window) and not turns[i]),
        rope_of=tuple(0 if turn else 1 for turn in turns),
    )
    still = Rope(kind="none", dims=config.ropes[0].dims)
    return replace(config, ropes=(*config.ropes, still))


def _olmo2(f: Fields) -> DecoderConfig:
    return decoder(
        f, {"rms_norm_eps": 1e-5}, norm="rms_float", norms="post", qk_norm="width", float_rope=True
    )


def _gpt2(f: Fields) -> DecoderConfig:
    hidden, heads = int(f.get("n_embd", 768)), int(f.get("n_head", 12))
    f.pass_over("reorder_and_upcast_attn")  # scores are float32 here anyway
    f.pass_over("n_ctx")  # an older name of n_positions
    return DecoderConfig(
        vocab_size=int(f.get("vocab_size", 50257)),
        hidden_size=hidden,
        intermediate_size=int(f.get("n_inner") or 4 * hidden),
        num_layers=int(f.get("n_layer", 12)),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=int(f.get("n_positions", 1024)),
        norm="layer",
        norm_bias=True,
        norm_eps=float(f.get("layer_norm_epsilon", 1e-5)),
        activation=f.one_of("activation_function", "gelu_new", ACTIVATIONS),
        mlp="plain",
        fused_qkv=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        query_scale=0.0 if f.get("scale_attn_weights", True) else 1.0,
        scale_by_layer=bool(f.get("scale_attn_by_inverse_layer_idx", False)),
        ropes=(Rope(kind="none"),),
        learned_positions=True,
        tie_embeddings=bool(f.get("tie_word_embeddings", True)),
    )


def _mixtral(f: Fields) -> DecoderConfig:
    count = f.get("num_local_experts", f.get("num_experts", 8))
    experts = Experts(
        count=int(count),
        per_token=int(f.get("num_experts_per_tok", 2)),
        intermediate_size=int(f.get("intermediate_size", 14336)),
        normalize=True,
        balance_weight=_balance_weight(f),
    )
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    return decoder(
        f,
        defaults | {"max_position_embeddings": 131072, "intermediate_size": 14336},
        windows=_all(f, f.get("sliding_window")),
        experts=experts,
    )


def _qwen3_moe(f: Fields) -> DecoderConfig:
    layers = int(f.need("num_hidden_layers"))
    dense, every = f.get("mlp_only_layers") or [], int(f.get("decoder_sparse_step", 1))
    experts = Experts(
        count=int(f.get("num_experts", f.get("num_local_experts", 128))),
        per_token=int(f.get("num_experts_per_tok", 8)),
        intermediate_size=int(f.get("moe_intermediate_size", 768)),
        normalize=bool(f.get("norm_topk_prob", False)),
        balance_weight=_balance_weight(f),
    )
    f.pass_over("num_local_experts")
    return decoder(
        f,
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "intermediate_size": 6144},
        qk_norm="head",
        windows=_all(f, _switched_window(f, 4096)),  # of all layers, or of none
        experts=experts,
        sparse=tuple(i not in dense and (i + 1) % every == 0 for i in range(layers)),
    )


def _balance_weight(f: Fields) -> float:
    """transformers adds the balancing loss only where the router's logits are asked for."""
    weight = float(f.get("router_aux_loss_coef", 0.001))
    return weight if f.get("output_router_logits") else 0.0


def _all(f: Fields, window: Any) -> tuple[int, ...]:
    """The same window in every layer; nothing is none."""
    return (int(window),) * int(f.need("num_hidden_layers")) if window else ()


def _typed(
    f: Fields, window: int, sliding: Callable[[int], bool], layers: int | None = None
) -> tuple[int, ...]:
    """The window in the layers of type sliding_attention, or where the family has it by default."""
    kinds = sliding_layers(f, int(f.get("num_hidden_layers") or layers or 0), sliding)
    return tuple(window if kind else 0 for kind in kinds) if window else ()


_LAYER = "layers.{i}."
_ATTENTION = tuple(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
_MLP = tuple(f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj"))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_SANDWICH = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_QK = ("self_attn.q_norm", "self_attn.k_norm")


def keys(
    linears: tuple[str, ...] = (*_ATTENTION, *_MLP), norms: tuple[str, ...] = _NORMS, body="model."
) -> dict[str, str]:
    """The table of a family that calls its parts as Llama does."""
    return {
        "embed_tokens.embedding": f"{body}embed_tokens.weight",
        **{f"{_LAYER}{n}.kernel": f"{body}{_LAYER}{n}.weight" for n in linears},
        **{f"{_LAYER}{n}.bias": f"{body}{_LAYER}{n}.bias" for n in linears},
        **{f"{_LAYER}{n}.scale": f"{body}{_LAYER}{n}.weight" for n in norms},
        "norm.scale": f"{body}norm.weight",
        "lm_head.embedding": "lm_head.weight",
        "score.kernel": "score.weight",
    }


def _experts(block: str, names: Mapping[str, str]) -> dict[str, str]:
    """Router and experts under `block`; `names` are theirs for gate_proj, up_proj, down_proj."""
    kernels = {
        f"{_LAYER}mlp.experts.{ours}.kernel": f"model.{_LAYER}{block}.experts.{{e}}.{name}.weight"
        for ours, name in names.items()
    }
    return {f"{_LAYER}mlp.router.weight": f"model.{_LAYER}{block}.gate.weight", **kernels}


_GPT2_KEYS = {
    "embed_tokens.embedding": "transformer.wte.weight",
    "embed_positions.embedding": "transformer.wpe.weight",
    **{
        f"{_LAYER}{ours}.{leaf}": f"transformer.h.{{i}}.{theirs}.{name}"
        for ours, theirs in {
            "self_attn.qkv_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        }.items()
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
    **{
        f"{_LAYER}{ours}.{leaf}": f"transformer.h.{{i}}.{theirs}.{name}"
        for ours, theirs in zip(_NORMS, ("ln_1", "ln_2"), strict=True)
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    },
    "norm.scale": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "lm_head.embedding": "lm_head.weight",
    "score.kernel": "score.weight",
}

_OLD = (r"\.rotary_emb\.inv_freq$",)
_BARE = ((("model.", ""),),)  # saved from the body alone
_PHI3_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_DENSE = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _family(label: str, config: Callable[[Fields], DecoderConfig], table, **more: Any) -> Family:
    return Family(config, table, label, **({"ignored": _OLD, "layouts": _BARE} | more))


CAUSAL: dict[str, Family] = {
    "llama": _family("Llama", _llama, keys()),
    "mistral": _family("Mistral", _mistral, keys()),
    "qwen2": _family("Qwen2", _qwen2, keys()),
    "qwen3": _family("Qwen3", _qwen3, keys(norms=(*_NORMS, *_QK))),
    "gemma": _family("Gemma", _gemma, keys()),
    "gemma2": _family("Gemma2", _gemma2, keys(norms=_SANDWICH)),
    "gemma3_text": _family("Gemma3Text", _gemma3, keys(norms=(*_SANDWICH, *_QK))),
    "gemma3": _family(
        "Gemma3",
        _gemma3_wrapper,
        keys(norms=(*_SANDWICH, *_QK), body="model.language_model."),
        untouched=(r"vision_tower\.", r"multi_modal_projector\."),
        layouts=(
            (
                ("model.language_model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."),
            ),
        ),
    ),
    "phi3": _family("Phi3", _phi3, keys(_PHI3_LINEARS)),
    "smollm3": _family("SmolLM3", _smollm3, keys()),
    "olmo2": _family("Olmo2", _olmo2, keys(norms=(*_SANDWICH[1:2], *_SANDWICH[3:], *_QK))),
    "gpt2": _family(
        "GPT2",
        _gpt2,
        _GPT2_KEYS,
        ignored=(r"\.attn\.(masked_)?bias$",),
        transposed=False,
        layouts=((("transformer.", ""),),),
    ),
    "mixtral": _family(
        "Mixtral", _mixtral, keys(_ATTENTION) | _experts("block_sparse_moe", _MIXTRAL)
    ),
    "qwen3_moe": _family(
        "Qwen3Moe", _qwen3_moe, keys(norms=(*_NORMS, *_QK)) | _experts("mlp", _DENSE)
    ),
}
