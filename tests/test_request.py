"""Settings of a request: numbers of any kind are taken, those that cannot work are named, extreme ones still
work."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from draftkit.engine.engine import Engine
from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import DataError
from draftkit.target.loading import load_target
from support.engine import PROMPTS, finish, small, tokens_of


def test_parameters_are_taken_as_vllms_are_and_wrong_ones_are_named() -> None:
    given = SamplingParams(stop="Step 2", stop_token_ids=[3, 4], allowed_token_ids=None)  # type: ignore[arg-type]
    assert (given.stop, given.stop_token_ids, given.allowed_token_ids) == (("Step 2",), (3, 4), None)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()  # type: ignore[arg-type]
    numbers = SamplingParams(
        seed=np.int64(3), logit_bias={np.int64(5): Fraction(1, 2)}, allowed_token_ids=np.array([5, 6])
    )
    assert numbers == SamplingParams(seed=3, logit_bias={5: 0.5}, allowed_token_ids=(5, 6))
    assert (type(numbers.seed), type(numbers.logit_bias[5])) == (int, float)
    wrong: list[dict[str, object]] = [
        {"logprobs": True},
        {"temperature": 10**400},
        {"repetition_penalty": 1e-40},
        {"logit_bias": {5: 1e39}},
        {"logit_bias": {5: -(10**400)}},
        {"constraint": 5},
        {"stop": ("",)},
        {"stop": [1]},
        {"min_tokens": 20, "max_tokens": 10},
        {"seed": 1.5},
        {"max_tokens": 2.5},
        {"logprobs": 1.5},
        {"top_k": 2.5},
        {"logit_bias": {"5": 1}},
        {"logit_bias": {5: "2.0"}},
        {"logit_bias": {5: float("inf")}},
        {"temperature": 1e-38},
        {"temperature": float("nan")},
        {"stop_token_ids": ["a"]},
        {"temperature": "a"},
        {"top_p": None},
        {"presence_penalty": "1"},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"bad_token_ids": 5},
        {"bad_token_ids": (5,)},
        {"logit_bias": [5]},
    ]
    for case in wrong:
        with pytest.raises(DataError, match=f"^{next(iter(case))} is "):
            SamplingParams(**case)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="constraint and allowed_token_ids"):
        SamplingParams(constraint=Mock(), allowed_token_ids=(1,))


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_p": 1e-300},
        {"logit_bias": {5: 1e20}, "temperature": 1e-5},
        {"logit_bias": {5: 1e20}, "repetition_penalty": 1e-6, "temperature": 1e-5},
        {"repetition_penalty": 1e6, "top_p": 1e-300},
    ],
)
def test_the_most_extreme_settings_still_give_the_most_likely_token(
    target_folder: Path, extreme: dict[str, Any]
) -> None:
    """In float32 a tiny share of the mass is none at all, and large numbers are infinite."""
    engine = Engine(load_target(str(target_folder)), None, small(dtype="float32", compile=False))
    for name, more in (("sampled", {"seed": 1}), ("greedy", {"temperature": 0.0})):
        engine.add_request(
            name, PROMPTS[0], SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **extreme, **more})
        )
    outputs = finish(engine)
    assert tokens_of(outputs["sampled"]) == tokens_of(outputs["greedy"])
