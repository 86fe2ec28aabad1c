"""Incremental text equals text decoded at once; stop strings are found wherever the pieces break."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from draftkit.serve.detokenize import Detokenizer, StopStrings, TokenTexts

ASSET = Path(__file__).parents[1] / "draftkit" / "assets" / "tiny"


def sentencepiece_style() -> Any:
    """Metaspace words with byte fallback, as Llama 2 and Gemma have it."""
    words = ["<unk>", "▁", "▁the", "▁cat", "s", "▁sat", "é", "▁x", *[f"<0x{b:02X}>" for b in range(256)]]
    inner = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return AutoTokenizer.from_pretrained(ASSET)


TINY = AutoTokenizer.from_pretrained(ASSET)
METASPACE = sentencepiece_style()


def pieces_of(tokenizer: Any, tokens: list[int], skip_special: bool) -> list[str]:
    detokenizer = Detokenizer(TokenTexts(tokenizer), skip_special)
    return [*(detokenizer.add(t) for t in tokens), detokenizer.finish()]


@pytest.mark.parametrize("tokenizer", [TINY, METASPACE], ids=["byte-level", "sentencepiece"])
@settings(max_examples=150)
@given(text=st.text(max_size=60), skip=st.booleans())
def test_pieces_of_any_text_make_the_full_decode(tokenizer: Any, text: str, skip: bool) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert TokenTexts(tokenizer).encode(text, add_special_tokens=False) == tuple(tokens)
    assert "".join(pieces_of(tokenizer, tokens, skip)) == tokenizer.decode(
        tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )


@settings(max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_any_tokens_make_the_full_decode(data: st.DataObject, skip: bool) -> None:
    """Random ids: broken UTF-8 and special tokens in the middle of characters."""
    tokens = data.draw(st.lists(st.integers(0, len(TINY) - 1), max_size=40))
    assert "".join(pieces_of(TINY, tokens, skip)) == TINY.decode(
        tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )


def test_no_piece_shows_half_a_character() -> None:
    text = "naïve 日本語 👩‍👩‍👧‍👦 done"
    pieces = pieces_of(TINY, TINY(text, add_special_tokens=False)["input_ids"], True)
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert "" in pieces, "the test wants a character that spans tokens"


def test_special_tokens_show_only_when_asked() -> None:
    eos = TINY.eos_token_id
    assert "".join(pieces_of(TINY, [eos], True)) == ""
    assert "".join(pieces_of(TINY, [eos], False)) == TINY.eos_token


@settings(max_examples=300)
@given(
    text=st.text("abc", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_are_found_wherever_pieces_break(
    text: str, cuts: list[int], stops: list[str], include: bool
) -> None:
    checker = StopStrings(stops, include)
    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    shown = ""
    for start, end in itertools.pairwise(edges):
        shown += checker.add(text[start:end])
        if checker.found:
            break
        assert not any(stop in shown for stop in stops)
    else:
        shown += checker.flush()
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert checker.found is None and shown == text
    else:
        assert checker.found in ends
        assert shown == text[: text.find(checker.found) + (len(checker.found) if include else 0)]


def test_a_held_back_beginning_is_released_when_it_does_not_become_a_stop() -> None:
    checker = StopStrings(["###"])
    assert checker.add("a#") == "a"
    assert checker.add("#") == ""
    assert checker.add("b") == "##b"
    assert checker.add("#") == "" and checker.flush() == "#"


def test_min_tokens_keeps_stop_strings_out() -> None:
    checker = StopStrings(["a"])
    assert checker.add("aa", may_stop=False) == "aa" and checker.found is None
    assert checker.add("ba") == "b" and checker.found == "a"
