"""The lean forward equals the Transformers module: any family of the table, any way of cutting tokens into
passes."""

from __future__ import annotations

import pytest
import torch

from draftkit.engine.paged_model import unsupported
from draftkit.engine.passes import Pass
from support.paged_target import BLOCK, FAMILIES, VOCAB, build, one_pass


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers_in_pieces_beside_others(family: str) -> None:
    target, fast = build(family)
    assert unsupported(target) is None
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (50, 9, 23)]
    order = torch.randperm(40, generator=generator).tolist()
    tables = [order[0:13], order[13:16], order[16:22]]  # pages lie anywhere
    cuts = [[0, 40, 41, 50], [0, 3, 8, 9], [0, 1, 9, 23]]
    logits: list[list[torch.Tensor]] = [[], [], []]
    features: list[list[torch.Tensor]] = [[], [], []]
    for turn in range(3):
        pieces = [(texts[r][cuts[r][turn] : cuts[r][turn + 1]], cuts[r][turn], tables[r]) for r in range(3)]
        step = one_pass(pieces)
        read = fast.read(step, None, (0, 1))
        assert read.features_TF is not None
        for r, (first, last) in enumerate(zip(step.firsts_R, step.ends_R, strict=True)):
            logits[r].append(read.logits_WV[first:last])
            features[r].append(read.features_TF[first:last])
    for r, text in enumerate(texts):
        wanted = target.forward(torch.tensor([text]), None, (0, 1))
        torch.testing.assert_close(
            torch.cat(logits[r]), target.logits(wanted.last_hidden_BTH)[0], atol=1e-4, rtol=1e-4
        )
        assert wanted.features_BTF is not None
        torch.testing.assert_close(torch.cat(features[r]), wanted.features_BTF[0], atol=1e-4, rtol=1e-4)


def test_only_wanted_rows_get_logits() -> None:
    _, fast = build("qwen3")
    step = one_pass([([1, 2, 3], 0, [5]), ([4, 5], 0, [7])])
    rows = fast.read(step, torch.tensor([2, 4])).logits_WV
    torch.testing.assert_close(rows, fast.read(step, None).logits_WV[[2, 4]], atol=1e-5, rtol=1e-5)


def test_a_drafters_block_sees_all_of_itself() -> None:
    """With `block` the first token's output depends on the last token; without it does not."""
    _, fast = build("qwen3")
    outputs = {}
    for block in (True, False):
        for last in (7, 8):
            step = one_pass([([1, 2, last], 0, [5])])
            if block:
                step = Pass(
                    step.tokens_T,
                    step.starts_R,
                    step.lengths_R,
                    step.tables_RB,
                    BLOCK,
                    step.device,
                    step.dtype,
                    True,
                )
            outputs[block, last] = fast.read(step, torch.tensor([0])).logits_WV
    assert torch.equal(outputs[False, 7], outputs[False, 8])
    assert not torch.allclose(outputs[True, 7], outputs[True, 8])


def test_families_outside_the_table_say_why() -> None:
    target, _ = build("qwen3")
    target.model.config.rope_parameters = {"rope_type": "dynamic"}
    assert unsupported(target) == "rotary embedding of type dynamic"
    gemma, _ = build("gemma4")
    gemma.model.config.hidden_size_per_layer_input = 8
    assert unsupported(gemma) == "embeddings per layer"
    target.model.config.model_type = "other"
    assert "not in the table" in str(unsupported(target))
