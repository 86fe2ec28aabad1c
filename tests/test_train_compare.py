"""The report of a comparison: pooled lengths, ratios to baselines and paired intervals from records."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.compare_report import Arm, build_report
from draftkit.config import load_recipe


def record(prompt: int, domain: str, emitted: int, rounds: int = 10) -> dict[str, Any]:
    return {
        "prompt_id": f"{domain}-{prompt}",
        "domain": domain,
        "emitted": emitted,
        "rounds": rounds,
        "tried": [rounds, emitted - rounds],
        "accepted": [emitted - rounds, 0],
    }


def arm(name: str, *gains: int, noise: int = 0) -> Arm:
    """One seed per gain; prompt i emits a number of tokens that is its own, plus the gain, in ten rounds."""
    rng = random.Random(name)
    hard = random.Random(0)
    base = [[hard.randrange(11, 40) for _ in range(30)] for _ in "ab"]
    seeds = [
        [
            record(i, domain, base[d][i] + gain + rng.randint(-noise, noise))
            for d, domain in enumerate(("chat", "code"))
            for i in range(30)
        ]
        for gain in gains
    ]
    return Arm(name, tuple(seeds))


def test_macro_is_the_mean_over_domains_of_tokens_per_round() -> None:
    records = [record(0, "chat", 20), record(1, "chat", 40, 30), record(0, "code", 30)]
    report = build_report([Arm("one", (records,))], ["one"], {})["arms"]["one"]
    assert report["accepted_len"]["chat"]["value"] == pytest.approx(60 / 40)
    assert report["accepted_len"]["macro"]["value"] == pytest.approx((60 / 40 + 3.0) / 2)
    assert report["acceptance"]["chat"][0] == pytest.approx((10 + 10) / (10 + 30))
    assert report["acceptance"]["all"] == [pytest.approx(40 / 50), 0.0]


def test_the_ratio_of_paired_arms_is_known_better_than_either_length() -> None:
    """The prompts differ much and the arms little: drawing the same prompts for both cancels what the prompts
    add."""
    rows = build_report([arm("base", 0), arm("plus", 3)], ["base"], {})["arms"]
    ratio, length = rows["plus"]["ratio"]["base"], rows["plus"]["accepted_len"]["macro"]
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert (ratio["high"] - ratio["low"]) / ratio["value"] < 0.25 * (length["high"] - length["low"]) / length[
        "value"
    ]
    assert rows["base"]["ratio"]["base"] == {"value": 1.0, "low": 1.0, "high": 1.0, "seeds": [1.0]}


def test_arms_that_do_not_differ_have_one_in_the_interval() -> None:
    ratio = build_report([arm("base", 0, noise=4), arm("same", 0, noise=4)], ["base"], {})["arms"]["same"][
        "ratio"
    ]["base"]
    assert ratio["low"] < 1 < ratio["high"]


def test_seeds_are_pooled_and_shown_one_by_one() -> None:
    row = build_report([arm("base", 0, 4, 8)], ["base"], {})["arms"]["base"]
    first, second, third = row["macro_by_seed"]
    assert [second - first, third - second] == pytest.approx([0.4, 0.4], abs=1e-3)
    assert row["accepted_len"]["macro"]["value"] == pytest.approx(second, abs=1e-3)


def test_arms_measured_on_other_prompts_are_refused() -> None:
    other = Arm("other", ([record(i, "chat", 20) for i in range(3)],))
    with pytest.raises(SystemExit, match="other was measured on other prompts"):
        build_report([arm("base", 0), other], ["base"], {})


def test_dspark_plus_is_the_arm_that_was_measured() -> None:
    arms = Path(__file__).parent.parent / "benchmarks" / "arms.yaml"
    plus = yaml.safe_load(arms.read_text("utf-8"))["ablations"]["arms"]["plus"]
    sets = [f"{key}={str(value).lower()}" for key, value in plus.items()]
    measured = load_recipe("tiny-dspark", [*sets, "drafter.intermediate_size=null", "name=dspark-plus"])
    assert load_recipe("dspark-plus") == measured
