"""Text from a decoder: batched, with a key/value cache, greedy or sampled.

Prompts are padded on the left, so that all rows of a batch write the same slot next:

    slots      0  1  2  3  4  5  6  7
    tokens     .  .  5  6  7  a  b  .      a, b generated; segment 0 marks padding
               4  5  6  7  8  c  </s>

Rows and slots come in few sizes, and everything else is traced, so few programs are compiled.
Letters: B rows, S slots, D model width, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtune import sharding, tree
from jaxtune.data.chat import prompt_tokens
from jaxtune.errors import ConfigError, DataError
from jaxtune.models.decoder import Decoder, KVCache

_CHUNK = 64  # prompt tokens read at once; slots come in powers of two of it
_STOPS = 8  # stop ids come in multiples of this


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens` tokens; the stop token is left out.

    What a prompt becomes does not depend on the others beyond rounding: a draw is a function of
    (seed, number of the prompt, number of the token).

    Args:
      model: its mesh, if any, is the current one.
      prompts: token ids, beginning with bos where the model wants it.
      stop_ids: tokens that end a text.
      temperature: 0 takes the most likely token.
      top_p: draws from the fewest tokens that hold this probability together.
      batch_size: most rows decoded at once; they share the memory of one cache.

    Raises:
      ConfigError: numbers that make no sense, or more tokens than the model has positions.
      DataError: an empty prompt, or a token outside the vocabulary.
    """
    sampling = _Sampling(temperature, top_p, seed)
    _check(model, prompts, max_new_tokens, sampling, batch_size)
    stops_K = np.unique(np.array([-1, *stop_ids], np.int32))
    stops_K = np.pad(stops_K, (0, -len(stops_K) % _STOPS), constant_values=-1)
    limits = [r.original_max_position for r in model.config.ropes if r.kind == "longrope"]
    texts = [_Text(i, list(prompt), max_new_tokens) for i, prompt in enumerate(prompts)]
    if not limits:
        return _continue(model, texts, stops_K, sampling, batch_size)
    # LongRoPE turns all of a text otherwise once it passes a length, so what is cached up to there
    # is of no use behind it (transformers drops its cache as well): two calls, each of one kind.
    limit, results = limits[0], [[] for _ in texts]
    short = [t._replace(count=min(t.count, limit + 1 - len(t.tokens)))
             for t in texts if len(t.tokens) <= limit]  # fmt: skip
    found = _continue(_turned(model, long=False), short, stops_K, sampling, batch_size)
    ended = set()
    for text, new in zip(short, found, strict=True):
        results[text.number] = new
        if len(new) < text.count or text.count == max_new_tokens:
            ended.add(text.number)
    rest = [
        _Text(t.number + len(texts), t.tokens + results[t.number], t.count - len(results[t.number]))
        for t in texts
        if t.number not in ended
    ]
    found = _continue(_turned(model, long=True), rest, stops_K, sampling, batch_size)
    for text, new in zip(rest, found, strict=True):
        results[text.number - len(texts)] += new
    return results


class _Sampling(NamedTuple):
    temperature: Any
    top_p: Any
    seed: Any


class _Text(NamedTuple):
    number: int  # what its draws are a function of
    tokens: list[int]
    count: int  # new tokens, at most


def _turned(model: Decoder, *, long: bool) -> Decoder:
    """The model with LongRoPE's short or its long factors at any length."""
    ropes = tuple(
        replace(rope, short_factor=factor, long_factor=factor)
        for rope in model.config.ropes
        for factor in [rope.long_factor if long else rope.short_factor]
    )
    copy: Decoder = tree.merge(*tree.split(model))
    copy.config = replace(model.config, ropes=ropes)
    return copy


