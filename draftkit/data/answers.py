"""The seam between generation and what answers: questions go in at any time, answers come out as they are
finished."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from draftkit.ops.sampling import Sampling
from draftkit.settings import GenerateSettings


@dataclass(frozen=True)
class Question:
    """A prompt to be answered, as token ids and, for servers that want them, as messages and tools. `key`
    names it among those that are open; `seed` decides what is drawn."""

    key: str
    prompt_ids: tuple[int, ...]
    seed: tuple[int, int]
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was written: token ids (the stop token included) and "stop" or "length". No tokens: the prompt
    leaves no room for any. A server that gives no ids gives the assistant's `message` instead."""

    tokens: tuple[int, ...]
    finish_reason: str
    message: dict[str, Any] | None = None


NO_ROOM = Answer((), "length")


class Answers(ABC):
    """Answers questions, many at the same time. Not for several threads. `on_tokens` is told how many
    tokens were written, of unfinished answers too where these are seen."""

    on_tokens: Callable[[int], None] = staticmethod(lambda count: None)

    @property
    @abstractmethod
    def room(self) -> int:
        """How many questions more it takes now."""

    @abstractmethod
    def ask(self, question: Question, settings: GenerateSettings) -> None:
        """Begin to answer."""

    @abstractmethod
    def finished(self) -> list[tuple[str, Answer]]:
        """Wait until there are answers, at least one, and take them, each with its question's key."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[tuple[int, int]], settings: GenerateSettings
    ) -> list[Answer]:
        """One answer per prompt (token ids), in order; NO_ROOM where a prompt leaves none."""
        found: dict[str, Answer] = {}
        asked = 0
        while len(found) < len(prompts):
            while asked < len(prompts) and self.room:
                self.ask(Question(str(asked), tuple(prompts[asked]), seeds[asked]), settings)
                asked += 1
            found.update(self.finished())
        return [found[str(i)] for i in range(len(prompts))]


def answer_limit(max_length: int, prompt_tokens: int, settings: GenerateSettings) -> int:
    """The most tokens that an answer may have where prompt and answer may have `max_length`; 0 when there is
    no room."""
    return max(0, min(settings.max_new_tokens, max_length - prompt_tokens))


def sampling_of(settings: GenerateSettings) -> Sampling:
    """How tokens are drawn."""
    return Sampling(settings.temperature, settings.top_k, settings.top_p)
