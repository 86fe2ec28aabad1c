"""What a resting drafter has to read is read when somebody drafts from it, and never for anybody else."""

from __future__ import annotations

import pytest

from draftkit.engine.engine import Engine
from draftkit.engine.passes import Pass
from draftkit.engine.request import SamplingParams, StepOutput
from draftkit.schedule.step_rate import StepRate
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter
from support.engine import PROMPTS, finish, small, tokens_of


class Watched:
    """An engine with fixed lengths that can be told to let its drafter rest; `read` are the tokens of each `extend`."""

    def __init__(self, target: TransformersTarget, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
        self.engine, self.rests, self.read = Engine(target, make_drafter(target), small(**settings)), False, list[int]()
        planner, drafter = self.engine._planner, self.engine._models.drafter
        assert drafter is not None
        choose, extend = planner.choose_drafting, drafter.extend

        def noting(step: Pass, *rest: object) -> None:
            self.read.append(len(step))
            extend(step, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(planner, "choose_drafting", lambda decoding: [] if self.rests else choose(decoding))
        monkeypatch.setattr(planner, "looks", lambda running: not self.rests)
        monkeypatch.setattr(drafter, "extend", noting)

    def answer(self, prompt: list[int], tokens: int = 24) -> list[StepOutput]:
        self.engine.add_request("a", prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
        return finish(self.engine)["a"]


def proposals(outputs: list[StepOutput]) -> list[tuple[object, ...]]:
    return [(output.events, output.rejected) for output in outputs]


def test_an_answer_is_read_when_its_next_turn_drafts_and_not_before(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    resting, busy = Watched(target, monkeypatch), Watched(target, monkeypatch)
    resting.rests = True
    first = resting.answer(PROMPTS[0])
    other = resting.answer(PROMPTS[2])
    assert resting.read == []
    resting.rests = False
    turn = [*PROMPTS[0], *tokens_of(first), 9, 8, 7]
    assert tokens_of(busy.answer(PROMPTS[0])) == tokens_of(first)
    expected, found = busy.answer(turn), resting.answer(turn)
    assert proposals(found) == proposals(expected)
    assert found[0].stats.cached_tokens >= len(turn) - 8, "the target reads nothing again"
    assert sum(resting.read[:2]) == len(turn), "the drafter all of this conversation, and nothing else"
    assert resting.read[0] <= 8, "what the target has just read goes straight to the drafter, the rest follows"
    assert resting.answer([*PROMPTS[2], *tokens_of(other)])[0].stats.cached_tokens > len(PROMPTS[2])


def test_what_lay_in_a_block_before_is_not_read_into_it(target: TransformersTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory for one request at a time: every answer writes over the one before."""
    resting = Watched(target, monkeypatch, max_running=1, max_length=40)
    assert resting.engine.metrics.kv_total < 15
    resting.rests = True
    for start in range(6):
        resting.answer([start], 38)
    resting.rests, resting.read = False, []
    fresh = Watched(target, monkeypatch)
    prompt = [*range(60, 84)]
    assert proposals(resting.answer(prompt, 16)) == proposals(fresh.answer(prompt, 16))
    assert resting.read == fresh.read


@pytest.mark.parametrize("limit", [1, 30])
def test_room_is_made_by_giving_up_what_nobody_holds(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The next turn of an answer that was given up reads it again with the target, and proposes what it would have."""
    monkeypatch.setattr("draftkit.engine.unread.LIMIT", limit)
    resting, busy = Watched(target, monkeypatch), Watched(target, monkeypatch)
    resting.rests = True
    first = resting.answer(PROMPTS[0])
    for number in range(3):
        resting.answer([50 + number, 3, 4])
    everything = len(PROMPTS[0]) + 3 * 3 + 4 * 23  # the last token of an answer is not read
    assert sum(resting.read) == (everything if limit == 1 else 0)
    resting.rests = False
    turn = [*PROMPTS[0], *tokens_of(first), 9, 8, 7]
    busy.answer(PROMPTS[0])
    expected, found = busy.answer(turn), resting.answer(turn)
    assert proposals(found) == proposals(expected)
    heard = found[0].stats.cached_tokens
    assert heard == expected[0].stats.cached_tokens if limit == 1 else heard < expected[0].stats.cached_tokens


@pytest.mark.parametrize(("plan", "seed", "steps"), [("planned", None, 1), ("planned", 1, 4), ("fixed", None, 4)])
def test_prompts_get_the_tokens_of_a_step_that_nobody_drafts(
    target: TransformersTarget, plan: str, seed: int | None, steps: int
) -> None:
    """Room for proposals is kept where there will be some: five requests, each with a token and gamma drafted ones or none.
    Seeded samples draft whatever is planned."""
    steep = StepRate((1, 1000), (1.0, 1000.0), (1,), (0.0,))
    rate = {"step_rate": steep} if plan == "planned" else {}
    engine = Engine(target, make_drafter(target), small(plan=plan, step_tokens=5 + 5 * 4 + 8, max_running=6, **rate))
    for number in range(5):
        params = SamplingParams(max_tokens=200, temperature=0 if seed is None else 1.0, seed=seed, ignore_eos=True)
        engine.add_request(str(number), [9 + number], params)
    for _ in range(5):
        engine.step()
    engine.add_request("long", list(range(40, 68)), SamplingParams(max_tokens=4, temperature=0))
    taken = next(n for n in range(1, 20) if any(output.request_id == "long" for output in engine.step()))
    assert engine.info.gamma == 4 and taken == steps
