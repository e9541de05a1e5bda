"""Tiny random checkpoints of every family, written by transformers, and its answers about them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)  # threads that wait for each other are slow where cores are shared
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, PAD = 96, 0
LONGROPE_START = 24  # of the longrope shapes: rows longer than this take the long factors


class Shape(NamedTuple):
    """One checkpoint: `model(config(**sizes))` of transformers, with random weights."""

    model: str
    sizes: dict[str, Any]
    relaid: Callable[[Path], None] | None = None  # rewrites the saved folder

    @property
    def config(self) -> str:
        body = self.model.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        body = body.removesuffix("ForSequenceClassification").removesuffix("Text")
        body = body.removesuffix("ForConditionalGeneration")
        text = self.model.startswith("Gemma3") and "Conditional" not in self.model
        return f"{body}TextConfig" if text else f"{body}Config"


_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}


def _decoder(**changes: Any) -> dict[str, Any]:
    sizes = {"num_key_value_heads": 1, "max_position_embeddings": 512}
    return _SIZES | sizes | {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2} | changes


def _rope(kind: str = "default", theta: float = 10000.0, **changes: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **changes}


LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=6, beta_slow=0.5)
YARN_SCALED = YARN | {"mscale": 1.0, "mscale_all_dim": 0.6, "truncate": False}


def _longrope(half: int, **changes: Any) -> dict[str, Any]:
    """Factors that differ for every one of `half` frequencies."""
    short = [1.0 + 0.1 * i for i in range(half)]
    long = [2.0 + 0.7 * i for i in range(half)]
    return _rope("longrope", short_factor=short, long_factor=long, **changes)


def _two_ropes(**full: Any) -> dict[str, Any]:
    return {"full_attention": _rope(theta=5000.0) | full, "sliding_attention": _rope(theta=50.0)}


def _gemma_pattern(layers: int, every: int) -> list[str]:
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention"
            for i in range(layers)]  # fmt: skip


def _hub_gpt2(folder: Path) -> None:
    """As the hub has it: no `transformer.` prefix, and the buffers of the causal masks."""
    file = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    sizes = json.loads((folder / "config.json").read_text())
    mask = torch.tril(torch.ones(sizes["n_positions"], sizes["n_positions"]))
    for layer in range(sizes["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = mask[None, None].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def _old_gemma(folder: Path) -> None:
    """As Gemma's first releases: `gelu`, which means the tanh approximation there."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}, indent=2))


def _old_bert(folder: Path) -> None:
    """As BERT's first releases: norms' gamma and beta, and a buffer of position ids."""
    file = folder / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): values
        for name, values in load_file(file).items()
    }
    positions = tensors["bert.embeddings.position_embeddings.weight"].shape[0]
    tensors["bert.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file(tensors, file, metadata={"format": "pt"})


def _vision(**text: Any) -> dict[str, Any]:
    tower = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    tokens = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92}
    return {"text_config": text, "vision_config": tower, "mm_tokens_per_image": 4, **tokens}


_GEMMA = _decoder(hidden_size=24, num_attention_heads=4, head_dim=10, num_key_value_heads=2)
_GEMMA3 = _GEMMA | {"sliding_window": 7, "query_pre_attn_scalar": 13, "rope_parameters": None}
# torch multiplies groups of bfloat16 rows only where sizes are multiples of 8.
_WIDTHS = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 48}
_MOE = {**_WIDTHS, "num_local_experts": 5, "num_experts_per_tok": 2}
_QWEN_MOE = _decoder(
    **_WIDTHS,
    head_dim=14,
    num_experts=6,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    num_hidden_layers=5,
)

