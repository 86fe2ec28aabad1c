"""Token ids of texts that a chat template has rendered, special tokens among them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


class RenderedIds:
    """How one tokenizer reads them. `special` are its special tokens' names by id."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special = _special_tokens(tokenizer)

    def of(self, text: str) -> tuple[int, ...]:
        """Token ids of rendered text: the template has written the special tokens."""
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def answer(self, written: str, cut: bool) -> tuple[int, ...]:
        """Token ids of what the assistant wrote: up to its end-of-turn token, the last special one before
        nothing but white space. The end of a cut answer was never written."""
        ids = self.after_special(written)
        end = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self.special), None)
        if end is not None and not self._tokenizer.decode(ids[end + 1 :]).strip():
            return ids[: end + (not cut)]
        return self.after_special(written.rstrip())

    def after_special(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that follows a special token: some tokenizers put a space before the first word
        of all."""
        mark = self._tokenizer.eos_token
        if mark is None:
            return self.of(text)
        ids = self.of(mark + text)
        return ids[1:] if ids[:1] == (self._tokenizer.eos_token_id,) else self.of(text)

    def going_on_from(self, known_text: str, known_ids: tuple[int, ...], text: str) -> tuple[int, ...]:
        """Token ids of `text`; what is known of it already, up to a special token, is not tokenised again."""
        if not known_text or not text.startswith(known_text):
            return self.of(text)
        special = self.special[known_ids[-1]]
        return known_ids[:-1] + self.of(special + text[len(known_text) :])

    def up_to_special(self, text: str, ids: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """The part of a text, and of its ids, that ends with the last special token, which splits text for a
        tokenizer."""
        with suppress(StopIteration):
            end = next(i for i in range(len(ids) - 1, -1, -1) if ids[i] in self.special)
            mark = self.special[ids[end]]
            if (place := text.rfind(mark)) >= 0:
                return text[: place + len(mark)], ids[: end + 1]
        return "", ()


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens by id, also those without a name of their own (Gemma 3's <end_of_turn>, Phi-3's
    <|end|>)."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = tokenizer.added_tokens_decoder.items()
    return named | {number: token.content for number, token in added if token.special}