def _continue(
    model: Decoder,
    texts: Sequence[_Text],
    stops_K: np.ndarray,
    sampling: _Sampling,
    batch_size: int,
) -> list[list[int]]:
    """The new tokens of each text, batch by batch."""
    graphdef, params = tree.split(model)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].tokens))  # like with like
    rows = _rows(math.ceil(len(order) / max(math.ceil(len(order) / batch_size), 1)))
    results: list[list[int]] = [[] for _ in texts]
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        start = max(len(texts[i].tokens) for i in chosen)
        count = max(texts[i].count for i in chosen)
        tokens_BS = np.zeros((rows, _slots(start + count)), np.int32)
        lengths_B, numbers_B = np.zeros((2, rows), np.int32)
        for row, i in enumerate(chosen):
            number, tokens, _ = texts[i]
            tokens_BS[row, start - len(tokens) : start] = tokens
            lengths_B[row], numbers_B[row] = len(tokens), number
        request = _Request(
            tokens_BS, lengths_B, numbers_B, start, count, stops_K, _traced(sampling)
        )
        out = _run(graphdef, sampling.temperature > 0, params, request)
        out_BS, ends_B = map(np.asarray, out)
        for row, i in enumerate(chosen):
            results[i] = out_BS[row, start : ends_B[row]].tolist()[: texts[i].count]
    return results


def complete(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[dict]],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    template: str | None = None,
    **options: Any,
) -> list[str]:
    """What the model writes after each text, or after the messages of a conversation.

    Special tokens are left out. `options` are those of `generate`.

    Raises:
      DataError: as `generate`; messages and no chat template.
    """
    out = generate(
        model,
        [prompt_tokens(tokenizer, prompt, template) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        **options,
    )
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out]


class _Request(NamedTuple):
    tokens_BS: Any  # int32, prompts right before slot `start`
    lengths_B: Any  # of the prompts; 0 marks a row that only fills the batch
    numbers_B: Any  # of the prompts in the caller's list
    start: Any  # slot of the first new token
    count: Any  # most new tokens
    stops_K: Any
    sampling: _Sampling


class _Loop(NamedTuple):
    slot: jax.Array  # the next to write
    x_BD: jax.Array  # activation of the last token
    tokens_BS: jax.Array
    ends_B: jax.Array  # slot after the last token of the result
    done_B: jax.Array
    cache: KVCache


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    graphdef: nnx.GraphDef,
    sampled: bool,
    params: dict[str, jax.Array],
    request: _Request,
) -> tuple[jax.Array, jax.Array]:
    """-> (tokens_BS with the new tokens behind the prompts, slot after the last of each)."""
    model: Decoder = tree.merge(graphdef, params)
    sampling = request.sampling
    key = jax.random.key(sampling.seed)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, request.numbers_B)
    stop = request.start + request.count

    def pick(loop: _Loop) -> _Loop:
        logits_BV = model.logits(loop.x_BD[:, None])[:, 0]
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        if sampled:
            now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, loop.slot - request.start)
            logits_BV = _truncate(logits_BV / sampling.temperature, sampling.top_p)
            tokens_B = jax.vmap(jax.random.categorical)(now_B, logits_BV).astype(jnp.int32)
        stops_B = (tokens_B[:, None] == request.stops_K).any(axis=1)
        done_B = loop.done_B | stops_B
        return loop._replace(
            slot=loop.slot + 1,
            tokens_BS=jax.lax.dynamic_update_slice(
                loop.tokens_BS, tokens_B[:, None], (0, loop.slot)
            ),
            ends_B=jnp.where(done_B, loop.ends_B, loop.slot + 1),
            done_B=done_B,
        )

    def step(loop: _Loop) -> _Loop:
        tokens_B1 = jax.lax.dynamic_slice_in_dim(loop.tokens_BS, loop.slot - 1, 1, axis=1)
        positions_B1 = (loop.slot - 1 - request.start + request.lengths_B)[:, None]
        x_B1D, cache = model.decode(tokens_B1, positions_B1, jnp.ones_like(tokens_B1), loop.cache)
        return pick(loop._replace(x_BD=x_B1D[:, 0], cache=cache))

    loop = pick(_read_prompts(model, request))
    loop = jax.lax.while_loop(lambda loop: (loop.slot < stop) & ~jnp.all(loop.done_B), step, loop)
    if not jax.sharding.get_abstract_mesh().empty:  # every host reads the whole result
        return jax.lax.with_sharding_constraint((loop.tokens_BS, loop.ends_B), P())
    return loop.tokens_BS, loop.ends_B