CAUSAL: dict[str, Shape] = {
    "llama-gqa": Shape(
        "LlamaForCausalLM",
        _decoder(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, pad_token_id=None),
    ),
    "llama-odd_heads_tied": Shape(
        "LlamaForCausalLM", _decoder(head_dim=10, tie_word_embeddings=True)
    ),
    "llama-biases_llama3": Shape(
        "LlamaForCausalLM",
        _decoder(num_key_value_heads=3, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    ),
    "llama-linear_gelu": Shape(
        "LlamaForCausalLM",
        _decoder(
            rope_parameters=_rope("linear", 500.0, factor=4.0), hidden_act="gelu", rms_norm_eps=1e-5
        ),
    ),
    "llama-yarn": Shape("LlamaForCausalLM", _decoder(rope_parameters=YARN)),
    "llama-yarn_scaled": Shape(
        "LlamaForCausalLM", _decoder(rope_parameters=YARN_SCALED, head_dim=20)
    ),
    "mistral-window": Shape(
        "MistralForCausalLM", _decoder(sliding_window=7, head_dim=10, rms_norm_eps=1e-5)
    ),
    "mistral-full": Shape(
        "MistralForCausalLM", _decoder(sliding_window=None, num_key_value_heads=3)
    ),
    "mistral-window_tied": Shape(
        "MistralForCausalLM",
        _decoder(
            sliding_window=16,
            tie_word_embeddings=True,
            num_hidden_layers=5,
            rope_parameters=_rope(theta=1e6),
        ),
    ),
    "qwen2-full": Shape("Qwen2ForCausalLM", _decoder(rope_parameters=_rope(theta=1e6))),
    "qwen2-windows": Shape(
        "Qwen2ForCausalLM",
        _decoder(
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=2,
            num_hidden_layers=5,
            num_key_value_heads=3,
        ),
    ),
    "qwen2-yarn_tied": Shape(
        "Qwen2ForCausalLM",
        _decoder(tie_word_embeddings=True, rope_parameters=YARN, hidden_size=24),
    ),
    "qwen3-wide_heads": Shape(
        "Qwen3ForCausalLM", _decoder(head_dim=14, rope_parameters=_rope(theta=1e6))
    ),
    "qwen3-tied_biases": Shape(
        "Qwen3ForCausalLM",
        _decoder(head_dim=20, tie_word_embeddings=True, attention_bias=True, num_key_value_heads=3),
    ),
    "qwen3-windows_yarn": Shape(
        "Qwen3ForCausalLM",
        _decoder(
            head_dim=16,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
            rope_parameters=YARN,
        ),
    ),
    "gemma-plain": Shape("GemmaForCausalLM", _GEMMA),
    "gemma-one_kv": Shape("GemmaForCausalLM", _GEMMA | {"num_key_value_heads": 1, "head_dim": 14}),
    "gemma-old_gelu": Shape(
        "GemmaForCausalLM",
        _GEMMA | {"hidden_size": 32, "num_key_value_heads": 4},
        _old_gemma,
    ),
    "gemma2-even_caps": Shape(
        "Gemma2ForCausalLM",
        _GEMMA
        | {
            "sliding_window": 7,
            "query_pre_attn_scalar": 13,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2-five_layers": Shape(
        "Gemma2ForCausalLM",
        _GEMMA
        | {
            "num_hidden_layers": 5,
            "sliding_window": 5,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma2-no_caps": Shape(
        "Gemma2ForCausalLM",
        _GEMMA
        | {
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu",
        },
    ),
    "gemma3-seven_layers": Shape(
        "Gemma3ForCausalLM", _GEMMA3 | {"num_hidden_layers": 7, "rope_parameters": _two_ropes()}
    ),
    "gemma3-linear": Shape(
        "Gemma3ForCausalLM",
        _GEMMA3
        | {
            "num_hidden_layers": 5,
            "num_key_value_heads": 1,
            "layer_types": _gemma_pattern(5, 3),
            "rope_parameters": _two_ropes(rope_type="linear", factor=8.0),
        },
    ),
    "gemma3-final_cap": Shape(
        "Gemma3ForCausalLM",
        _GEMMA3
        | {
            "head_dim": 6,
            "num_hidden_layers": 3,
            "layer_types": _gemma_pattern(3, 2),
            "final_logit_softcapping": 3.0,
            "rope_parameters": _two_ropes(),
        },
    ),
    "gemma3_vision-seven_layers": Shape(
        "Gemma3ForConditionalGeneration",
        _vision(**_GEMMA3 | {"num_hidden_layers": 7, "rope_parameters": _two_ropes()}),
    ),
    "gemma3_vision-linear": Shape(
        "Gemma3ForConditionalGeneration",
        _vision(
            **_GEMMA3
            | {
                "num_hidden_layers": 3,
                "layer_types": _gemma_pattern(3, 3),
                "rope_parameters": _two_ropes(rope_type="linear", factor=8.0),
            }
        ),
    ),
    "gemma3_vision-one_kv": Shape(
        "Gemma3ForConditionalGeneration",
        _vision(
            **_GEMMA3
            | {
                "num_hidden_layers": 4,
                "num_key_value_heads": 1,
                "layer_types": _gemma_pattern(4, 2),
                "rope_parameters": _two_ropes(),
            }
        ),
    ),
    "phi3-plain": Shape("Phi3ForCausalLM", _decoder()),
    "phi3-longrope": Shape(
        "Phi3ForCausalLM",
        _decoder(
            rope_parameters=_longrope(6),
            original_max_position_embeddings=LONGROPE_START,
            num_key_value_heads=3,
        ),
    ),
    "phi3-partial_longrope_window": Shape(
        "Phi3ForCausalLM",
        _decoder(
            rope_parameters=_longrope(3, partial_rotary_factor=0.5),
            original_max_position_embeddings=LONGROPE_START,
            sliding_window=9,
            tie_word_embeddings=True,
        ),
    ),
    "phi3-partial": Shape(
        "Phi3ForCausalLM",
        _decoder(rope_parameters=_rope(partial_rotary_factor=0.75), hidden_size=48),
    ),
    "smollm3-default": Shape("SmolLM3ForCausalLM", _decoder(num_hidden_layers=5)),
    "smollm3-some_layers": Shape(
        "SmolLM3ForCausalLM",
        _decoder(
            no_rope_layers=[1, 0, 1],
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=_rope(theta=5e4),
        ),
    ),
    "smollm3-windows": Shape(
        "SmolLM3ForCausalLM",
        _decoder(
            num_hidden_layers=4,
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=7,
            num_key_value_heads=3,
        ),
    ),
    "olmo2-one_kv": Shape("Olmo2ForCausalLM", _decoder()),
    "olmo2-biases": Shape("Olmo2ForCausalLM", _decoder(attention_bias=True, num_key_value_heads=3)),
    "olmo2-tied": Shape(
        "Olmo2ForCausalLM",
        _decoder(tie_word_embeddings=True, rope_parameters=_rope(theta=5e5), num_hidden_layers=5),
    ),
    "gpt2-plain": Shape(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_positions": 128,
            "n_embd": 36,
            "n_layer": 3,
            "n_head": 3,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
    "gpt2-hub": Shape(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_positions": 96,
            "n_embd": 28,
            "n_layer": 3,
            "n_head": 2,
            "n_inner": 44,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
        _hub_gpt2,
    ),
    "gpt2-scaled": Shape(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_positions": 128,
            "n_embd": 36,
            "n_layer": 5,
            "n_head": 9,
            "activation_function": "gelu",
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
    "mixtral-full": Shape("MixtralForCausalLM", _decoder(**_MOE)),
    "mixtral-window": Shape("MixtralForCausalLM", _decoder(**_MOE, sliding_window=7, head_dim=10)),
    "mixtral-three_of_four": Shape(
        "MixtralForCausalLM",
        _decoder(
            **_MOE | {"num_local_experts": 4, "num_experts_per_tok": 3},
            tie_word_embeddings=True,
            num_key_value_heads=5,
        ),
    ),
    "qwen3_moe-mixed": Shape(
        "Qwen3MoeForCausalLM",
        _QWEN_MOE | {"mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "qwen3_moe-every_second": Shape(
        "Qwen3MoeForCausalLM",
        _QWEN_MOE | {"decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True},
    ),
    "qwen3_moe-window_tied": Shape(
        "Qwen3MoeForCausalLM",
        _QWEN_MOE
        | {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "tie_word_embeddings": True,
            "num_key_value_heads": 5,
            "norm_topk_prob": True,
        },
    ),
}


def _encoder(**changes: Any) -> dict[str, Any]:
    return _SIZES | {"max_position_embeddings": 64, "num_labels": 3} | changes


_MODERN = {
    **_encoder(hidden_size=36, local_attention=8, max_position_embeddings=128),
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
_DISTIL = {"vocab_size": VOCAB, "dim": 36, "hidden_dim": 44, "n_layers": 3, "n_heads": 3}

ENCODERS: dict[str, Shape] = {
    "bert-plain": Shape("BertForSequenceClassification", _encoder()),
    "bert-two_labels": Shape(
        "BertForSequenceClassification",
        _encoder(num_labels=2, num_hidden_layers=5, hidden_size=28, num_attention_heads=2),
    ),
    "bert-gelu_new": Shape(
        "BertForSequenceClassification",
        _encoder(hidden_act="gelu_new", layer_norm_eps=1e-2, type_vocab_size=3, num_labels=5),
    ),
    "bert-old_names": Shape("BertForSequenceClassification", _encoder(), _old_bert),
    "roberta-plain": Shape("RobertaForSequenceClassification", _encoder()),
    "roberta-one_type": Shape(
        "RobertaForSequenceClassification",
        _encoder(type_vocab_size=1, num_labels=2, layer_norm_eps=1e-2),
    ),
    "roberta-relu": Shape(
        "RobertaForSequenceClassification",
        _encoder(hidden_act="relu", num_hidden_layers=5, num_labels=7, num_attention_heads=9),
    ),
    "xlm_roberta-plain": Shape("XLMRobertaForSequenceClassification", _encoder()),
    "xlm_roberta-one_type": Shape(
        "XLMRobertaForSequenceClassification",
        _encoder(type_vocab_size=1, num_labels=2, layer_norm_eps=1e-2),
    ),
    "xlm_roberta-deep": Shape(
        "XLMRobertaForSequenceClassification", _encoder(num_hidden_layers=5, hidden_size=24)
    ),
    "distilbert-plain": Shape(
        "DistilBertForSequenceClassification",
        _DISTIL | {"num_labels": 3, "max_position_embeddings": 64},
    ),
    "distilbert-relu": Shape(
        "DistilBertForSequenceClassification",
        _DISTIL | {"activation": "relu", "n_heads": 9, "max_position_embeddings": 50},
    ),
    "distilbert-deep": Shape(
        "DistilBertForSequenceClassification",
        _DISTIL | {"n_layers": 5, "sinusoidal_pos_embds": True, "num_labels": 5},
    ),
    "modernbert-cls": Shape(
        "ModernBertForSequenceClassification", _MODERN | {"num_hidden_layers": 5}
    ),
    "modernbert-mean": Shape(
        "ModernBertForSequenceClassification",
        _MODERN
        | {
            "classifier_pooling": "mean",
            "num_hidden_layers": 7,
            "num_labels": 2,
            "rope_parameters": _two_ropes(),
        },
    ),
    "modernbert-biases": Shape(
        "ModernBertForSequenceClassification",
        _MODERN
        | {
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "local_attention": 6,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
}

SCORED: dict[str, Shape] = {
    "llama-score": Shape(
        "LlamaForSequenceClassification", _decoder(num_labels=3, rope_parameters=LLAMA3)
    ),
    "qwen3-score": Shape(
        "Qwen3ForSequenceClassification",
        _decoder(head_dim=14, num_labels=2, tie_word_embeddings=True),
    ),
    "gpt2-score": Shape(
        "GPT2ForSequenceClassification",
        CAUSAL["gpt2-plain"].sizes | {"num_labels": 5, "pad_token_id": PAD},
    ),
    "gemma-score": Shape("GemmaForSequenceClassification", _GEMMA | {"num_labels": 3}),
    "gemma2-score": Shape(
        "Gemma2ForSequenceClassification",
        CAUSAL["gemma2-even_caps"].sizes | {"num_labels": 3},
    ),
    "gemma3-score": Shape(
        "Gemma3TextForSequenceClassification",
        CAUSAL["gemma3-linear"].sizes | {"num_labels": 3},
    ),
}

ALL = CAUSAL | ENCODERS | SCORED


def of_family(*names: str) -> list[str]:
    """The shapes of one or more families, such as "gemma3"."""
    return [name for name in ALL if name.split("-")[0] in names]


def one_each(pick: int) -> list[Any]:
    """Every shape as a test parameter; all but one of each family, the pick-th, are slow."""
    kept = {of_family(name.split("-")[0])[pick] for name in ALL} | set(SCORED)
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in kept)) for name in ALL]


def write(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    embedding: float = 1.0,
    **changes: Any,
) -> Path:
    """Saves a checkpoint whose weights are all random, also norms and biases; logits order 1.

    A small `embedding` keeps a tied model from saying its last token again and again.
    """
    shape = ALL[name]
    torch.manual_seed(seed)
    config = getattr(transformers, shape.config)(**shape.sizes | changes)
    model = getattr(transformers, shape.model)(config)
    with torch.no_grad():
        for path, values in model.named_parameters():
            noise = torch.randn_like(values)
            fan_in = values.shape[0 if ".c_" in path else -1]  # GPT-2's projections are transposed
            if values.ndim == 1:  # norms are born at one (Gemma's at zero), biases at zero
                values.add_(0.2 * noise)
            else:
                values.copy_(noise * fan_in**-0.5)
        model.get_input_embeddings().weight.mul_(embedding)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if shape.relaid is not None:
        shape.relaid(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers has it."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any, tokens: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    """Float32 logits: [B, T, V] of a causal model, [B, C] of a classifier."""
    given = {name: torch.tensor(np.asarray(values)) for name, values in inputs.items()}
    with torch.no_grad():
        return model(input_ids=torch.tensor(np.asarray(tokens)), **given).logits.float().numpy()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation, up to and without eos."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    new = out[0, len(prompt) :].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return new[: next((i for i, token in enumerate(new) if token in ends), len(new))]


def v4_config(hf: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 the way transformers 4 wrote it."""
    old = {k: v for k, v in hf.items() if k not in ("dtype", "rope_parameters")}
    if "text_config" in hf:
        return old | {"text_config": v4_config(hf["text_config"]), "torch_dtype": hf["dtype"]}
    if "dtype" in hf:
        old["torch_dtype"] = hf["dtype"]
    old["transformers_version"] = "4.51.3"
    kind, ropes = hf["model_type"], hf.get("rope_parameters") or {}
    if kind == "modernbert":
        old["global_rope_theta"] = ropes["full_attention"]["rope_theta"]
        old["local_rope_theta"] = ropes["sliding_attention"]["rope_theta"]
        if old["layer_types"][:4].count("full_attention") == 2:  # the default pattern
            del old["layer_types"]
            old["global_attn_every_n_layers"] = 3
        return old
    if kind == "gemma3_text":
        old.pop("_sliding_window_pattern", None)
        every = old.pop("layer_types").index("full_attention") + 1
        old["sliding_window_pattern"] = every
        old["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    elif kind in ("gemma2", "qwen2", "qwen3", "smollm3"):
        del old["layer_types"]  # follows from the other fields, which v4 had
    elif kind == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    if not ropes:
        return old
    scaling = {k: v for k, v in ropes.items() if k not in ("rope_theta", "partial_rotary_factor")}
    old["rope_theta"] = ropes["rope_theta"]
    if "partial_rotary_factor" in ropes:
        old["partial_rotary_factor"] = ropes["partial_rotary_factor"]
    if kind == "phi3":  # it had its own name for it, and the length beside it
        scaling.pop("original_max_position_embeddings", None)
        scaling = {"type": scaling.pop("rope_type"), **scaling}
    plain = scaling.get("rope_type", scaling.get("type")) == "default"
    old["rope_scaling"] = None if plain else scaling
    return old
