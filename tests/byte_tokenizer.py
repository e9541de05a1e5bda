"""A tokenizer small enough to read expectations off: one token a byte, then a few marks."""

from transformers import PreTrainedTokenizerFast

MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(
    *, bos: bool = False, eos: str | None = "</s>", template: str | None = None
) -> PreTrainedTokenizerFast:
    """Ids 0-255 stand for bytes in an order of their own; 256 is <s>, 257 </s>, then the ChatML."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 256)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
