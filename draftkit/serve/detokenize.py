"""Text from tokens as they come: characters that span tokens, special tokens, stop strings that span tokens.

Invariant (tested): the pieces put together are exactly what the tokenizer decodes from all tokens at once.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_FLOOR = -9999.0  # JSON has no -inf; vLLM's stand-in


class TokenTexts:
    """What each token of a tokenizer contributes to a text.

    Tokenizers with a byte-level decoder (GPT-2's, so Qwen's and Llama 3's) give bytes per token: text is
    decoded byte by byte, in constant time per token. Others (SentencePiece styles) are decoded with the
    tokens before them as context.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        written = json.loads(tokenizer.backend_tokenizer.to_str())
        self.special = frozenset(int(t["id"]) for t in written.get("added_tokens") or [] if t["special"])
        decoder = written.get("decoder") or {}
        self.byte_level: bool = decoder.get("type") == "ByteLevel"
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, which may be a part of a character."""
        known = self._bytes.get(token)
        if known is None:
            known = self._look_up(token)
            self._bytes[token] = known
        return known

    def _look_up(self, token: int) -> bytes:
        if not self.byte_level:
            return str(self.decode([token], skip_special=False)).encode()
        name = self.tokenizer.backend_tokenizer.id_to_token(token)
        if name is None:
            return b""  # a row of the embedding that no token uses
        if all(c in _BYTE_OF_CHAR for c in name):
            return bytes(_BYTE_OF_CHAR[c] for c in name)
        return str(name).encode()

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text. Safe in several threads at once, unlike the Transformers wrapper's own
        call."""
        backend = self.tokenizer.backend_tokenizer
        # frees the GIL
        return tuple(backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def spell(self, text: str) -> tuple[int, ...]:
        """Token ids of a text in which special tokens' names are text."""
        return tuple(self._spelling.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _spelling(self) -> Tokenizer:
        """The tokenizer again, for large vocabularies a second's work."""
        again = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        again.encode_special_tokens = True
        return again

    def spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of words, inside a text and after a space. (vLLM leaves the second out where it has
        another length, and so says " stamps", one token, in spite of the bad word "stamps", two.)"""
        both = [self.encode(space + word.lstrip(), False) for word in words for space in ("", " ")]
        return tuple(dict.fromkeys(ids for ids in both if ids))

    def decode(self, tokens: Sequence[int], skip_special: bool) -> str:
        """All tokens at once, without the cleaning of spaces that some tokenizers do: it is not
        incremental."""
        return str(self.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=skip_special))


def token_name(texts: TokenTexts, token: int, as_id: bool = False) -> str:
    """A token for people to read; parts of characters show as U+FFFD."""
    return f"token_id:{token}" if as_id else texts.token_bytes(token).decode("utf-8", errors="replace")


def finite(logprob: float | None) -> float | None:
    """A log probability as JSON can hold it."""
    return None if logprob is None else max(logprob, _FLOOR) if not math.isnan(logprob) else _FLOOR


class Detokenizer:
    """Turns one answer's tokens into text piece by piece.

    Not by `tokenizers.DecodeStream`: it has no end of the text, and for decoders with byte fallback it raises
    "Invalid prefix" or gives another text than a full decode (version 0.23.3, random tokens of the
    SentencePiece style).
    """

    def __init__(self, texts: TokenTexts, skip_special: bool = True) -> None:
        self._texts = texts
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens: list[int] = []
        self._context = 0  # first token that is decoded again as context
        self._given = 0  # tokens whose text has been given

    def add(self, token: int) -> str:
        """The text that is certain after this token; "" while a character is unfinished."""
        if self._skip_special and token in self._texts.special:
            return ""
        if self._texts.byte_level:
            return self._utf8.decode(self._texts.token_bytes(token))
        self._tokens.append(token)
        return self._new_text(final=False)

    def finish(self) -> str:
        """What is left: an unfinished character becomes U+FFFD, as in a full decode."""
        if self._texts.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        """Text beyond what was given: decode with and without the newest tokens, after the same context."""
        tail = self._tokens[self._context :]
        before = self._texts.decode(tail[: self._given - self._context], self._skip_special)
        after = self._texts.decode(tail, self._skip_special)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._context, self._given = self._given, len(self._tokens)
        return after[len(before) :]


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, and holds back what may turn out to begin
    one."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str, may_stop: bool = True) -> str:
        """Text that may be shown after `piece`. `found` is set when a stop string was met; the rest is
        dropped.

        `may_stop` False (min_tokens is not reached): the piece passes and cannot be part of a stop string.
        """
        if not self._stops:
            return piece
        text = self._held + piece
        self._held = ""
        if not may_stop:
            return text
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            return text[: at + len(self.found)] if self._include else text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held-back text, when the answer ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, backwards: printable bytes stand for themselves, the rest for
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
