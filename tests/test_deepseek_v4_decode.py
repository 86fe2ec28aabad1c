"""A DeepSeek-V4 target with its draft module: the reference loop and the engine say what the target says
alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from draftkit.decode import decode
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter
from draftkit.draft.drafter import DraftContext, Proposal
from draftkit.engine.engine import Engine
from draftkit.engine.sampling_params import SamplingParams
from draftkit.evaluate.exactness import DEVIATION_ALLOWED, deviation, output_distribution
from draftkit.evaluate.exactness_cases import Tables, first_of_depth, planner_cases, random_step_rate
from draftkit.ops.sampling import Sampling
from draftkit.ops.verify import RULES
from draftkit.target.interface import TargetInfo
from draftkit.target.transformers import TransformersTarget
from support.deepseek_v4 import tiny_drafter, tiny_target
from support.engine import finish, small, tokens_of
from tools.tiny_v4 import tiny_model

NOISE = 2e-3  # of a logit: what float32 makes of passes of other shapes
RANDOM = torch.Generator().manual_seed(11)
PROMPTS = [torch.randint(0, 90, (n,), generator=RANDOM).tolist() for n in (3, 7, 8, 12, 19, 30)]


@pytest.fixture(scope="module")
def target() -> TransformersTarget:
    """Windows of 8 tokens, entries of 4 and of 6."""
    return tiny_target(heavy=6)


class Scripted(DeepseekV4Drafter):
    """Proposes what the target will say, up to a place that moves on from round to round: every count of
    accepted tokens occurs."""

    answer: Sequence[int] = ()
    prompt = 0
    rounds = 0

    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        made = super().propose(context, anchor_B, sampling, uniforms_BG)
        right = self.rounds % (self.gamma + 1)
        self.rounds += 1
        at = context.length - self.prompt + 1
        tokens = [
            self.answer[at + k] if k < right and at + k < len(self.answer) else 91 for k in range(self.gamma)
        ]
        tokens_BG = torch.tensor([tokens])
        probs = torch.nn.functional.one_hot(tokens_BG, self.config.vocab_size).float()
        return Proposal(tokens_BG, probs, made.confidence_BG, made.largest_BG)


class Greedy(DeepseekV4Drafter):
    """Proposes what it finds most likely, whatever the request's settings."""

    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        return super().propose(context, anchor_B, Sampling(0.0), uniforms_BG)


class Penalised:
    """A target that likes each token of the answer, drafts of this pass among them, less by `presence` of a
    logit: what a request with `presence_penalty` sees."""

    def __init__(self, target: TransformersTarget, prompt: int, presence: float) -> None:
        self._target, self._prompt, self._presence = target, prompt, presence
        self.info, self.device, self.new_cache = target.info, target.device, target.new_cache
        self._read: list[int] = []

    def forward(self, tokens_BT: Tensor, cache: Any, layers: Sequence[int] = ()) -> Any:
        self._read = [*self._read[: cache.length], *tokens_BT[0].tolist()]
        return self._target.forward(tokens_BT, cache, layers)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._target.logits(hidden).clone()
        rows = logits.view(-1, logits.shape[-1])
        for place, row in enumerate(rows, len(self._read) - len(rows) + 1):
            row[list(set(self._read[self._prompt : place]))] -= self._presence
        return logits


def check_same(
    target: TransformersTarget, prompt: list[int], got: Sequence[int], wanted: Sequence[int]
) -> int:
    """Where the answers part, the target's two best tokens must be as good as equal. 1 when they part."""
    if list(got) == list(wanted):
        return 0
    at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    read = target.forward(torch.tensor([[*prompt, *wanted[:at]]]), None)
    logits = target.logits(read.last_hidden_BTH[0, -1])
    assert abs(float(logits[got[at]] - logits[wanted[at]])) < NOISE, f"token {at} of {prompt}"
    return 1


@pytest.mark.slow
def test_greedy_answers_are_the_targets_own_at_every_count_of_accepted_tokens(
    target: TransformersTarget,
) -> None:
    drafter = tiny_drafter(target)
    drafter.__class__ = Scripted
    counts: dict[int, int] = {}
    parted = 0
    for prompt in PROMPTS:
        wanted = decode(target, None, prompt, Sampling(0.0), 40).tokens
        drafter.answer, drafter.prompt = wanted, len(prompt)
        answer = decode(target, drafter, prompt, Sampling(0.0), 40)
        parted += check_same(target, prompt, answer.tokens, wanted)
        for done in answer.rounds:
            counts[done.accepted] = counts.get(done.accepted, 0) + 1
    assert set(counts) == set(range(drafter.gamma + 1)), counts
    assert parted <= 1


@pytest.mark.slow
def test_the_engine_gives_the_targets_own_greedy_answers_to_many_requests_at_once(
    target: TransformersTarget,
) -> None:
    drafter = tiny_drafter(target)
    engine = Engine(target, drafter, small(dtype="float32", max_running=3))
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=24, temperature=0.0))
    outputs = finish(engine)
    assert engine.metrics.drafted > 100 and engine.info.algorithm == "dspark_v4"
    for index, prompt in enumerate(PROMPTS):
        wanted = decode(target, None, prompt, Sampling(0.0), 24).tokens
        assert check_same(target, prompt, tokens_of(outputs[str(index)]), wanted) == 0
    # both are empty when nobody asks any more
    assert not engine._models.model._caches and not engine._models.drafter._contexts  # type: ignore[union-attr]
    assert engine.metrics.kv_used == 0


