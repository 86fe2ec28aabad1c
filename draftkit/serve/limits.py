"""How much a request may hold, and whether a text can fit at all, found out before the work that it would
cost.

The numbers are of three kinds: what other servers allow (stop strings, log probabilities), what no use of the
API comes near (values and objects of a body), and what keeps one request from holding up the others.
docs/security.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.problem import ApiError, bad_request

MAX_VALUES = 2**18  # JSON values in a body: numbers, texts, lists, objects
MAX_OBJECTS = 2**14  # JSON objects in a body: messages, parts, tools, schemas
MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_BIASES = 16_384
MAX_ALLOWED_IDS = 16_384
MAX_ENTRIES = 1024  # of a document
MAX_STOPS = 32
MAX_STOP_IDS = 1024
MAX_BAD_WORDS = 256
MAX_WORD = 1024  # characters of a stop string or a bad word
MAX_NAME = 256  # characters of a model's or a user's name
MAX_LOGPROBS = 20
MAX_SCORES = 2**17  # log probabilities of prompts, for one request
MAX_TOLD_SCORES = 2**19  # the same as they are told, with each of `n` choices
# tokens of a text that is only counted, or of which a part is kept, where the context has less
MAX_COUNTED = 2**16
_PIECE = 2**15  # characters that are tokenised at a time


def check_size(raw: bytes | bytearray) -> None:
    """Raises ApiError 400 when a body has more values or objects than a request may hold: reading JSON keeps
    all threads waiting, and costs fifty times the memory of its text."""
    plain = np.frombuffer(raw.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    outside = plain[np.cumsum(plain == ord('"'), dtype=np.uint8) & 1 == 0]  # of strings
    counts = np.bincount(outside, minlength=256)
    objects = int(counts[ord("{")])
    values = int(counts[ord(",")] + counts[ord("[")]) + objects
    for count, most, what in ((objects, MAX_OBJECTS, "objects"), (values, MAX_VALUES, "values")):
        if count > most:
            raise bad_request(
                f"the body holds {count} JSON {what}, and {most} are allowed; send several requests"
            )


def check_fits(texts: TokenTexts, said: Iterable[str], most: int) -> None:
    """Raises ApiError 400 when texts that will be one prompt surely have more than `most` tokens. Pieces are
    tokenised one by one until it is too much, so that the work is bounded by `most`, whatever was sent; where
    pieces meet, a token or two may differ, which is allowed for."""
    count = 0
    for text in said:
        for start in range(0, len(text), _PIECE):
            count += len(texts.encode(text[start : start + _PIECE], False)) - 16
            if count > most:
                raise too_long(most, f"more than {most}")


def too_long(most: int, found: int | str) -> ApiError:
    """A prompt of `found` tokens where `most` go."""
    return bad_request(
        f"This model's maximum context length is {most} tokens. However, your request has {found} input "
        f"tokens. "
        "Please reduce the length of the input.",
        "input_tokens",
    )
