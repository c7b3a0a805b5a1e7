"""The demo model's tokenizer: one token per word of the caption vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

__all__ = ["SPECIAL_TOKENS", "make_tokenizer"]

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
"""Their ids are 0, 1 and 2, as in UMT5's own vocabulary."""


def make_tokenizer(words: Sequence[str], max_length: int = 512) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that lower-cases, drops punctuation and ends every text with `</s>`.

    Args:
        words: the known words, lower-case; each gets the next free id in the order given.
        max_length: the longest token sequence, in tokens, that the tokenizer reports.

    Raises:
        ValueError: a word is given twice, or is not one lower-case word.
    """
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for word in words:
        if word in vocabulary or not word.isalnum() or word != word.lower():
            raise ValueError(f"words must be distinct single lower-case words, got {word!r}")
        vocabulary[word] = len(vocabulary)

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )
