"""The chunked losses: values and gradients are those of the plain formulas, in any chunks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from draftkit.config import load_recipe
from draftkit.draft import losses
from draftkit.draft.loss_chunks import cut_rows
from draftkit.draft.loss_terms import dpace_weights
from draftkit.draft.losses import Head, Rows, distillation_loss
from draftkit.errors import ConfigError
from draftkit.ops.native_training import native_fits, training_library
from draftkit.settings import LossSettings
from support.loss_rows import GAMMA, GRID, HIDDEN, TERMS, VOCABULARY, make_rows


def plain(rows: Rows, settings: LossSettings) -> Tensor:
    """All terms by whole softmaxes and autograd; weights by python loops."""

    def capped(x: Tensor, head: Head) -> Tensor:
        raw = head.scale * x @ head.weight_VH.T
        return raw if head.soft_cap is None else head.soft_cap * torch.tanh(raw / head.soft_cap)

    logits = capped(rows.hidden_NH, rows.head)
    if rows.markov is not None:
        logits = logits + rows.markov[0] @ rows.markov[1].T
    q, p = torch.softmax(logits, -1), torch.softmax(capped(rows.target_hidden_NH, rows.target_head), -1)
    own = q.gather(1, rows.tokens_N[:, None])[:, 0]
    ce, tv, kl = -own.log(), (q - p).abs().sum(-1), (p * (p / q).log()).sum(-1)
    share = torch.exp(-3 * (1 - tv / 2)).detach()
    lk = share * kl + (1 - share) * tv / 2
    weights = [math.exp(-(cell % GAMMA) / settings.decay) for cell in rows.grid_N.tolist()]
    if settings.weighting == "dpace":
        weights = plain_dpace(own.tolist(), rows.grid_N.tolist())
    terms = settings.ce * ce + settings.tv * tv + settings.kl * kl + settings.lk * lk
    return (torch.tensor(weights, dtype=terms.dtype) * terms).sum()


def plain_dpace(own: list[float], cells: list[int]) -> list[float]:
    out = []
    for cell in cells:
        block = [i for i, other in enumerate(cells) if other // GAMMA == cell // GAMMA]
        k = cell % GAMMA
        out.append(sum(math.prod(0.5 * own[i] + 0.5 for i in block[: m + 1]) for m in range(k, len(block))))
    return out


def gradients_of(rows: Rows) -> list[Tensor]:
    out = []
    for tensor in (rows.hidden_NH, *(rows.markov or ())):
        assert tensor.grad is not None
        out.append(tensor.grad.clone())
        tensor.grad = None
    return out


@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_every_term_and_its_gradients_equal_the_plain_formula(
    settings: LossSettings, soft_cap: float | None
) -> None:
    rows = make_rows(soft_cap=soft_cap, scale=0.7)
    (3 * distillation_loss(rows, settings).loss).backward()
    found = gradients_of(rows)
    loss = plain(rows, settings)
    (3 * loss).backward()
    # w_k is float32
    torch.testing.assert_close(distillation_loss(rows, settings).loss, loss, atol=1e-7, rtol=1e-7)
    for mine, autograd in zip(found, gradients_of(rows), strict=True):
        torch.testing.assert_close(mine, autograd, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_the_cpp_functions_equal_the_plain_formula(
    settings: LossSettings, soft_cap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take float32 and a vocabulary of whole vectors; rows share target states."""
    monkeypatch.setattr(losses, "terms_and_gradient", None)  # the operations
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    shared = torch.tensor([0, *range(len(GRID) - 1)])
    rows, exact = (
        replace(made, target_hidden_NH=made.target_hidden_NH[shared], place_N=shared)
        for made in (make_rows(dtype, soft_cap, vocabulary=40) for dtype in (torch.float32, torch.float64))
    )
    found = distillation_loss(rows, settings)
    (3 * found.loss).backward()
    loss = plain(exact, settings)
    (3 * loss).backward()
    torch.testing.assert_close(found.loss.double(), loss, atol=1e-5, rtol=1e-5)
    for mine, autograd in zip(gradients_of(rows), gradients_of(exact), strict=True):
        torch.testing.assert_close(mine.double(), autograd, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [TERMS["all at once"], TERMS["D-PACE on all"]], ids=["fixed weights", "D-PACE"]
)
@pytest.mark.parametrize(
    ("chunk", "piece"), [(1, 1), (7, 25 * VOCABULARY), (10, 5 * VOCABULARY), (1000, 1000 * VOCABULARY)]
)
def test_chunks_and_slices_change_nothing(
    settings: LossSettings, chunk: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows()
    distillation_loss(rows, settings).loss.backward()
    wanted = gradients_of(rows)
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(losses, "SLICE_LOGITS", piece)
    chunks = cut_rows(rows.grid_N, rows.place_N, GAMMA, chunk, piece // VOCABULARY).parts
    sizes = [c.rows.stop - c.rows.start for c in chunks]
    assert sum(sizes) == len(GRID) and (len(sizes) > 1) is (chunk < 1000)
    distillation_loss(rows, settings).loss.backward()
    for mine, whole in zip(gradients_of(rows), wanted, strict=True):
        torch.testing.assert_close(mine, whole, atol=1e-12, rtol=1e-12)


def test_a_base_alone_works_as_well() -> None:
    rows, settings = replace(make_rows(), markov=None), TERMS["all at once"]
    distillation_loss(rows, settings).loss.backward()
    found = gradients_of(rows)
    plain(rows, settings).backward()
    torch.testing.assert_close(found, gradients_of(rows), atol=1e-8, rtol=1e-6)


def test_row_values_are_the_textbook_ones_and_carry_no_gradient() -> None:
    rows = make_rows()
    found = distillation_loss(rows, LossSettings(kl=0.1))
    logits = rows.hidden_NH @ rows.head.weight_VH.T + rows.markov[0] @ rows.markov[1].T
    q, p = torch.softmax(logits, -1), torch.softmax(rows.target_hidden_NH @ rows.target_head.weight_VH.T, -1)
    torch.testing.assert_close(found.accept_N, torch.minimum(q, p).sum(-1).detach())
    torch.testing.assert_close(
        found.ce_N, torch.nn.functional.cross_entropy(logits, rows.tokens_N, reduction="none").detach()
    )
    torch.testing.assert_close(
        found.kl_N, torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1).detach()
    )
    assert not (found.accept_N.requires_grad or found.ce_N.requires_grad or found.kl_N.requires_grad)
    with torch.no_grad():
        again = distillation_loss(rows, LossSettings(kl=0.1))
    torch.testing.assert_close(again.loss, found.loss.detach())


def test_bfloat16_rows_are_reduced_in_float32() -> None:
    """The loss of bfloat16 inputs is that of the same numbers in float64 but for the rounding of the
    logits."""
    rows = make_rows(torch.bfloat16)
    found = distillation_loss(rows, LossSettings())
    assert found.loss.dtype == found.ce_N.dtype == torch.float32
    found.loss.backward()
    assert rows.markov is not None
    assert rows.markov[1].grad is not None and rows.markov[1].grad.dtype == torch.bfloat16
    exact = plain(
        replace(
            rows,
            hidden_NH=rows.hidden_NH.double(),
            head=Head(rows.head.weight_VH.double()),
            target_head=Head(rows.head.weight_VH.double()),
            target_hidden_NH=rows.target_hidden_NH.double(),
            markov=(rows.markov[0].double(), rows.markov[1].double()),
        ),
        LossSettings(),
    )
    assert float(found.loss.detach()) == pytest.approx(float(exact.detach()), rel=5e-3)


def test_dpace_gives_a_sure_prefix_more_weight_and_later_places_what_they_can_still_gain() -> None:
    """By hand for one block: confidences 1, 0.5, 1 (smoothed from 1, 0, 1) gain 1, 0.5, 0.5 tokens."""
    ce = torch.tensor([0.0, float("inf"), 0.0])
    assert dpace_weights(ce, torch.arange(3), 3).tolist() == pytest.approx([2.0, 1.0, 0.5])
    cut = dpace_weights(ce[:2], torch.tensor([9, 10]), 3)  # the same block without its last token
    assert cut.tolist() == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize("chunk", [7, 1000])
def test_rows_that_share_a_target_state_share_its_logits_and_nothing_else(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlapping blocks: the head meets each state once per chunk, and nothing changes."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    place_N = torch.tensor([7, 3, 7, 9, 3, 7, 1, 2, 9, 9, 3, 1, 5, 5, 2, 7])
    rows = make_rows()
    states = rows.target_hidden_NH[place_N]
    apart, shared = (
        replace(rows, target_hidden_NH=states),
        replace(rows, target_hidden_NH=states, place_N=place_N),
    )
    wanted = distillation_loss(apart, TERMS["D-PACE on all"])
    wanted.loss.backward()
    gradients = gradients_of(rows)
    met: list[int] = []
    original = Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, x: met.append(len(x)) or original(head, x))
    found = distillation_loss(shared, TERMS["D-PACE on all"])
    found.loss.backward()
    # draft and target in turn
    assert sum(met[1::2]) == (6 if chunk == 1000 else 13) < len(place_N) == sum(met[::2])
    torch.testing.assert_close((found.loss, found.tv_N, found.kl_N), (wanted.loss, wanted.tv_N, wanted.kl_N))
    for mine, whole in zip(gradients_of(rows), gradients, strict=True):
        torch.testing.assert_close(mine, whole, atol=1e-12, rtol=1e-12)


def test_gradients_can_be_used_once() -> None:
    rows = make_rows()
    loss = distillation_loss(rows, LossSettings()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_no_rows_give_no_loss_and_no_gradients() -> None:
    rows = make_rows()
    empty = replace(
        rows,
        hidden_NH=torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True),
        markov=None,
        target_hidden_NH=rows.target_hidden_NH[:0],
        tokens_N=rows.tokens_N[:0],
        grid_N=rows.grid_N[:0],
        place_N=rows.place_N[:0],
    )
    found = distillation_loss(empty, LossSettings())
    found.loss.backward()
    assert float(found.loss.detach()) == 0 and found.accept_N.shape == (0,)


def test_a_recipe_without_any_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.loss: must give one of ce, tv, kl, lk more than 0"):
        load_recipe("tiny-dspark", ["train.loss.ce=0", "train.loss.tv=0"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["PyTorch", "C++"])
@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS.keys())
def test_a_reduced_vocabulary_has_the_targets_mass_outside_it_as_distance(
    settings: LossSettings, dtype: torch.dtype
) -> None:
    """Against whole softmaxes with q = 0 outside; KL inside alone, no CE where the token lies outside. C++
    functions take float32 rows of a multiple of 8 numbers, where there is a compiler."""
    whole, ids = make_rows(dtype), torch.tensor([0, 3, 4, 9, 11, 12, 17, 20])
    counted = torch.full((VOCABULARY,), -1).index_copy(0, ids, torch.arange(len(ids)))
    rows = replace(
        whole,
        head=Head(whole.head.weight_VH[ids]),
        markov=None,
        tokens_N=counted[whole.tokens_N],
        draft_ids_W=ids,
    )
    assert native_fits(len(ids), whole.hidden_NH) == (
        dtype == torch.float32 and training_library() is not None
    )
    out = distillation_loss(rows, settings)
    (found,) = torch.autograd.grad(out.loss, [whole.hidden_NH])

    q = torch.softmax(whole.hidden_NH @ whole.head.weight_VH[ids].T, -1)
    p = torch.softmax(whole.target_hidden_NH @ whole.target_head.weight_VH.T, -1)
    tv = (q - p[:, ids]).abs().sum(-1) + 1 - p[:, ids].sum(-1)
    inside = p[:, ids] / p[:, ids].sum(-1, keepdim=True)
    kl = (inside * (inside / q).log()).sum(-1)
    own = torch.stack([q[n, i] if i >= 0 else q.new_zeros(()) for n, i in enumerate(rows.tokens_N.tolist())])
    assert 0 < int((rows.tokens_N >= 0).sum()) < len(own)
    ce = torch.where(own > 0, -own.clamp_min(1e-30).log(), 0.0)
    share = torch.exp(-3 * (1 - tv / 2)).detach()
    weights = [math.exp(-(cell % GAMMA) / settings.decay) for cell in rows.grid_N.tolist()]
    if settings.weighting == "dpace":
        weights = plain_dpace(own.tolist(), rows.grid_N.tolist())
    terms = (
        settings.ce * ce
        + settings.tv * tv
        + settings.kl * kl
        + settings.lk * (share * kl + (1 - share) * tv / 2)
    )
    loss = (torch.tensor(weights, dtype=dtype) * terms).sum()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.accept_N, (1 - tv / 2).detach())
    wanted = torch.autograd.grad(loss, [whole.hidden_NH])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("settings", [TERMS["CE"], TERMS["D-PACE"]], ids=["CE", "D-PACE"])
@pytest.mark.parametrize("reduced", [False, True])
def test_cross_entropy_needs_no_target(settings: LossSettings, reduced: bool) -> None:
    rows = make_rows(soft_cap=1.5)
    if reduced:
        rows = replace(rows, tokens_N=rows.tokens_N.where(rows.tokens_N % 3 > 0, -1))
    compared = distillation_loss(rows, settings)
    compared.loss.backward()
    wanted = gradients_of(rows)
    alone = distillation_loss(replace(rows, target_hidden_NH=rows.target_hidden_NH[:, :0]), settings)
    alone.loss.backward()
    torch.testing.assert_close(alone.loss, compared.loss)
    for found, value in zip(gradients_of(rows), wanted, strict=True):
        torch.testing.assert_close(found, value)
    ones = torch.ones_like(alone.ce_N)
    assert alone.sums(ones).keys() == {"ce"} and compared.sums(ones).keys() == {"ce", "tv", "kl"}
    assert alone.accept_N.isnan().all(), "nobody can take it for a rate"
