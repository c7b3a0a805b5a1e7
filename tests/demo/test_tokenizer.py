"""The word-level tokenizer: known words, punctuation, case, padding, and a round trip through a folder."""

from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dit_sparse.demo import unknown_words
from dit_sparse.demo.clips import caption, sample_clip, vocabulary
from dit_sparse.demo.tokenizer import SPECIAL_TOKENS, make_tokenizer

TOKENIZER = make_tokenizer(vocabulary())
PAD, END, UNKNOWN = range(3)


def test_special_tokens_have_umt5s_ids():
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [PAD, END, UNKNOWN]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id) == (PAD, END, UNKNOWN)


@given(st.integers(min_value=0, max_value=2**48))
def test_every_caption_is_known_and_short(seed):
    ids = TOKENIZER(caption(sample_clip(seed), np.random.default_rng(seed))).input_ids
    assert UNKNOWN not in ids
    assert ids[-1] == END
    assert len(ids) <= 36  # leaves room for unknown words in the 40 tokens that training encodes


def test_case_and_punctuation_do_not_matter():
    plain = TOKENIZER("a small red ball moving left on a gray background").input_ids
    assert TOKENIZER("A small, RED ball -- moving left; on a gray background!!").input_ids == plain


def test_the_empty_prompt_is_the_end_token():
    assert TOKENIZER("").input_ids == [END]


def test_padding_and_mask():
    batch = TOKENIZER(["a ball", ""], padding="max_length", max_length=5, return_attention_mask=True)
    assert [sum(row) for row in batch.attention_mask] == [3, 1]
    assert batch.input_ids[1] == [END, PAD, PAD, PAD, PAD]


@given(st.text(alphabet=string.printable, max_size=60))
def test_unknown_words_are_the_tokens_it_does_not_know(text):
    known = [i for i in TOKENIZER(text).input_ids if i != UNKNOWN]
    assert known[-1] == END
    assert all(TOKENIZER(word).input_ids[:-1].count(UNKNOWN) for word in unknown_words(text))


def test_unknown_words_keep_their_order():
    assert unknown_words("A red zebra, a blue ball and a Dinosaur (zebra)") == ["zebra", "dinosaur"]
    assert unknown_words("a small red ball") == []


def test_it_survives_a_folder(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    text = "A big purple star rising, zebra background."
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == TOKENIZER(text).input_ids


@pytest.mark.parametrize("words", [["ball", "ball"], ["Ball"], ["a ball"], ["<pad>"], [""]])
def test_bad_words_are_named(words):
    with pytest.raises(ValueError, match="distinct single lower-case words"):
        make_tokenizer(words)
