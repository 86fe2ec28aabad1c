"""The block drafter: drafting and training see the same hidden states, and the loss is what the equations
say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import HEADS, TrainBatch
from draftkit.draft.families import STYLES
from draftkit.draft.layout import lay_out
from draftkit.ops.sampling import Sampling
from draftkit.settings import LossSettings
from support.drafters import BLOCK_CONFIG as CONFIG
from support.drafters import block_drafter
from support.plain_drafter import plain_loss, plain_rows

LENGTH = 20


def random_batch() -> TrainBatch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, 5:18] = True
    mask[1, 8:] = True
    return TrainBatch(
        tokens_BT=torch.randint(0, 40, (2, LENGTH), generator=generator),
        loss_mask_BT=mask,
        features_BTF=torch.randn(2, LENGTH, 32, generator=generator),
        last_hidden_BTH=torch.randn(2, LENGTH, 16, generator=generator),
        anchors_BA=torch.tensor([[6, 15, 0], [9, 12, 17]]),
        anchor_mask_BA=torch.tensor([[True, True, False], [True, True, True]]),
        document_BT=torch.zeros(2, LENGTH, dtype=torch.long),
        positions_BT=torch.arange(LENGTH).expand(2, -1),
        domain_BA=torch.tensor([[1, 1, 0], [0, 0, 0]]),
        domains=("chat", "code"),
    )


@pytest.mark.parametrize("layout", ["anchor", "one_plus_n"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("style", STYLES)
def test_training_and_drafting_compute_the_same_hidden_states(
    layout: str, window: int | None, style: str
) -> None:
    """All anchors at once, against one anchor at a time with an incrementally grown context."""
    shape = {"shared_key_value": True, "rotary_share": 0.25} if style == "gemma4" else {}
    drafter = block_drafter(
        layout=layout, head="none", confidence=False, window=window, style=style, **shape
    ).eval()
    batch = random_batch()
    blocks = lay_out(batch, drafter.gamma, window)
    together = drafter._train_hidden(batch, blocks)
    for row, anchor in ((0, 6), (1, 12)):
        context = drafter.new_context()
        for start, end in ((0, 3), (3, anchor + 2)):  # in two pieces, and a little too far
            drafter.extend(
                context,
                batch.features_BTF[row : row + 1, start:end],
                batch.tokens_BT[row : row + 1, start:end],
            )
        context.crop(anchor)
        with torch.inference_mode():
            alone = drafter._block_hidden(context, batch.tokens_BT[row, anchor : anchor + 1])
        place = blocks.anchor_X.tolist().index(row * LENGTH + anchor)
        torch.testing.assert_close(alone[0], together[place], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("head", HEADS)
def test_the_proposal_holds_the_very_distribution_that_was_sampled(head: str) -> None:
    drafter, batch = block_drafter(head=head, confidence=head != "none").eval(), random_batch()
    context = drafter.new_context()
    drafter.extend(context, batch.features_BTF[:1, :8], batch.tokens_BT[:1, :8])
    anchor = batch.tokens_BT[:1, 8]
    proposal = drafter.propose(context, anchor, Sampling(0.7), torch.full((1, 4), 0.5, dtype=torch.float64))
    hidden = drafter._block_hidden(context, anchor)
    previous, state = anchor, None
    for k in range(4):
        logits = hidden[:, k] @ drafter.lm_head.weight.T
        if drafter.markov_head is not None:
            row, state = drafter.markov_head.step(
                hidden[:, k], drafter.markov_head.markov_w1.weight[previous], state
            )
            logits = logits + row @ drafter.markov_head.markov_w2.weight.T
        torch.testing.assert_close(proposal.probs_BGV[:, k], torch.softmax(logits / 0.7, -1))
        previous = proposal.tokens_BG[:, k]
    greedy = drafter.propose(context, anchor, Sampling(0.0), torch.zeros(1, 4))
    assert torch.equal(greedy.probs_BGV.argmax(-1), greedy.tokens_BG)
    assert torch.equal(greedy.probs_BGV.amax(-1), torch.ones(1, 4))


VARIANTS = {
    "markov": {},
    "gated": {"head": "gated"},
    "rnn": {"head": "rnn"},
    "confidence without the Markov embedding": {"confidence_with_markov": False},
    "stopped confidence gradient": {"confidence_stop_gradient": True},
    "no confidence": {"confidence": False},
    "DFlash": {"head": "none", "confidence": False},
    "DFlash with confidence": {"head": "none"},
    "DFlash of 1 + N": {"head": "none", "confidence": False, "layout": "one_plus_n"},
    "window": {"window": 5},
    "deeper, longer": {"num_layers": 3, "block_size": 6, "markov_rank": 5},
    "Llama block": {"style": "llama"},
    "Gemma 4 block": {
        "style": "gemma4",
        "num_kv_heads": 1,
        "shared_key_value": True,
        "rotary_share": 0.25,
        "soft_cap": 4.0,
    },
    "Gemma 4 block with values of its own": {"style": "gemma4", "rotary_share": 0.25},
    "scaled logits": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_confidence_loss_and_gradients_equal_a_second_implementation(
    changes: dict[str, object],
) -> None:
    """One block at a time, from the paper's equations, with autograd through whole softmaxes; in packed
    rows."""
    settings = LossSettings(ce=0.3, tv=0.6, confidence=0.7, decay=3.0)
    drafter = block_drafter(**changes).double().train()
    batch = in_float64(packed_batch(random_batch(), (18, LENGTH)))
    report = drafter.loss(batch, settings)
    report.loss_sum.backward()
    found = {n: p.grad.clone() for n, p in drafter.named_parameters() if p.grad is not None}
    drafter.zero_grad()

    wanted = plain_rows(drafter, batch)
    assert report.rows_N.tolist() == [row.cell for row in wanted]
    assert len({row.cell // drafter.gamma for row in wanted}) == 5  # all real anchors
    logits_NV, confidence_N = training_outputs(drafter, batch)
    torch.testing.assert_close(logits_NV, torch.stack([row.logits for row in wanted]), atol=1e-5, rtol=1e-5)
    if drafter.config.confidence:
        guesses = torch.stack([row.confidence for row in wanted if row.confidence is not None])
        torch.testing.assert_close(confidence_N, guesses, atol=1e-5, rtol=1e-5)
    loss = plain_loss(wanted, settings)
    loss.backward()
    torch.testing.assert_close(report.loss_sum, loss, atol=1e-5, rtol=1e-5, check_dtype=False)
    weights = sum(math.exp(-row.slot / 3.0) for row in wanted)
    assert float(report.weight_sum) == pytest.approx(weights, rel=1e-5)
    q_NV, p_NV = (
        torch.softmax(torch.stack([getattr(row, logits).detach() for row in wanted]), -1)
        for logits in ("logits", "target_logits")
    )
    torch.testing.assert_close(report.accept_N, q_NV.minimum(p_NV).sum(-1), atol=1e-5, rtol=1e-5)
    gradients = {n: p.grad for n, p in drafter.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-5, rtol=1e-5, msg=name)


def in_float64(batch: TrainBatch) -> TrainBatch:
    return replace(
        batch, features_BTF=batch.features_BTF.double(), last_hidden_BTH=batch.last_hidden_BTH.double()
    )


@torch.no_grad()
def training_outputs(drafter: BlockDrafter, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [N, V] and confidences [N] of the rows that count, by the training path."""
    layout = lay_out(batch, drafter.gamma, drafter.config.window)
    hidden = drafter._train_hidden(batch, layout).flatten(0, 1)[layout.row_N]
    previous = batch.tokens_BT.flatten()[layout.drafted_XG - 1].flatten()[layout.row_N]
    embedded, markov = drafter._train_markov(hidden, previous, layout)
    logits = drafter.head().logits(hidden)
    if drafter.markov_head is not None:
        logits = logits + drafter.markov_head.markov_w2(markov)
    guess = torch.sigmoid(drafter.confidence_head(hidden, embedded)) if drafter.confidence_head else None
    return logits, guess


