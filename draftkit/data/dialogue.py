"""One conversation while it is answered: which prompt comes next, and the record of it all.

Without tool results the answers make the history: each user turn is asked after the answer to the one before.
With tool results in it the recorded history stays, because a result belongs to the very call before it, and
the target answers anew at each place where the assistant spoke. So it is with an assistant's message that has
a task (its title) or is a prefix, after which the last answer comes.
"""

from __future__ import annotations

import hashlib
from typing import Any

from draftkit.data.answers import NO_ROOM, Answer, Question
from draftkit.data.messages import Conversation
from draftkit.data.records import asked_hash
from draftkit.data.samples import naming_conversation
from draftkit.target.deepseek_v4_messages import fields_of
from draftkit.target.prompt_format import PromptFormat

TOO_LONG = "too_long"
_TURNS = 2**20  # numbers of seeds that are kept for one conversation


class Dialogue:
    """A conversation that is being answered. `question` is what to ask next; None when it is finished."""

    def __init__(self, conversation: Conversation, prompt_format: PromptFormat, seed: int) -> None:
        asked = conversation.prompt()
        self.id, self.domain, self.tools = conversation.id, conversation.domain, conversation.tools
        self._asked = asked_hash(conversation)
        self._format, self._seed = prompt_format, seed
        self._messages = asked.as_dicts()
        self._recorded = asked.keeps_history
        self._history: list[dict[str, Any]] = []
        self._places = _places(self._messages) if self._recorded else []
        self._answers: list[dict[str, Any]] = []
        self._reason = "stop"
        self._tokens = 0
        self._texts = False  # a server gave messages, no ids
        self.question: Question | None = None
        self._next()

    @property
    def completion_tokens(self) -> int:
        """Tokens that were written so far."""
        return self._tokens

    def answered(self, answer: Answer) -> None:
        """Take the answer to `question`; the next question, or the end, follows. Raises ValueError when
        none is open."""
        question, self.question = self.question, None
        if question is None:
            raise ValueError(f"{self.id}: no question is open")
        if answer == NO_ROOM:
            self._reason = "length" if self._answers else TOO_LONG
            while self._answers and not self._recorded and self._history[-1]["role"] != "assistant":
                self._history.pop()  # it ends with its last answer
            return
        message = answer.message or self._format.parse(answer.tokens, question.prompt_ids).message()
        says = bool(message.get("content") or message.get("tool_calls") or message.get("reasoning_content"))
        ids = {"prompt_ids": list(question.prompt_ids), "answer_ids": list(answer.tokens)}
        turn = {**ids, "finish_reason": answer.finish_reason}
        self._texts |= answer.message is not None
        self._answers.append(turn | ({"message": message} if self._recorded else {}))
        self._tokens += len(answer.tokens)
        if self._recorded:
            self._reason = answer.finish_reason
            self._next()
            return
        if says:
            self._history.append(message)
        self._reason = answer.finish_reason if says else "empty"
        if self._reason == "stop" and message.get("tool_calls"):
            self._reason = "tool_calls"  # nobody has their results
        if self._reason == "stop":
            self._next()

    def record(self) -> dict[str, Any]:
        """The finished record."""
        record: dict[str, Any] = {
            "id": self.id,
            "asked": self._asked,
            "finish_reason": self._reason,
            "domain": self.domain,
            "messages": self._told(),
            "tools": list(self.tools),
            "switches": self._format.switches,
            "seed": self._seed,
            "completion_tokens": self._tokens,
        }
        return record if self._texts or not self._answers else record | {"answers": self._answers}

    def _told(self) -> list[dict[str, Any]]:
        """The messages of the record. Where a recorded history is answered in text, the last answer alone is
        learnt."""
        if not self._recorded:
            return self._history
        if not (self._texts and self._answers):
            return self._messages
        context = [m | {"weight": 0} if m["role"] == "assistant" else m for m in self._messages]
        return [*context, self._answers[-1]["message"]]

    def _next(self) -> None:
        """The next question, if there is one."""
        if self._recorded:
            if len(self._answers) == len(self._places):
                return
            context = self._messages[: self._places[len(self._answers)]]
        else:
            if not self._messages:
                return
            while self._messages:
                self._history.append(self._messages.pop(0))
                if self._history[-1]["role"] == "user":
                    break
            context = list(self._history)
        with naming_conversation(self.id):
            ids = self._format.prompt(context, self.tools)
        seed = (self._seed, _number_of(self.id) * _TURNS + len(self._answers))
        self.question = Question(self.id, ids, seed, tuple(context), self.tools)


def _places(messages: list[dict[str, Any]]) -> list[int]:
    """Where the assistant answers in a recorded history: its turns after a user's or a tool's, which a prefix
    is not, and the end."""
    roles = ["prefix" if "prefix" in fields_of(m) else m["role"] for m in messages]
    spoken = [i for i in range(1, len(roles)) if roles[i] == "assistant" and roles[i - 1] in ("user", "tool")]
    return [*spoken, len(messages)]


def _number_of(name: str) -> int:
    """A number of an id: seeds must not depend on the order of the prompts, nor on who answers them."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:5])