@pytest.mark.slow
def test_the_engines_sampled_answers_are_those_of_the_reference_loop(target: TransformersTarget) -> None:
    """Drafts are drawn from the drafter's own distribution, and the same numbers give the same tokens: what
    is proven of the loop holds for the engine. A request that a penalty changes keeps greedy drafts."""
    drafter = tiny_drafter(target)
    engine = Engine(target, drafter, small(dtype="float32", max_running=4))
    asked = [
        (seed, prompt, Sampling(1.0, top_p=0.9 if seed % 2 else 1.0))
        for seed, prompt in enumerate(PROMPTS[:4])
    ]
    for seed, prompt, how in asked:
        params = SamplingParams(max_tokens=24, temperature=1.0, top_p=how.top_p, seed=seed)
        engine.add_request(str(seed), prompt, params)
    engine.add_request("greedy", PROMPTS[4], SamplingParams(max_tokens=12, temperature=0.0))
    changed = SamplingParams(max_tokens=12, temperature=1.0, seed=9, presence_penalty=0.5)
    engine.add_request("changed", PROMPTS[5], changed)
    outputs, accepted = finish(engine), 0
    for seed, prompt, how in asked:
        wanted = decode(target, drafter, prompt, how, 24, seed)
        assert tokens_of(outputs[str(seed)]) == list(wanted.tokens)
        accepted += sum(done.accepted for done in wanted.rounds)
    assert accepted > 0
    alone = decode(target, None, PROMPTS[4], Sampling(0.0), 12).tokens
    assert check_same(target, PROMPTS[4], tokens_of(outputs["greedy"]), alone) == 0
    prompt = PROMPTS[5]
    drafter.__class__ = Greedy
    penalised = cast(TransformersTarget, Penalised(target, len(prompt), 0.5))
    wanted = decode(penalised, drafter, prompt, Sampling(1.0), 12, 9)
    assert tokens_of(outputs["changed"]) == list(wanted.tokens)
    assert wanted.tokens != decode(target, drafter, prompt, Sampling(1.0), 12, 9).tokens
    assert sum(done.accepted for done in wanted.rounds) > 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_distribution_is_the_targets_own_by_enumeration(rule: object) -> None:
    """Three tokens, two drafted, both models' own probabilities after every text of up to five tokens."""
    tables = _tables(gamma=2, length=3)
    rng = np.random.default_rng(0)
    for case in planner_cases(random_step_rate(3, rng), 2, lag=2):
        found = output_distribution(rule, case, [tables], rounds=3)  # type: ignore[arg-type]
        assert deviation(found, [tables]) < DEVIATION_ALLOWED, case.name
    # a drafter that is wrong about its own probabilities is found out
    wrong = Tables(**{**vars(tables), "target_NV": np.roll(tables.target_NV, 1, -1)})
    found = output_distribution(rule, planner_cases(random_step_rate(3, rng), 2, 2)[0], [wrong], rounds=3)  # type: ignore[arg-type]
    assert deviation(found, [tables]) > 0.01


@torch.inference_mode()
def _tables(gamma: int, length: int) -> Tables:
    vocab, prompt = 3, [0, 1, 2, 1, 1, 0, 2, 2, 0, 1]
    model = tiny_model(heavy=6, vocab_size=vocab, dspark_noise_token_id=2)
    target = TransformersTarget(model, TargetInfo("v4", None, "f", vocab, 64, 5, (), 512, "deepseek_v4"))
    drafter = tiny_drafter(target, vocab_size=vocab, mask_token_id=2, block_size=gamma)
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight, std=2.0)
    nodes = first_of_depth(vocab, length + gamma)
    texts: list[list[int]] = [[]]
    for node in range(nodes):
        texts += [[*texts[node], t] for t in range(vocab)]
    target_NV = np.zeros((nodes, vocab))
    draft_NGV = np.full((nodes, gamma, vocab), 1 / vocab)
    level_NG = np.zeros((nodes, gamma), np.int64)
    hidden: dict[int, Tensor] = {}
    for node in range(nodes):
        read = target.forward(torch.tensor([prompt + texts[node]]), None, (2, 3, 4))
        target_NV[node] = torch.softmax(target.logits(read.last_hidden_BTH[0, -1]).double(), -1)
        context = drafter.new_context()
        tokens = torch.tensor([prompt + texts[node]])
        drafter.extend(context, read.features_BTF[:, :-1], tokens[:, 1:])
        hidden[node] = drafter._block_hidden(context, tokens[:, -1])[0]
    for node in range(nodes):
        text = texts[node]
        for place in range(min(gamma, len(text) + 1)):
            began = texts.index(text[: len(text) - place])
            previous = torch.tensor((prompt + text)[-1])
            markov = drafter.markov_head.previous(previous)
            state = hidden[began][place]
            logits = drafter.head().logits(drafter.head_input(state)) + drafter.markov_head.markov_w2(markov)
            draft_NGV[node, place] = torch.softmax(logits.double(), -1)
            level_NG[node, place] = int(3 * torch.sigmoid(drafter.confidence_head(state, markov)))
    assert draft_NGV.max() < 1 and np.abs(draft_NGV[:, 0] - target_NV).max() > 0.2
    return Tables(vocab, gamma, length, target_NV, draft_NGV, level_NG, np.array([0.2, 0.5, 0.9]))
