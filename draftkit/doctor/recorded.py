"""The target's own greedy answers to a few prompts, and what a drafter would have proposed along them.

The target runs once. At temperature 0 its answer is the same with every drafter, so each drafter, however
it is changed, can be tried on the recorded answers by drafting passes alone: rounds, accepted tokens and
accepted length are those of the reference loop.

Shapes: B = 1, T tokens, F features of the drafter's layers, H hidden, G = gamma drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftkit.decode import Decoded, Round
from draftkit.draft.drafter import Drafter
from draftkit.engine.answers import decode_all, sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.errors import DataError
from draftkit.evaluate.metrics import BOOTSTRAP_SAMPLES, PromptRecord, record_of
from draftkit.evaluate.run import EvalPrompt
from draftkit.ops.sampling import Sampling
from draftkit.target.transformers import TransformersTarget

GREEDY = Sampling(0.0)


@dataclass(frozen=True)
class Recorded:
    """A prompt, the target's greedy answer to it, and the outputs of all layers that may be listened to."""

    prompt_id: str
    domain: str
    tokens: tuple[int, ...]  # prompt and answer
    prompt_tokens: int
    finish_reason: str
    layers: dict[int, Tensor]  # layer outputs by number, [T, H] each


@torch.inference_mode()
def record(
    target: TransformersTarget,
    prompts: Sequence[EvalPrompt],
    max_new_tokens: int,
    layers: tuple[int, ...] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[Recorded]:
    """The target answers and then reads all of it once more, for these layers (None: 0 to n - 2, all that may
    be listened to); prompts that leave no room, and answers of one token, are left out. Raises DataError when
    nothing is left."""
    room = target.info.max_length - max_new_tokens
    chosen = [p for p in prompts if len(p.tokens) <= room]
    engine = Engine(target, None, EngineSettings(max_running=max(1, len(chosen)), prefix_reuse=False))
    params = sampling_params(GREEDY, max_new_tokens, 0)
    answers = decode_all(engine, [(p.tokens, params) for p in chosen], tick)
    chosen_layers = layers or tuple(range(target.info.num_layers - 1))
    found = []
    for prompt, answer in zip(chosen, answers, strict=True):
        if len(answer.tokens) < 2:
            continue
        tokens = (*prompt.tokens, *answer.tokens)
        read = target.forward(torch.tensor([tokens], device=target.device), None, chosen_layers)
        assert read.features_BTF is not None
        by_layer = dict(zip(chosen_layers, read.features_BTF[0].chunk(len(chosen_layers), -1), strict=True))
        found.append(
            Recorded(
                prompt.prompt_id, prompt.domain, tokens, len(prompt.tokens), answer.finish_reason, by_layer
            )
        )
    if not found:
        raise DataError(
            f"{len(prompts)} prompts: none leaves room for {max_new_tokens} tokens of answer; give "
            "shorter ones"
        )
    return found


@torch.inference_mode()
def rounds_along(drafter: Drafter, recorded: Recorded) -> PromptRecord:
    """The rounds of greedy decoding with this drafter, whose layers must be among the recorded ones."""
    features_1TF = torch.cat([recorded.layers[i] for i in drafter.config.feature_layers], -1).unsqueeze(0)
    tokens_T = torch.tensor(recorded.tokens, device=features_1TF.device)
    context, place = drafter.new_context(), recorded.prompt_tokens
    drafter.extend(context, features_1TF[:, :place], tokens_T[None, 1 : place + 1])
    uniforms = torch.full((1, drafter.gamma), 0.5, dtype=torch.float64)
    rounds = []
    while place < len(tokens_T) - 1:
        drafted_G = drafter.propose(context, tokens_T[place : place + 1], GREEDY, uniforms).tokens_BG[0]
        wanted = tokens_T[place + 1 : place + 1 + drafter.gamma]
        same = (drafted_G[: len(wanted)] == wanted).long().cumprod(0)
        accepted = int(same.sum())
        kept = min(accepted + 1, len(tokens_T) - 1 - place)
        rounds.append(Round(drafter.gamma, len(wanted), accepted, kept))
        drafter.extend(
            context, features_1TF[:, place : place + kept], tokens_T[None, place + 1 : place + kept + 1]
        )
        place += kept
    answer = recorded.tokens[recorded.prompt_tokens :]
    decoded = Decoded(answer, recorded.finish_reason, tuple(rounds), 0.0, 0.0)
    return record_of(decoded, recorded.prompt_id, recorded.domain, drafter.gamma)


def records_along(drafter: Drafter, recorded: Sequence[Recorded]) -> list[PromptRecord]:
    """`rounds_along` of every answer."""
    return [rounds_along(drafter, one) for one in recorded]


def gain(before: Sequence[PromptRecord], after: Sequence[PromptRecord]) -> tuple[float, float]:
    """How many more tokens a round emits, and the lower end of its 95 % interval, from a bootstrap over the
    prompts, which both have in the same order."""
    counts_P4 = np.array(
        [[a.emitted, a.rounds, b.emitted, b.rounds] for b, a in zip(before, after, strict=True)], float
    )

    def difference(total: np.ndarray) -> np.ndarray:
        one, two = np.maximum(total[..., 1], 1), np.maximum(total[..., 3], 1)
        found: np.ndarray = total[..., 0] / one - total[..., 2] / two
        return found

    rng = np.random.default_rng(0)
    drawn = counts_P4[rng.integers(0, len(counts_P4), (BOOTSTRAP_SAMPLES, len(counts_P4)))].sum(1)
    return float(difference(counts_P4.sum(0))), float(np.percentile(difference(drawn), 2.5))
