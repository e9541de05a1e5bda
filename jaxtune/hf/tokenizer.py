"""Tokenizers of Hugging Face folders, read as data: no code that a folder names is ever imported.

`AutoTokenizer` is not used. For a bare sentencepiece file it builds a tokenizer that gives other
ids (45 of the 47 published Llama-2 vectors differ), and which class it imports is the folder's say.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.data.templates import TURN_ENDS
from jaxtune.errors import ModelError

# What belongs to a tokenizer and is copied verbatim on export. tokenizer* also covers the
# sentencepiece and tiktoken files.
PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "sentencepiece*.model",
    "spiece.model",
    "chat_template*.jinja",
    "chat_template*.json",
    "additional_chat_templates/*.jinja",
)
# Classes that read vocab.json + merges.txt, by the name in tokenizer_config.json. They differ in
# how they cut text before merging, so an unknown name is refused.
BYTE_LEVEL = {
    "": "GPT2Tokenizer",
    "GPT2Tokenizer": "GPT2Tokenizer",
    "GPT2TokenizerFast": "GPT2Tokenizer",
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen2TokenizerFast": "Qwen2Tokenizer",
}
EXTRA_SPACES = (("^ +| +$", ""), (" {2,}", " "))  # what remove_extra_whitespaces replaces
SPACE = "\u2581"  # sentencepiece's visible space


def load_tokenizer(path: str, vocab_size: int | None = None) -> Any:
    """The tokenizer of a local folder, with its special tokens and chat template.

    Read from tokenizer.json, else tokenizer.model (sentencepiece), else vocab.json + merges.txt.
    A missing pad token stays missing: padding is told apart by segment 0, not by its id.

    Args:
      path: folder.
      vocab_size: rows of the embedding, to check the ids against.

    Raises:
      ModelError: for a folder without a tokenizer, a damaged file, or an id beyond the embedding.
    """
    folder = Path(path)
    build = _builder(folder)
    try:
        tokenizer = build(folder)
        tokenizer.encode("a")  # damage can lie dormant until the first use
    except ModelError:
        raise
    except BaseException as error:
        # The Rust library panics with an exception that is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the tokenizer in {folder} is damaged: {type(error).__name__}: {str(error)[:200]}",
            fix="a fresh copy of its files",
        ) from error
    if vocab_size is not None:
        _check_ids(tokenizer, vocab_size, folder)
    return tokenizer


def tokenizer_files(path: str) -> tuple[Path, ...]:
    """The tokenizer's files in a folder, sorted: those to copy verbatim on export."""
    folder = Path(path)
    found = {file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return tuple(sorted(found))


def tokenizer_digest(path: str) -> str:
    """sha256 over names and contents of `tokenizer_files`."""
    state = hashlib.sha256()
    for file in tokenizer_files(path):
        content = file.read_bytes()
        state.update(f"{file.relative_to(path).as_posix()}:{len(content)}:".encode())
        state.update(content)
    return state.hexdigest()


def stop_ids(tokenizer: Any, generation_config: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Ids that end a generated text: eos of generation_config and tokenizer, ends of turns."""
    given = (generation_config or {}).get("eos_token_id")
    listed = given if isinstance(given, (list, tuple)) else [given]
    turns = [i for i, token in tokenizer.added_tokens_decoder.items() if str(token) in TURN_ENDS]
    ids = [*listed, tokenizer.eos_token_id, *turns]
    return tuple(sorted({id_ for id_ in ids if type(id_) is int}))


def _builder(folder: Path) -> Callable[[Path], Any]:
    if not folder.is_dir():
        raise ModelError(f"tokenizer folder {folder} does not exist", fix="a Hugging Face folder")
    have = {file.name for file in folder.iterdir()}
    if "tokenizer.json" in have:
        return _from_json
    if "tokenizer.model" in have:
        return _from_sentencepiece
    if {"vocab.json", "merges.txt"} <= have:
        return _from_vocabulary
    raise ModelError(
        f"{folder} has no tokenizer; it has {', '.join(sorted(have)) or 'no files'}",
        fix="tokenizer.json, tokenizer.model, or vocab.json and merges.txt in it",
    )


def _from_json(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _from_vocabulary(folder: Path) -> Any:
    import transformers

    name = str(_settings(folder).get("tokenizer_class") or "")
    if name not in BYTE_LEVEL:
        raise ModelError(
            f"{folder}: vocab.json and merges.txt of a {name}; known are "
            f"{', '.join(filter(None, BYTE_LEVEL))}",
            fix="a folder with tokenizer.json",
        )
    kind = getattr(transformers, BYTE_LEVEL[name])
    return kind.from_pretrained(str(folder), local_files_only=True)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_bytes()) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise ModelError(f"{file} is not a JSON object", fix="a fresh copy")
    return settings


def _from_sentencepiece(folder: Path) -> Any:
    """The pieces, merges and normalisation exactly as the sentencepiece file states them."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    proto = _read_proto(folder / "tokenizer.model")
    tokenizer = _sentencepiece_backend(proto)
    pieces = [piece.piece for piece in proto.pieces]
    # Control pieces are never made from text; user-defined ones always are, and are text.
    control = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    defined = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in control])
    tokenizer.add_tokens([AddedToken(p, normalized=False, special=False) for p in defined])
    settings = _settings(folder)
    spec = proto.trainer_spec
    marks = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id}
    known = {f"{name}_token": pieces[id_] for name, id_ in marks.items() if 0 <= id_ < len(pieces)}
    # Llama's own defaults where no tokenizer_config.json says otherwise: bos before, no eos after.
    habits = {
        "bos": settings.get("add_bos_token", True),
        "eos": settings.get("add_eos_token", False),
    }
    before, after = (
        [(known[f"{name}_token"], marks[name])] if habits[name] and f"{name}_token" in known else []
        for name in ("bos", "eos")
    )
    if before or after:
        single = " ".join([*(t for t, _ in before), "$A", *(t for t, _ in after)])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=f"{single} {single.replace('$A', '$B')}",
            special_tokens=before + after,
        )
    template = folder / "chat_template.jinja"
    chat = template.read_text("utf-8") if template.is_file() else settings.get("chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat, clean_up_tokenization_spaces=False, **known
    )


def _read_proto(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ModelError(
            f"{file} is not a sentencepiece model (Llama 3's is tiktoken)",
            fix="a fresh copy, or a folder with tokenizer.json",
        ) from error
    if not proto.pieces:
        raise ModelError(f"{file} is a sentencepiece model without pieces", fix="a fresh copy")
    return proto


def _sentencepiece_backend(proto: Any) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    spec, rules = proto.trainer_spec, proto.normalizer_spec
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if spec.model_type == spec.BPE:
        ids = {piece: id_ for id_, (piece, _) in enumerate(scores)}
        model: Any = models.BPE(
            ids,
            generate_merges(ids, dict(scores)),
            unk_token=scores[spec.unk_id][0],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    elif spec.model_type == spec.UNIGRAM:
        model = models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    else:
        raise ModelError(
            "tokenizer.model is a word or character model", fix="a folder with tokenizer.json"
        )
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(old), new) for old, new in EXTRA_SPACES]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(steps)
    tail = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return tokenizer


def _check_ids(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    token, top = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if top >= vocab_size:
        raise ModelError(
            f"tokenizer in {folder}: token {token!r} has id {top}, and the embedding has "
            f"{vocab_size} rows",
            fix="the tokenizer that belongs to this model",
        )
