import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.generate.prompts import clean_prompt, parse_prompts, read_prompts


def test_skips_blank_lines_and_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# clips\n\n  a red ball \n\t\n  # not this\na #1 square\n", encoding="utf-8")
    assert read_prompts(path) == ["a red ball", "a #1 square"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_any_line_ending_and_byte_order_mark(ending):
    data = "\ufeff" + ending.join(["ein Bär", "青い空", ""])
    assert parse_prompts(data.encode("utf-8"), "x") == ["ein Bär", "青い空"]


def test_only_real_line_ends_divide():
    assert parse_prompts("a\u2028b\n".encode(), "x") == ["a\u2028b"]


def test_reads_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert read_prompts("-") == ["one", "two"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no prompt"),
        (b"\n# only a comment\n", "no prompt"),
        (b"fine\nnot \xff fine", "line 2: byte 0xff is not UTF-8"),
        (b"\xef\xbb\xbffine\r\nfine\r\n\xe4", "line 3: byte 0xe4"),
        ("a red ball".encode("utf-16"), "UTF-16"),
        (b"fine\nno\x00t", r"line 2: control character \\x00"),
        (b"\x1b[31mred", r"line 1: control character \\x1b"),
    ],
)
def test_names_what_is_wrong(data, message):
    with pytest.raises(ValueError, match=message):
        parse_prompts(data, "prompts.txt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match="no such prompt file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts("a\0b")


@pytest.mark.parametrize("text", ["", " \n ", "a\x00b", "\udcff"])
def test_bad_single_prompts(text):
    with pytest.raises(ValueError, match="--prompt"):
        clean_prompt(text)


def test_single_prompt_becomes_one_line():
    assert clean_prompt(" a red\n  ball ") == "a red ball"


_LINE = st.text(st.characters(exclude_categories=("Cc", "Cs")))


@given(st.lists(_LINE), st.sampled_from(["\n", "\r\n", "\r"]))
def test_keeps_every_prompt_in_order(lines, ending):
    expected = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    data = ending.join(["# start", *lines]).encode("utf-8")
    if expected:
        assert parse_prompts(data, "x") == expected
    else:
        with pytest.raises(ValueError, match="no prompt"):
            parse_prompts(data, "x")


@given(st.binary())
def test_any_bytes_give_prompts_or_one_clear_line(data):
    prompts, error = [], None
    try:
        prompts = parse_prompts(data, "x")
    except ValueError as caught:
        error = caught
    assert bool(prompts) != bool(error)
    assert all(prompt == prompt.strip() != "" for prompt in prompts)
    assert "\n" not in str(error)
    assert not isinstance(error, UnicodeError)
