"""Targets with recurrent layers (Qwen3-Next, tiny and random): nothing is copied in plain generation, states
alone where a proposal may be rejected, and the answers stay the target's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from draftkit.decode import decode
from draftkit.errors import TargetError
from draftkit.ops.sampling import Sampling
from draftkit.target import cache as cache_module
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter
from support.targets import make_family

TOKENS = torch.arange(4, 16)[None]
KINDS = ["linear_attention", "full_attention"] * 2


@pytest.fixture(scope="module")
def hybrid() -> TransformersTarget:
    return make_family("qwen3_next", layer_types=KINDS)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of layers whose memory was copied."""
    found: list[str] = []

    def count(layer: Any) -> Any:
        found.append(type(layer).__name__)
        return copy.deepcopy(layer)

    monkeypatch.setattr(cache_module, "copy_of", count)
    return found


def test_plain_generation_copies_nothing(hybrid: TransformersTarget, copied: list[str]) -> None:
    decode(hybrid, None, TOKENS[0].tolist(), Sampling(1.0), 12, 1)
    del copied[:2]  # the empty states before the prompt, which is many tokens
    assert copied == []


def test_drafting_copies_recurrent_states_alone_and_changes_no_answer(
    hybrid: TransformersTarget, copied: list[str]
) -> None:
    drafter = make_drafter(hybrid)
    for seed in range(3):
        prompt = (TOKENS[0] + seed).tolist()
        plain = decode(hybrid, None, prompt, Sampling(0.0), 24)
        copied.clear()
        drafted = decode(hybrid, drafter, prompt, Sampling(0.0), 24)
        assert drafted.tokens == plain.tokens
        assert set(copied) == {"LinearAttentionLayer"}
        assert len(copied) == 2 * (1 + len(drafted.rounds)), "once a round: what is read again is not copied"
        assert any(r.accepted < r.verified for r in drafted.rounds), "something was rejected"


@pytest.mark.parametrize("kept", range(6))
def test_a_crop_leaves_the_states_of_what_was_kept(kept: int, hybrid: TransformersTarget) -> None:
    cache = hybrid.new_cache()
    hybrid.forward(TOKENS[:, :5], cache)
    hybrid.forward(torch.tensor([[40, 41, 42, 43, 44]]), cache)
    cache.crop(5 + kept)
    again = hybrid.forward(TOKENS[:, 5:], cache).last_hidden_BTH
    assert cache.length == 5 + kept + 7
    read = torch.cat([TOKENS[:, :5], torch.arange(40, 40 + kept)[None], TOKENS[:, 5:]], 1)
    alone = hybrid.forward(read, None).last_hidden_BTH[:, 5 + kept :]
    torch.testing.assert_close(again, alone, atol=2e-4, rtol=2e-3)


def test_one_token_is_kept_and_rows_can_be_chosen(hybrid: TransformersTarget) -> None:
    cache = hybrid.new_cache()
    rows = torch.cat([TOKENS, TOKENS.flip(1), TOKENS + 1])
    hybrid.forward(rows, cache)
    cache.select(torch.tensor([2, 0]))
    got = hybrid.forward(torch.tensor([[9], [9]]), cache).last_hidden_BTH[:, 0]
    nine = torch.tensor([9])
    alone = [hybrid.forward(torch.cat([rows[r], nine])[None], None).last_hidden_BTH[0, -1] for r in (2, 0)]
    torch.testing.assert_close(got, torch.stack(alone), atol=2e-4, rtol=2e-3)
    with pytest.raises(TargetError, match=r"can go back to 13\.\.13 only"):
        cache.crop(12)