def packed_batch(batch: TrainBatch, lengths: tuple[int, ...]) -> TrainBatch:
    """The rows of `batch`, cut to `lengths`, as documents of one row with 3 places of padding after them."""
    total, room = sum(lengths), sum(lengths) + 3
    starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def join(rows: torch.Tensor, fill: int = 0) -> torch.Tensor:
        out = rows.new_full((1, room, *rows.shape[2:]), fill)
        out[0, :total] = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
        return out

    return TrainBatch(
        tokens_BT=join(batch.tokens_BT),
        loss_mask_BT=join(batch.loss_mask_BT),
        features_BTF=join(batch.features_BTF),
        last_hidden_BTH=join(batch.last_hidden_BTH),
        document_BT=join(torch.arange(len(lengths))[:, None].expand(-1, LENGTH), fill=-1),
        positions_BT=join(batch.positions_BT),
        anchors_BA=(batch.anchors_BA + torch.tensor(starts)[:, None]).flatten()[None],
        anchor_mask_BA=batch.anchor_mask_BA.flatten()[None],
        domain_BA=batch.domain_BA.flatten()[None],
        domains=batch.domains,
    )


def test_documents_of_one_row_do_not_see_each_other() -> None:
    """Packed and apart: the same loss, the same gradients; blocks end with their document."""
    drafter, batch = block_drafter().train(), random_batch()
    assert bool(batch.loss_mask_BT[0, 17])  # the first document's last token counts,
    lengths = (18, LENGTH)  # and the next document begins right after it
    apart = drafter.loss(batch, LossSettings())
    apart.loss_sum.backward()
    wanted = {n: p.grad.clone() for n, p in drafter.named_parameters() if p.grad is not None}
    drafter.zero_grad()
    packed = packed_batch(batch, lengths)
    # tokens of the second document that would count, were they of the first
    packed.loss_mask_BT[0, 18:20] = True
    together = drafter.loss(packed, LossSettings())
    together.loss_sum.backward()
    assert together.rows_N.tolist() == apart.rows_N.tolist()
    torch.testing.assert_close(together.loss_sum, apart.loss_sum, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.accept_N, apart.accept_N, atol=1e-5, rtol=1e-5)
    for name, parameter in drafter.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-4, msg=name)


