"""Accepted length and acceptance by position, from rounds written by hand."""

from __future__ import annotations

import math

import pytest

from draftkit.decode import Decoded, Round
from draftkit.evaluate.metrics import (
    acceptance_by_position,
    accepted_length,
    macro_accepted_length,
    record_of,
)


def decoded(rounds: list[Round], reason: str = "stop") -> Decoded:
    return Decoded(tuple(range(1 + sum(r.emitted for r in rounds))), reason, tuple(rounds), 0.1, 0.2)


def test_accepted_length_counts_the_bonus_token() -> None:
    record = record_of(decoded([Round(3, 3, 3, 4), Round(3, 3, 0, 1)]), "p", "code", 3)
    assert accepted_length([record]).value == pytest.approx(2.5)
    assert record.tried == (2, 1, 1)
    assert record.accepted == (1, 1, 1)


def test_a_position_that_was_not_verified_was_not_tried() -> None:
    record = record_of(decoded([Round(3, 1, 1, 2), Round(3, 2, 0, 1), Round(3, 0, 0, 1)]), "p", "code", 3)
    assert (record.tried, record.accepted) == ((2, 0, 0), (1, 0, 0))


def test_a_round_cut_by_the_limit_is_left_out_and_one_cut_by_a_stop_token_counts_what_it_emitted() -> None:
    cut = record_of(decoded([Round(3, 3, 1, 2), Round(3, 3, 3, 2)], "length"), "p", "code", 3)
    assert (cut.rounds, cut.emitted) == (1, 2)
    whole = record_of(decoded([Round(3, 3, 1, 2), Round(3, 3, 1, 2)], "length"), "p", "code", 3)
    assert (whole.rounds, whole.emitted) == (2, 4)
    cut = record_of(decoded([Round(3, 3, 1, 2), Round(3, 1, 1, 2)], "length"), "p", "code", 3)
    assert (cut.rounds, cut.emitted) == (1, 2), (
        "one draft was verified for want of room, and kept: more might have been"
    )
    stopped = record_of(decoded([Round(3, 3, 3, 2)], "stop"), "p", "code", 3)
    assert (stopped.rounds, stopped.emitted) == (1, 2)
    assert stopped.tried == (1, 1, 0), "what lies after a stop token was never a question"


def test_acceptance_is_conditional_on_the_positions_before() -> None:
    rounds = [Round(3, 3, 0, 1), Round(3, 3, 1, 2), Round(3, 3, 2, 3), Round(3, 3, 3, 4)]
    by_position = acceptance_by_position([record_of(decoded(rounds), "p", "code", 3)])
    assert by_position == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    never = acceptance_by_position([record_of(decoded([Round(2, 2, 0, 1)]), "p", "code", 2)])
    assert never[0] == 0 and math.isnan(never[1])


def test_macro_is_the_mean_over_domains_and_its_interval_holds_it() -> None:
    code = [record_of(decoded([Round(3, 3, n % 4, n % 4 + 1)]), str(n), "code", 3) for n in range(40)]
    chat = [record_of(decoded([Round(3, 3, 0, 1)]), str(n), "chat", 3) for n in range(4)]
    macro = macro_accepted_length([*code, *chat])
    assert macro.value == pytest.approx((2.5 + 1.0) / 2)
    assert macro.low < macro.value < macro.high
    assert macro == macro_accepted_length([*code, *chat]), "the bootstrap is seeded"
