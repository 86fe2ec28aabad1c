"""Accepted length and acceptance by position from recorded rounds, with bootstrap intervals.

The accepted length counts the bonus token. A round that the token limit cut short says nothing about how much
would have been accepted, so it is left out; a round that a stop token ended counts what it emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from draftkit.decode import Decoded

BOOTSTRAP_SAMPLES = 2000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptRecord:
    """What one prompt contributes: its full rounds, the tokens these emitted, and per position tries and
    acceptances."""

    prompt_id: str
    domain: str
    new_tokens: int
    finish_reason: str
    rounds: int
    emitted: int
    tried: tuple[int, ...]  # [gamma]: rounds in which the position was reached and its verdict is known
    accepted: tuple[int, ...]  # [gamma]: of these, accepted
    accepted_per_round: tuple[int, ...]
    prompt_tokens: int = 0
    answer_ids: tuple[int, ...] = ()  # what the target said, a stop token included
    text: str = ""  # the same, decoded; empty where nobody asked


def record_of(decoded: Decoded, prompt_id: str, domain: str, gamma: int) -> PromptRecord:
    """Condense one answer. Only the last round can be cut, by a stop token or by the limit: it may hide how
    many more tokens would have been accepted, or the engine did not verify what the answer had no room for.
    """
    tried, accepted = np.zeros(gamma, int), np.zeros(gamma, int)
    full = [r for i, r in enumerate(decoded.rounds) if not _cut_by_limit(decoded, i)]
    for r in full:
        known = min(r.accepted, r.emitted)  # accepted tokens after a stop token are not part of the answer
        accepted[:known] += 1
        # position `known` was rejected, if it exists
        reached = known + 1 if r.emitted > r.accepted else known
        tried[: min(reached, r.verified)] += 1
    return PromptRecord(
        prompt_id=prompt_id,
        domain=domain,
        new_tokens=len(decoded.tokens),
        finish_reason=decoded.finish_reason,
        rounds=len(full),
        emitted=sum(r.emitted for r in full),
        tried=tuple(tried.tolist()),
        accepted=tuple(accepted.tolist()),
        accepted_per_round=tuple(r.accepted for r in full),
        answer_ids=decoded.tokens,
    )


def _cut_by_limit(decoded: Decoded, index: int) -> bool:
    r = decoded.rounds[index]
    last = index == len(decoded.rounds) - 1
    more_unseen = r.emitted < r.accepted + 1 or r.accepted == r.verified < r.drafted
    return last and decoded.finish_reason == "length" and more_unseen


def accepted_length(records: Sequence[PromptRecord], seed: int = 0) -> Interval:
    """Tokens per round, bonus included, as the ratio of sums over prompts (micro average over rounds)."""
    emitted = np.array([r.emitted for r in records], float)
    rounds = np.array([r.rounds for r in records], float)
    return _bootstrap([(emitted, rounds)], seed)


def macro_accepted_length(records: Sequence[PromptRecord], seed: int = 0) -> Interval:
    """Mean over domains of the accepted length; prompts are resampled within their domain."""
    pairs = []
    for domain in domains_of(records):
        chosen = [r for r in records if r.domain == domain]
        pairs.append(
            (np.array([r.emitted for r in chosen], float), np.array([r.rounds for r in chosen], float))
        )
    return _bootstrap(pairs, seed)


def domains_of(records: Sequence[PromptRecord]) -> list[str]:
    """Domains in order of appearance."""
    return list(dict.fromkeys(r.domain for r in records))


# upper ends of the places in an answer, and of the tokens of context, by which lengths are told
ANSWER_PLACES = (32, 128, 512, 2048)
CONTEXT_TOKENS = (256, 1024, 4096, 16384)


def lengths_by_place(
    records: Sequence[PromptRecord], ends: Sequence[int], context: bool = False
) -> dict[str, float]:
    """Accepted length of the rounds that began below each end, and from the one before on; counted in
    tokens of the answer, or, with `context`, of prompt and answer together. Places without rounds are left
    out."""
    emitted, rounds = np.zeros(len(ends) + 1), np.zeros(len(ends) + 1)
    for record in records:
        place = record.prompt_tokens + 1 if context else 1  # the first token is the target's own
        left = record.emitted
        for accepted in record.accepted_per_round:
            came = min(accepted + 1, left)  # a stop token may have cut the last one
            where = int(np.searchsorted(ends, place, side="right"))
            emitted[where], rounds[where] = emitted[where] + came, rounds[where] + 1
            place, left = place + came, left - came
    firsts = [0, *ends]
    names = [f"{first}-{end - 1}" for first, end in zip(firsts, ends, strict=False)] + [f"{ends[-1]}-"]
    return {
        name: float(tokens / count)
        for name, tokens, count in zip(names, emitted, rounds, strict=True)
        if count
    }


def acceptance_by_position(records: Sequence[PromptRecord]) -> list[float]:
    """Conditional acceptance [gamma]: accepted over tried, NaN where a position was never reached."""
    tried = np.sum([r.tried for r in records], axis=0)
    accepted = np.sum([r.accepted for r in records], axis=0)
    return [float(a / t) if t else float("nan") for a, t in zip(accepted, tried, strict=True)]


def acceptance_interval(records: Sequence[PromptRecord], seed: int = 0) -> tuple[Floats, Floats]:
    """The 95 % bootstrap interval over prompts of `acceptance_by_position`, low and high [gamma]; NaN where a
    position was never reached."""
    tried_PG = np.array([r.tried for r in records], float)
    accepted_PG = np.array([r.accepted for r in records], float)
    chosen = np.random.default_rng(seed).integers(0, len(records), (BOOTSTRAP_SAMPLES, len(records)))
    counts_SP = np.stack([np.bincount(row, minlength=len(records)) for row in chosen]).astype(float)
    tried_SG, accepted_SG = counts_SP @ tried_PG, counts_SP @ accepted_PG
    share_SG = np.divide(accepted_SG, tried_SG, out=np.full_like(tried_SG, np.nan), where=tried_SG > 0)
    never_G = tried_PG.sum(0) == 0
    share_SG[:, never_G] = 0.0  # so that nothing warns; taken out below
    low_G, high_G = np.nanpercentile(share_SG, [2.5, 97.5], axis=0)
    return np.where(never_G, np.nan, low_G), np.where(never_G, np.nan, high_G)


def _bootstrap(pairs: Sequence[tuple[Floats, Floats]], seed: int) -> Interval:
    """Mean over `pairs` of sum(numerator) / sum(denominator), with a percentile interval."""
    rng = np.random.default_rng(seed)
    totals = np.zeros(BOOTSTRAP_SAMPLES)
    value = 0.0
    for numerator, denominator in pairs:
        if denominator.sum() == 0:  # every answer ended with its first token: no round was needed
            return Interval(float("nan"), float("nan"), float("nan"))
        chosen = rng.integers(0, len(numerator), (BOOTSTRAP_SAMPLES, len(numerator)))
        drawn = np.maximum(denominator[chosen].sum(1), 1.0)
        totals += numerator[chosen].sum(1) / drawn / len(pairs)
        value += float(numerator.sum() / denominator.sum()) / len(pairs)
    low, high = np.percentile(totals, [2.5, 97.5])
    return Interval(value, float(low), float(high))
