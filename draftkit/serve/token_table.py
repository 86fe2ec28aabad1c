"""The bytes of every token, as llguidance keeps them."""

from __future__ import annotations

from types import SimpleNamespace

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper, grammar_from
from tokenizers import Tokenizer

from draftkit.serve.detokenize import TokenTexts


class _Spelling(TokenizerWrapper):
    """What llguidance asks of a tokenizer. By itself it takes every added token that looks like <this> for a
    special one, which no text can contain; here only those count that the tokenizer calls special, and text
    is text."""

    def __init__(self, texts: TokenTexts, vocab_size: int, eos: int) -> None:
        self.is_tokenizer_wrapper = True  # its own __init__ asks for another tokenizer inside
        self.bos_token_id = None
        self.eos_token_id = eos
        self.tokens = [texts.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(texts.special)
        self._texts = texts

    def __call__(self, text: str) -> list[int]:
        return list(self._texts.spell(text))


def token_table(written: str, vocab_size: int, eos: int) -> LLTokenizer:
    """The table of a tokenizer (`tokenizer.json` as text) for `vocab_size` ids, of which `eos` ends an
    answer."""
    texts = TokenTexts(SimpleNamespace(backend_tokenizer=Tokenizer.from_str(written)))
    # llguidance knows how others write bytes and spaces
    source = _Spelling(texts, vocab_size, eos) if texts.byte_level else written
    table = LLTokenizer(source, n_vocab=vocab_size, eos_token=eos)
    # a table's first mask makes what all others use: 0.15 s for 49,152 tokens, which no answer should pay
    LLMatcher(table, grammar_from("regex", "a"), log_level=0).compute_bitmask()
    return table
