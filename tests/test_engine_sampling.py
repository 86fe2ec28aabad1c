"""Settings of single requests inside a batch: each row has the distribution of its own settings,
drafts or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftkit.engine.engine import Engine
from draftkit.engine.request import Uniforms
from draftkit.engine.sampling_params import SamplingParams
from draftkit.ops.sampling import Sampling, distributions, processed_probs, row_settings, sample
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter
from support.engine import PROMPTS, finish, small, tokens_of

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.5, "min_p": 0.02},
    {"temperature": 0.0, "top_k": 3},
]


def test_every_row_has_the_distribution_of_its_own_settings() -> None:
    logits_NV = torch.randn(len(SETTINGS), 200, generator=torch.Generator().manual_seed(0)) * 3
    params = [SamplingParams(**s) for s in SETTINGS]  # type: ignore[arg-type]
    together = distributions(logits_NV, row_settings(params)).dense()
    for row, settings in enumerate(SETTINGS):
        alone = processed_probs(logits_NV[row], Sampling(**settings))  # type: ignore[arg-type]
        torch.testing.assert_close(together[row], alone, atol=1e-7, rtol=1e-6)


class Countdown:
    """A toy grammar: tokens 50 + n, 49 + n, ... down to 50, then the end token 7; nothing else."""

    def __init__(self, start: int) -> None:
        self.chain, self.at = [*range(50 + start, 49, -1), 7], 0

    @property
    def finished(self) -> bool:
        return self.at == len(self.chain)

    def allowed(self) -> torch.Tensor:
        return (
            torch.arange(512)[: self.vocab] == self.chain[self.at]
            if not self.finished
            else torch.zeros(self.vocab).bool()
        )

    vocab = 0

    def accept(self, token: int) -> bool:
        good = not self.finished and token == self.chain[self.at]
        self.at += good
        return good

    def rollback(self, count: int) -> None:
        self.at -= count


CASES: list[dict[str, Any]] = [
    {"logit_bias": {5: 30.0, 6: 29.0}},
    {"allowed_token_ids": (11, 12, 13, 14)},
    {"repetition_penalty": 1.1},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"frequency_penalty": -0.5, "repetition_penalty": 0.9, "logit_bias": {9: 4.0}},
    {"logit_bias": {5: 30.0, 6: 29.5, 7: 29.0}, "bad_token_ids": ((5, 5), (5, 6, 5), (6, 7, 6, 7), (9,))},
    {"allowed_token_ids": (11, 12, 13), "bad_token_ids": ((11,), (12, 12), (13, 13), (12, 13), (13, 12))},
    {"logit_bias": {40: 50.0}, "stop_token_ids": (40,), "min_tokens": 9},
]


def naive(target: TransformersTarget, prompt: list[int], count: int, params: SamplingParams) -> list[int]:
    """Token by token from the whole text, with the definitions written out."""
    uniforms = Uniforms(params.seed or 0, 0)
    answer: list[int] = []
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(target.info.stop_token_ids))
    while len(answer) < count and not (answer and answer[-1] in stops):
        read = target.forward(torch.tensor([prompt + answer]), None)
        logits = target.logits(read.last_hidden_BTH[0, -1]).tolist()
        for token in range(len(logits)):
            if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
                logits[token] = float("-inf")
            logits[token] += (params.logit_bias or {}).get(token, 0.0)
        banned = {
            last
            for *start, last in params.bad_token_ids
            if start == answer[max(len(answer) - len(start), 0) :]
        }
        if any(value > float("-inf") for token, value in enumerate(logits) if token not in banned):
            logits = [float("-inf") if token in banned else value for token, value in enumerate(logits)]
        for token in range(len(logits)):
            if token in stops and len(answer) < params.min_tokens:
                logits[token] = float("-inf")
            if token in prompt + answer:
                value, penalty = logits[token], params.repetition_penalty
                logits[token] = value / penalty if value > 0 else value * penalty
            logits[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty * (
                token in answer
            )
        probs = processed_probs(torch.tensor(logits, dtype=torch.float64), Sampling(params.temperature))
        u = uniforms.first() if not answer else uniforms.round()[-1]
        answer.append(int(sample(probs[None], torch.tensor([u]))))
    return answer


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c))
def test_bias_penalties_and_minimal_length_are_the_written_out_ones(
    target: TransformersTarget, case: dict[str, Any]
) -> None:
    """Greedy with a drafter, beside requests without settings; sampled without a drafter for the same random
    numbers."""
    greedy = SamplingParams(max_tokens=20, temperature=0, **case)
    engine = Engine(target, make_drafter(target), small())
    for name, prompt in enumerate(PROMPTS[:4]):
        engine.add_request(f"{name}", prompt, greedy)
        engine.add_request(
            f"{name} plain", prompt, SamplingParams(max_tokens=20, temperature=name % 2, seed=3)
        )
    outputs = finish(engine)
    for name, prompt in enumerate(PROMPTS[:4]):
        assert tokens_of(outputs[f"{name}"]) == naive(target, prompt, 20, greedy)
    assert sum(outputs[f"{name}"][-1].stats.accepted for name in range(4)) > 0
    sampled = SamplingParams(max_tokens=20, temperature=0.9, seed=11, **case)
    engine = Engine(target, None, small())
    engine.add_request("a", PROMPTS[0], sampled)
    assert tokens_of(finish(engine)["a"]) == naive(target, PROMPTS[0], 20, sampled)


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_followed_and_its_end_ends_the_answer(
    target: TransformersTarget, drafts: bool, temperature: float
) -> None:
    engine = Engine(target, make_drafter(target), small())
    Countdown.vocab = target.info.vocab_size
    for start in (3, 9):
        params = SamplingParams(
            max_tokens=30,
            temperature=temperature,
            ignore_eos=True,
            constraint=Countdown(start),
            draft=drafts,
            min_tokens=30,
        )
        engine.add_request(f"{start}", PROMPTS[start % 4], params)
    outputs = finish(engine)
    for start in (3, 9):
        assert tokens_of(outputs[f"{start}"]) == [*range(50 + start, 49, -1), 7]
        assert outputs[f"{start}"][-1].finish_reason == "stop"
    assert all((o[-1].stats.accepted > 0) == drafts for o in outputs.values())


def test_log_probabilities_are_the_targets_own(target: TransformersTarget) -> None:
    engine = Engine(target, make_drafter(target), small())
    prompt = PROMPTS[1]
    engine.add_request("a", prompt, SamplingParams(max_tokens=15, seed=4, logprobs=3, logit_bias={9: 5.0}))
    engine.add_request("b", PROMPTS[0], SamplingParams(max_tokens=15, temperature=0, ignore_eos=True))
    outputs = finish(engine)["a"]
    events = [e for o in outputs for e in o.events]
    tokens = [e.token_id for e in events]
    read = target.forward(torch.tensor([prompt + tokens]), None)
    wanted = torch.log_softmax(target.logits(read.last_hidden_BTH[0]).float(), -1)[len(prompt) - 1 :]
    for place, event in enumerate(events):
        assert event.logprob == pytest.approx(float(wanted[place, event.token_id]), abs=1e-4)
        best = wanted[place].topk(3)
        assert [t for t, _ in event.top_logprobs] == best.indices.tolist()
        assert [p for _, p in event.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_stop_tokens_say_which_one_ended_the_answer(target: TransformersTarget) -> None:
    engine = Engine(target, make_drafter(target), small())
    engine.add_request("free", PROMPTS[0], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    free = tokens_of(finish(engine)["free"])
    stop = free[25]
    at = free.index(stop)
    engine.add_request(
        "a", PROMPTS[0], SamplingParams(max_tokens=40, temperature=0, stop_token_ids=(stop,), ignore_eos=True)
    )
    outputs = finish(engine)["a"]
    assert tokens_of(outputs) == free[: at + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
