"""Encoders with a classification head: BERT, RoBERTa and XLM-R, DistilBERT, ModernBERT.

Paths are the same for all of them: `head.dense` is what stands before the last projection, a pooler
in BERT and part of the classifier in RoBERTa, and `classifier` is that projection.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.models.encoder import EncoderConfig
from jaxtune.models.families import Family, Fields, sliding_layers
from jaxtune.models.layers import ACTIVATIONS
from jaxtune.models.rope import Rope

_UNTURNED = (Rope(kind="none"),)


def _heads(hf: Fields, width: str, heads: str) -> dict[str, Any]:
    size, count = int(hf.need(width)), int(hf.need(heads))
    if size % count:
        raise ModelError(
            f"config.json has {width} {size}, which does not divide by {heads} {count}",
            fix="the checkpoint's own config.json",
        )
    return {
        "hidden_size": size,
        "num_heads": count,
        "num_kv_heads": count,
        "head_dim": size // count,
    }


def _post_norm(activation: str) -> dict[str, Any]:
    """What BERT and its descendants share."""
    return {
        "norm": "layer",
        "norm_bias": True,
        "norms": "residual",
        "activation": activation,
        "mlp": "plain",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "ropes": _UNTURNED,
        "causal": False,
    }


def _bert(hf: Fields) -> EncoderConfig:
    # What many a published config.json says of a pooler that is always the same.
    hf.pass_over("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")
    hf.pass_over("pooler_size_per_head", "tie_word_embeddings", "output_past")
    hf.one_of("pooler_type", "first_token_transform", ("first_token_transform",))
    hf.one_of("directionality", "bidi", ("bidi",))
    hf.one_of("position_embedding_type", "absolute", ("absolute",))
    for name in ("is_decoder", "add_cross_attention"):
        hf.one_of(name, False, (False, None))
    return EncoderConfig(
        vocab_size=hf.need("vocab_size"),
        intermediate_size=hf.need("intermediate_size"),
        num_layers=hf.need("num_hidden_layers"),
        max_position=hf.need("max_position_embeddings"),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        types=hf.get("type_vocab_size", 2),
        typed_pairs=hf.get("type_vocab_size", 2) > 1,
        **_heads(hf, "hidden_size", "num_attention_heads"),
        **_post_norm(hf.one_of("hidden_act", "gelu", ACTIVATIONS)),
    )


def _roberta(hf: Fields) -> EncoderConfig:
    config = _bert(hf)
    # Rows of the table up to the padding token's are never a position (fairseq's convention).
    offset = hf.get("pad_token_id", 1) + 1
    return replace(
        config,
        max_position=config.max_position - offset,
        position_offset=offset,
        typed_pairs=False,
    )


def _distilbert(hf: Fields) -> EncoderConfig:
    hf.pass_over("sinusoidal_pos_embds", "tie_weights_", "tie_word_embeddings", "output_past")
    return EncoderConfig(
        vocab_size=hf.need("vocab_size"),
        intermediate_size=hf.need("hidden_dim"),
        num_layers=hf.need("n_layers"),
        max_position=hf.get("max_position_embeddings", 512),
        norm_eps=1e-12,
        head_activation="relu",
        **_heads(hf, "dim", "n_heads"),
        **_post_norm(hf.one_of("activation", "gelu", ACTIVATIONS)),
    )


def _modernbert(hf: Fields) -> EncoderConfig:
    hf.pass_over("layer_norm_eps", "position_embedding_type", "tie_word_embeddings", "decoder_bias")
    hf.pass_over("sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn")
    hf.pass_over("reference_compile", "repad_logits_with_grad", "is_decoder")
    layers, every = hf.need("num_hidden_layers"), hf.get("global_attn_every_n_layers", 3)
    local = sliding_layers(hf, layers, lambda i: i % every != 0)
    bias, half = bool(hf.get("attention_bias")), hf.get("local_attention", 128) // 2
    return EncoderConfig(
        vocab_size=hf.need("vocab_size"),
        intermediate_size=hf.need("intermediate_size"),
        num_layers=layers,
        max_position=hf.get("max_position_embeddings", 8192),
        norm_eps=hf.get("norm_eps", 1e-5),
        norm="layer",
        norm_bias=bool(hf.get("norm_bias")),
        activation=hf.one_of("hidden_activation", "gelu", ACTIVATIONS),
        mlp="fused",
        fused_qkv=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias")),
        ropes=(_rope(hf, "full_attention", "global"), _rope(hf, "sliding_attention", "local")),
        rope_of=tuple(map(int, local)),
        windows=tuple(half if is_local else 0 for is_local in local),
        bare_start=True,
        causal=False,
        learned_positions=False,
        final_norm=True,
        float_rope=True,
        head_activation=hf.one_of("classifier_activation", "gelu", ACTIVATIONS),
        head_bias=bool(hf.get("classifier_bias")),
        head_norm=True,
        pooling=hf.one_of("classifier_pooling", "cls", ("cls", "mean")),
        **_heads(hf, "hidden_size", "num_attention_heads"),
    )


def _rope(hf: Fields, kind: str, reach: str) -> Rope:
    """The rotary table of one kind of layer, as transformers 5 or 4 names it."""
    default = {"global": 160000.0, "local": 10000.0}[reach]
    theta = hf.get(f"{reach}_rope_theta")  # transformers 4
    given: Mapping[str, Any] = (hf.get("rope_parameters") or {}).get(kind) or {}
    if given.get("rope_type", "default") != "default":
        raise ModelError(
            f"config.json has rope_type {given['rope_type']!r} for {kind}", fix="default"
        )
    return Rope(theta=given.get("rope_theta") or theta or default)


def _layer(prefix: str, names: Mapping[str, str], *leaves: str) -> dict[str, str]:
    """Keys of the parts of a layer: every part has these leaves."""
    stored = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    return {
        f"layers.{{i}}.{path}.{leaf}": f"{prefix}.{{i}}.{name}.{stored[leaf]}"
        for path, name in names.items()
        for leaf in leaves
    }


def _bert_keys(body: str, dense: str, classifier: str) -> dict[str, str]:
    embeddings, layer = f"{body}.embeddings", f"{body}.encoder.layer"
    projections = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.o_proj": "attention.output.dense",
        "mlp.up_proj": "intermediate.dense",
        "mlp.down_proj": "output.dense",
    }
    norms = {
        "post_attention_layernorm": "attention.output.LayerNorm",
        "post_feedforward_layernorm": "output.LayerNorm",
    }
    return {
        "embed_tokens.embedding": f"{embeddings}.word_embeddings.weight",
        "embed_positions.embedding": f"{embeddings}.position_embeddings.weight",
        "embed_types.embedding": f"{embeddings}.token_type_embeddings.weight",
        **_norm_and_head(f"{embeddings}.LayerNorm", dense, classifier),
        **_layer(layer, projections, "kernel", "bias"),
        **_layer(layer, norms, "scale", "bias"),
    }


def _norm_and_head(norm: str, dense: str, classifier: str) -> dict[str, str]:
    return {
        "embed_norm.scale": f"{norm}.weight",
        "embed_norm.bias": f"{norm}.bias",
        "head.dense.kernel": f"{dense}.weight",
        "head.dense.bias": f"{dense}.bias",
        "classifier.kernel": f"{classifier}.weight",
        "classifier.bias": f"{classifier}.bias",
    }


def _distilbert_keys() -> dict[str, str]:
    embeddings, layer = "distilbert.embeddings", "distilbert.transformer.layer"
    projections = {
        "self_attn.q_proj": "attention.q_lin",
        "self_attn.k_proj": "attention.k_lin",
        "self_attn.v_proj": "attention.v_lin",
        "self_attn.o_proj": "attention.out_lin",
        "mlp.up_proj": "ffn.lin1",
        "mlp.down_proj": "ffn.lin2",
    }
    norms = {
        "post_attention_layernorm": "sa_layer_norm",
        "post_feedforward_layernorm": "output_layer_norm",
    }
    return {
        "embed_tokens.embedding": f"{embeddings}.word_embeddings.weight",
        "embed_positions.embedding": f"{embeddings}.position_embeddings.weight",
        **_norm_and_head(f"{embeddings}.LayerNorm", "pre_classifier", "classifier"),
        **_layer(layer, projections, "kernel", "bias"),
        **_layer(layer, norms, "scale", "bias"),
    }


def _modernbert_keys() -> dict[str, str]:
    projections = {
        "self_attn.qkv_proj": "attn.Wqkv",
        "self_attn.o_proj": "attn.Wo",
        "mlp.gate_up_proj": "mlp.Wi",
        "mlp.down_proj": "mlp.Wo",
    }
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    return {
        "embed_tokens.embedding": "model.embeddings.tok_embeddings.weight",
        **_norm_and_head("model.embeddings.norm", "head.dense", "classifier"),
        "head.norm.scale": "head.norm.weight",
        "head.norm.bias": "head.norm.bias",
        "norm.scale": "model.final_norm.weight",
        "norm.bias": "model.final_norm.bias",
        **_layer("model.layers", projections, "kernel", "bias"),
        **_layer("model.layers", norms, "scale", "bias"),
    }


_HEADS = ("head.", "classifier.")
# Older files name what scales and shifts a norm as TensorFlow did.
_OLD_NORMS = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


def _layouts(body: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Files of the model alone lack the prefix of its body; either may have the old norms."""
    alone = (f"{body}.", "")
    return ((alone,), _OLD_NORMS, (alone, *_OLD_NORMS))


_ROBERTA = Family(
    _roberta,
    _bert_keys("roberta", "classifier.dense", "classifier.out_proj"),
    label="Roberta",
    ignored=(r".*position_ids", r"lm_head\..*", r"(roberta\.)?pooler\..*"),
    heads=_HEADS,
    layouts=_layouts("roberta"),
)

BIDIRECTIONAL: dict[str, Family] = {
    "bert": Family(
        _bert,
        _bert_keys("bert", "bert.pooler.dense", "classifier"),
        label="Bert",
        ignored=(r".*position_ids", r"cls\..*"),  # next sentences and masked words
        heads=_HEADS,
        layouts=_layouts("bert"),
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, label="XLMRoberta"),
    "camembert": replace(_ROBERTA, label="Camembert"),
    "distilbert": Family(
        _distilbert,
        _distilbert_keys(),
        label="DistilBert",
        ignored=(r".*position_ids", r"vocab_(transform|layer_norm|projector)\..*"),
        heads=_HEADS,
        layouts=_layouts("distilbert"),
    ),
    "modernbert": Family(
        _modernbert,
        _modernbert_keys(),
        label="ModernBert",
        ignored=(r"decoder\..*",),
        heads=_HEADS,
        layouts=((("model.", ""),),),
    ),
}
