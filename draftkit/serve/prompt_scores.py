"""The prompt in an answer: echoed, with log probabilities where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftkit.engine.outputs import PromptToken, TokenEvent
from draftkit.serve.detokenize import Detokenizer, TokenTexts, finite, token_name


@dataclass(frozen=True)
class Echo:
    """A prompt as the beginning of an answer: its text; its tokens, with the text that each completes, where
    the answer's log probabilities begin with the prompt's."""

    text: str = ""
    events: tuple[TokenEvent, ...] = ()
    pieces: tuple[str, ...] = ()


def echo_of(
    texts: TokenTexts,
    prompt: Sequence[int],
    skip_special: bool,
    scores: Sequence[PromptToken] | None,
    top: int | None,
) -> Echo:
    """The echo of a prompt (token ids); `scores` are of its tokens from the second on, of whose likeliest
    `top` are shown."""
    if scores is None or top is None:
        return Echo(texts.decode(prompt, skip_special))
    detokenizer = Detokenizer(texts, skip_special)
    pieces = [detokenizer.add(token) for token in prompt]
    pieces[-1] += detokenizer.finish()
    first = TokenEvent(prompt[0], "prompt")
    events = (first, *(TokenEvent(s.token_id, "prompt", s.logprob, s.top_logprobs[:top]) for s in scores))
    return Echo("".join(pieces), events, tuple(pieces))


def as_vllm(texts: TokenTexts, scores: Sequence[PromptToken], as_ids: bool) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: null for the first token; for each other one, by token id, its log
    probability, its rank and its text, and those of the likeliest tokens."""
    told: list[dict[str, Any] | None] = [None]
    for score in scores:
        own = (score.token_id, score.logprob, score.rank)
        best = [(token, logprob, place) for place, (token, logprob) in enumerate(score.top_logprobs, 1)]
        told.append(
            {
                str(token): {
                    "logprob": finite(logprob),
                    "rank": rank,
                    "decoded_token": token_name(texts, token, as_ids),
                }
                for token, logprob, rank in [own, *(b for b in best if b[0] != score.token_id)]
            }
        )
    return told