def test_only_anchors_with_tokens_that_count_and_tokens_that_are_seen_are_kept() -> None:
    """What is not in the layout costs nothing: neither the backbone nor the head meets it."""
    batch = packed_batch(random_batch(), (18, LENGTH))
    # 17 ends its answer, 0 is padding
    batch = replace(batch, anchors_BA=torch.tensor([[6, 17, 0, 27, 30, 36]]))
    layout = lay_out(batch, 4, None)
    assert layout.anchor_X.tolist() == [6, 27, 30, 36]
    assert layout.block_X.tolist() == [0, 3, 4, 5]
    # the tokens before each document's last anchor
    assert layout.context_C.tolist() == [*range(6), *range(18, 36)]
    assert (layout.start_X.tolist(), layout.stop_X.tolist()) == ([0, 6, 6, 6], [6, 15, 18, 24])
    # the last block has one token left
    assert layout.row_N.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert layout.grid_N.tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    seen = lay_out(batch, 4, 5)
    assert seen.context_C.tolist() == [*range(1, 6), *range(22, 30), *range(31, 36)]
    assert (seen.start_X.tolist(), seen.stop_X.tolist()) == ([0, 5, 8, 13], [5, 10, 13, 18])


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_without_anything_to_learn_has_a_loss_of_zero(count: int) -> None:
    """A share of a larger batch may have no anchor at all; it must still reach backward."""
    drafter, batch = block_drafter().train(), random_batch()
    nothing = replace(batch, anchor_mask_BA=torch.zeros_like(batch.anchor_mask_BA))
    if count:
        nothing = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    report = drafter.loss(nothing, LossSettings())
    report.loss_sum.backward()
    assert float(report.loss_sum.detach()) == float(report.weight_sum) == 0 and len(report.rows_N) == 0
    assert all(p.grad is None or not p.grad.any() for p in drafter.parameters())


def test_bfloat16_changes_rounding_alone_and_leaves_the_rotary_table_in_float32() -> None:
    exact, rounded, batch = block_drafter().train(), block_drafter().bfloat16().train(), random_batch()
    assert torch.equal(exact._rope(2000), rounded._rope(2000))
    losses, gradients = [], []
    for drafter in (exact, rounded):
        report = drafter.loss(batch, LossSettings())
        report.loss_sum.backward()
        losses.append(float(report.loss_sum.detach()))
        gradients.append(drafter.layers[0].self_attn.q_proj.weight.grad.float().flatten())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.99


LOSSES = {
    "CE": LossSettings(ce=1, tv=0),
    "KL": LossSettings(ce=0, tv=0, kl=1),
    "LK": LossSettings(ce=0, tv=0, lk=1),
    "the paper's mix": LossSettings(),
    "D-PACE": LossSettings(ce=1, tv=0, weighting="dpace"),
}


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_every_loss_teaches_the_drafter_what_the_target_says(settings: LossSettings) -> None:
    """Sixty steps on one batch whose target is nearly certain of the tokens that follow."""
    drafter, batch = block_drafter().train(), random_batch()
    following = batch.tokens_BT.roll(-1, 1)
    sure = replace(
        batch, last_hidden_BTH=20 * torch.nn.functional.normalize(drafter.lm_head.weight, dim=-1)[following]
    )
    trained = [p for n, p in drafter.named_parameters() if not n.startswith(("embed_tokens", "lm_head"))]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    accepted = []
    for _ in range(60):
        report = drafter.loss(sure, settings)
        accepted.append(float(report.accept_N.mean()))
        (report.loss_sum / report.weight_sum).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accepted[0] < 0.3 < 0.9 < accepted[-1]


def test_the_chunks_of_the_loss_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, batch = block_drafter().train(), random_batch()
    whole = float(drafter.loss(batch, LossSettings()).loss_sum.detach())
    monkeypatch.setattr("draftkit.draft.losses.CHUNK_ROWS", 3)
    monkeypatch.setattr("draftkit.draft.losses.SLICE_LOGITS", 80)
    assert float(drafter.loss(batch, LossSettings()).loss_sum.detach()) == pytest.approx(whole, rel=1e-6)


def test_embedding_and_head_are_frozen() -> None:
    drafter = block_drafter()
    drafter.embed_tokens.requires_grad_(False)
    drafter.lm_head.requires_grad_(False)
    drafter.loss(random_batch(), LossSettings()).loss_sum.backward()
    assert drafter.embed_tokens.weight.grad is None
    assert drafter.lm_head.weight.grad is None
    fresh = BlockDrafter(CONFIG)
    assert not fresh.embed_tokens.weight.requires_grad
    assert not fresh.lm_head.weight.requires_grad


# --- checkpoints
