"""One answer in the making: tokens become text, stop strings end it, statistics add up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from draftkit.engine.outputs import PromptToken, RequestStats, StepOutput, TokenEvent
from draftkit.engine.sampling_params import SamplingParams
from draftkit.serve.detokenize import Detokenizer, StopStrings, TokenTexts


@dataclass(frozen=True)
class Delta:
    """What one or more engine steps add to an answer; `pieces[i]` is the text that token i completed."""

    text: str
    events: tuple[TokenEvent, ...]
    pieces: tuple[str, ...]
    rejected: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class Choice:
    """Folds the engine's outputs for one answer into text; with `only_prompt` the engine's one token is not
    part of it, with `marked` special tokens are, which stand between the parts of the answer."""

    texts: TokenTexts
    params: SamplingParams
    prompt_tokens: int
    only_prompt: bool = False
    marked: bool = False
    prompt: tuple[PromptToken, ...] | None = None
    events: list[TokenEvent] = field(default_factory=list)
    stats: RequestStats | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: str = ""

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.texts, self.params.skip_special_tokens and not self.marked)
        self._stops = StopStrings(self.params.stop, self.params.include_stop_str_in_output)

    @property
    def stopped_by_text(self) -> bool:
        """A stop string ended the answer: the engine does not know and must be told."""
        return self._stops.found is not None

    def add(self, output: StepOutput) -> Delta:
        """Take one step's output. After the end, further outputs change nothing."""
        if self.finish_reason is not None:
            return Delta("", (), (), (), None, None)
        if output.prompt is not None:
            self.prompt = output.prompt
        if self.only_prompt:
            self.stats, self.finish_reason = output.stats, "length"
            return Delta("", (), (), (), "length", None)
        shown: list[str] = []
        pieces: list[str] = []
        taken: list[TokenEvent] = []
        hidden_last = output.stop_token and not self.params.include_stop_str_in_output
        for i, event in enumerate(output.events):
            taken.append(event)
            hide = hidden_last and i == len(output.events) - 1  # the stop token itself
            piece = "" if hide else self._detokenizer.add(event.token_id)
            pieces.append(piece)
            shown.append(self._stops.add(piece, len(self.events) + len(taken) > self.params.min_tokens))
            if self._stops.found is not None:
                break
        self.events += taken
        self.stats = output.stats
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        if self._stops.found is None and output.finish_reason is not None:
            shown.append(self._stops.add(self._detokenizer.finish()))
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        elif self.finish_reason is not None:
            shown.append(self._stops.flush())
        text = "".join(shown)
        self.text += text
        return Delta(text, tuple(taken), tuple(pieces), output.rejected, self.finish_reason, self.stop_reason)


def spec_stats(stats: RequestStats, gamma: int) -> dict[str, Any]:
    """vLLM's `metrics.speculative_decoding`, and what ours knows beyond it (verified, per position,
    times)."""
    return {
        "mean_acceptance_length": 1 + stats.accepted / stats.rounds if stats.rounds else None,
        "draft_acceptance_rate": stats.accepted / stats.drafted if stats.drafted else None,
        "num_spec_steps": stats.rounds,
        "num_draft_tokens": stats.drafted,
        "num_verified_tokens": stats.verified,
        "num_accepted_draft_tokens": stats.accepted,
        "num_spec_tokens": gamma,
        "accepted_per_position": list(stats.accepted_per_position),
    }


def timings(stats: RequestStats) -> dict[str, float]:
    """Seconds that the engine spent on one answer."""
    return {
        "queue_seconds": stats.queue_seconds,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
    }