def _read_prompts(model: Decoder, request: _Request) -> _Loop:
    """Fills the cache chunk by chunk, which bounds the memory of the scores."""
    tokens_BS = jnp.asarray(request.tokens_BS)
    slots_S = jnp.arange(tokens_BS.shape[1])
    positions_BS = slots_S - (request.start - request.lengths_B)[:, None]
    segments_BS = (positions_BS >= 0) & (slots_S < request.start)
    inputs = (tokens_BS, jnp.maximum(positions_BS, 0), segments_BS.astype(jnp.int32))

    def read(number, carry):
        cache, _ = carry
        at = number * _CHUNK
        tokens_BT, positions_BT, segments_BT = (
            jax.lax.dynamic_slice_in_dim(array, at, _CHUNK, axis=1) for array in inputs
        )
        x_BTD, cache = model.decode(tokens_BT, positions_BT, segments_BT, cache)
        last = jnp.clip(request.start - 1 - at, 0, _CHUNK - 1)
        return cache, jax.lax.dynamic_index_in_dim(x_BTD, last, axis=1, keepdims=False)

    cache = model.empty_cache(*tokens_BS.shape)
    x_BD = jnp.zeros((tokens_BS.shape[0], model.config.hidden_size), model.dtype)
    chunks = (request.start + _CHUNK - 1) // _CHUNK
    cache, x_BD = jax.lax.fori_loop(0, chunks, read, (cache, x_BD))
    # The last chunk may reach past the prompts: the next token goes right behind them instead.
    cache = cache._replace(offset=jnp.asarray(request.start, jnp.int32))
    start = jnp.asarray(request.start, jnp.int32)
    ends_B = jnp.full(tokens_BS.shape[:1], start)
    return _Loop(start, x_BD, tokens_BS, ends_B, request.lengths_B == 0, cache)


def _truncate(logits_BV: jax.Array, top_p) -> jax.Array:
    """Rules out all but the fewest tokens that hold `top_p` together; ties at the border stay."""
    return jax.lax.cond(top_p < 1, lambda: _nucleus(logits_BV, top_p), lambda: logits_BV)


def _nucleus(logits_BV: jax.Array, top_p) -> jax.Array:
    down_BV = -jnp.sort(-logits_BV, axis=-1)
    probs_BV = jax.nn.softmax(down_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # The most likely token stays even where top_p rounds to nothing.
    kept_BV = (before_BV < top_p).at[:, 0].set(True)
    least_B1 = jnp.min(jnp.where(kept_BV, down_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _rows(count: int) -> int:
    """Rows of a batch: a power of two, or a multiple of 8 and of what the mesh cuts it into."""
    mesh = jax.sharding.get_abstract_mesh()
    cut = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    rows = 1 << (count - 1).bit_length() if 0 < count <= 8 else -(-count // 8) * 8
    return math.ceil(max(rows, 1) / cut) * cut


def _slots(count: int) -> int:
    return _CHUNK << max(math.ceil(count / _CHUNK) - 1, 0).bit_length()


def _traced(sampling: _Sampling) -> _Sampling:
    """As arrays of one type each, so that no value makes a new program."""
    return _Sampling(
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        np.uint32(sampling.seed % 2**32),
    )


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: _Sampling,
    batch_size: int,
) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, batch_size {batch_size}", fix="1 or more"
        )
    temperature, top_p, _ = sampling
    if not ((temperature == 0 or 1e-3 <= temperature < math.inf) and 0 < top_p <= 1):
        raise ConfigError(
            f"temperature is {temperature}, top_p {top_p}",
            fix="a temperature of 0 (greedy) or at least 0.001, top_p in (0, 1]",
        )
    vocab, positions = model.config.vocab_size, model.config.max_position
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise DataError(f"prompt {number} has no token", fix="a text, or a tokenizer with bos")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise DataError(
                f"prompt {number} holds token {wrong}, the model knows 0 to {vocab - 1}",
                fix="the tokenizer of this model",
            )
        if len(prompt) + max_new_tokens > positions:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens and {max_new_tokens} may follow, "
                f"the model has {positions} positions",
                fix="a shorter prompt or a lower max_new_tokens",
            )
