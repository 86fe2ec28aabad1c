"""Described rows against probabilities made in float64, at the sizes of real vocabularies, and proposals over
them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from draftkit.ops import sampling
from draftkit.ops.native_sampling import NativeProposals, NativeRows, native_rows
from draftkit.ops.sampling import DenseRows, Sampling, distributions, row_settings, sample
from draftkit.ops.verify import TOKEN_RULE, DenseProposals, length_distribution, verify
from draftkit.target.loading import load_target
from draftkit.target.tokenizer import load_tokenizer

VOCAB = 151_936
SETTINGS = {
    "greedy": Sampling(0.0),
    "plain": Sampling(1.0),
    "top-p": Sampling(0.7, top_p=0.9),
    "top-k and top-p": Sampling(0.7, top_k=20, top_p=0.8),
    "top-k": Sampling(1.3, top_k=1000),
    "min-p": Sampling(1.0, min_p=0.02),
    "all": Sampling(2.0, top_k=50, top_p=0.5, min_p=0.02),
    "k above the vocabulary": Sampling(1.0, top_k=10**9),
    "tiny top-p": Sampling(1.0, top_p=1e-9),
    "no top-p": Sampling(1.0, top_p=0.0),
    "whole min-p": Sampling(1.0, min_p=1.0),
    "cold": Sampling(1e-6),
    "cold top-p": Sampling(1e-6, top_p=0.9),
    "hot": Sampling(1e6),
    "hot top-k": Sampling(1e6, top_k=5),
}


def some_logits(rows: int, vocab: int, spread: float, seed: int = 0) -> Tensor:
    """Every seventh is whole, so that some are equal."""
    logits_NV = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    logits_NV[:, ::7] = logits_NV[:, ::7].round()
    return logits_NV


def described(logits_NV: Tensor, settings: list[Sampling]) -> NativeRows:
    rows = native_rows(logits_NV, row_settings(settings))
    assert rows is not None, "no C++ compiler"
    return rows


@pytest.fixture(scope="module")
def real_rows() -> Tensor:
    """Logits of the embedded target after some beginnings, peaked and flat ones, [4, V]."""
    target, tokenizer = load_target("tiny"), load_tokenizer("tiny")
    tokens = torch.tensor([tokenizer("def add(a, b):\n    return a + b\n\nThe answer is")["input_ids"]])
    with torch.inference_mode():
        read = target.forward(tokens, target.new_cache(), ())
        logits_TV = target.logits(read.last_hidden_BTH[0]).float()
    order = torch.softmax(logits_TV, -1).amax(-1).argsort()
    return logits_TV[order[torch.linspace(0, len(order) - 1, 4).long()]]


@pytest.fixture(params=["compiled", "PyTorch"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows by either way."""
    if request.param == "PyTorch":
        monkeypatch.setattr(sampling, "native_rows", lambda *_: None)
    return str(request.param)


@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("vocab", [5, 77, 300, VOCAB])
def test_described_rows_are_the_probabilities_made_in_float64(vocab: int, spread: float) -> None:
    logits_NV, settings = some_logits(len(SETTINGS), vocab, spread), list(SETTINGS.values())
    found_NV = described(logits_NV, settings).dense()
    wanted_NV = distributions(logits_NV.double(), row_settings(settings)).dense()
    for row, name in enumerate(SETTINGS):
        # mass at the cut
        assert int(((found_NV[row] > 0) != (wanted_NV[row] > 0)).sum()) <= 3 * (vocab == VOCAB), name
        torch.testing.assert_close(found_NV[row].double(), wanted_NV[row], atol=5e-6, rtol=2e-4)


def test_the_most_likely_alone_is_greedy_at_any_temperature(both: str) -> None:
    """The cut is on logits: divided by a million they would all be equal."""
    logits_NV = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    for setting in (
        Sampling(1e6, top_k=1),
        Sampling(1e-6, top_k=1),
        Sampling(1e6, top_p=0.0),
        Sampling(1e6, min_p=1.0),
    ):
        rows = distributions(logits_NV, row_settings([setting] * 4))
        assert rows.dense().argmax(-1).tolist() == logits_NV.argmax(-1).tolist()
        assert ((rows.dense() > 0).sum(-1) == 1).all()


def test_ties_at_the_cut(both: str) -> None:
    """Top-k and min-p keep all of them; top-p keeps those that it needs, the first ones."""
    logits_NV = torch.full((1, VOCAB), -50.0)
    logits_NV[0, [9, 700, 80_000, 151_935]] = 3.0
    logits_NV[0, 5] = 4.0
    weight = 1 / (np.e + 4)
    for setting, kept in (
        (Sampling(1.0, top_k=2), [5, 9, 700, 80_000, 151_935]),
        (Sampling(1.0, min_p=np.exp(-1.001)), [5, 9, 700, 80_000, 151_935]),
        (Sampling(1.0, top_p=(np.e + 1.5) * weight), [5, 9, 700]),
        (Sampling(1.0, top_k=3, top_p=(np.e + 2.5) * weight), [5, 9, 700, 80_000]),
        (Sampling(1.0, top_p=np.e * weight * 0.9), [5]),
    ):
        probs_V = distributions(logits_NV, row_settings([setting])).dense()[0]
        assert probs_V.nonzero().flatten().tolist() == kept, setting
        assert float(probs_V.sum()) == pytest.approx(1)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_rows_that_hold_no_numbers_give_a_token_that_there_is(both: str, setting: Sampling) -> None:
    """NaN counts as forbidden; where nothing finite is left, or something is infinite, all mass is on one
    token."""
    logits_NV = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(2))
    logits_NV[0] = float("nan")
    logits_NV[1] = float("-inf")
    logits_NV[2, 70_000] = float("inf")
    logits_NV[3, ::2] = float("nan")
    logits_NV[4, 1:] = float("-inf")
    rows = distributions(logits_NV, row_settings([setting] * 5))
    tokens = rows.draw(np.array([0.0, 0.5, 0.3, 0.999, 1 - 1e-16])).tolist()
    assert min(tokens) >= 0 and max(tokens) < VOCAB
    assert tokens[2] == 70_000 and tokens[3] % 2 == 1 and tokens[4] == 0
    probs_NV = rows.dense()
    assert torch.isfinite(probs_NV).all()
    torch.testing.assert_close(probs_NV.sum(-1), torch.ones(5), atol=1e-4, rtol=0)


def test_draws_follow_the_distribution_and_depend_on_their_row_alone() -> None:
    logits_NV, settings = (
        some_logits(3, VOCAB, 5.0),
        [Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(0.7, 20, 0.8)],
    )
    uniforms = np.linspace(0, 1, 400, endpoint=False)
    for row, setting in enumerate(settings):
        many = described(logits_NV[row].expand(len(uniforms), -1), [setting] * len(uniforms))
        tokens, chances = many.draw_with_chances(uniforms)
        probs_V = many.dense()[0]
        assert (probs_V[tokens] > 0).all()
        np.testing.assert_allclose(chances, probs_V[tokens].double(), rtol=1e-5)
        wanted = sample(probs_V.expand(len(uniforms), -1), torch.from_numpy(uniforms)).numpy()
        assert (tokens == wanted).mean() > 0.99, "but for sums in another order"
    beside = described(logits_NV, settings).draw(np.array([0.1, 0.6, 0.7]))
    alone = [
        described(logits_NV[i : i + 1], settings[i : i + 1]).draw(np.array([u]))
        for i, u in enumerate((0.1, 0.6, 0.7))
    ]
    assert beside.tolist() == torch.cat(alone).tolist()


def proposals(vocab: int, settings: list[Sampling], seed: int = 0) -> tuple[NativeProposals, DenseProposals]:
    """The same ragged proposals either way; p and q are like each other, as those of a drafter are."""
    requests, gamma = len(settings), 3
    lengths_R = np.arange(requests) % (gamma + 1)
    logits = some_logits(requests * (gamma + 1), vocab, 3.0, seed)
    p_logits_RGV = logits.view(requests, gamma + 1, vocab)
    q_logits = p_logits_RGV[:, :gamma].flatten(0, 1) + some_logits(requests * gamma, vocab, 0.5, seed + 1)
    p = described(p_logits_RGV.flatten(0, 1), [s for s in settings for _ in range(gamma + 1)])
    q = described(q_logits, [s for s in settings for _ in range(gamma)])
    tokens, chances = q.draw_with_chances(np.random.default_rng(seed).random(requests * gamma))
    tokens_RG = tokens.reshape(requests, gamma)
    native = NativeProposals(
        torch.cat([p_logits_RGV[r, : n + 1] for r, n in enumerate(lengths_R)]),
        row_settings(settings),
        lengths_R,
        tokens_RG,
        chances.reshape(requests, gamma),
        np.arange(requests) * gamma,
        q,
    )
    p_RGV = p.dense().double().view(requests, gamma + 1, vocab)
    q_RGV = q.dense().double().view(requests, gamma, vocab)
    return native, DenseProposals(torch.from_numpy(tokens_RG), p_RGV, q_RGV, torch.from_numpy(lengths_R))


@pytest.mark.slow
@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "taken for certain"])
@pytest.mark.parametrize("vocab", [13, 300, VOCAB])
def test_verdicts_in_described_rows_are_those_of_the_token_rule(vocab: int, certain: bool) -> None:
    names = ("plain", "top-p", "top-k and top-p", "greedy", "plain", "all", "top-p", "plain")
    native, dense = proposals(vocab, [SETTINGS[name] for name in names])
    if certain:
        native = replace(native, drafts=None, chances_RG=np.zeros_like(native.chances_RG))
        one_hot_RGV = torch.zeros_like(dense.q_RGV).scatter_(-1, dense.tokens_RG[..., None], 1.0)
        dense = replace(dense, q_RGV=one_hot_RGV)
    counted_RG, _ = length_distribution(TOKEN_RULE, dense)
    borders_RG = counted_RG.cumsum(-1)[:, :-1]
    same, seen = [], set[tuple[int, int]]()
    grid = np.linspace(0, 1, 101)[:-1]
    for first, second in zip(grid, np.random.default_rng(3).permutation(grid), strict=True):
        uniforms_R2 = np.array([[first, second]]).repeat(len(names), 0)
        accepted_R, next_R = native.verify(uniforms_R2)
        wanted = verify(TOKEN_RULE, dense, torch.from_numpy(uniforms_R2))
        clear_R = ((borders_RG - first).abs() > 1e-4).all(-1).numpy() | (native.lengths_R == 0)
        assert (accepted_R == wanted.accepted_R.numpy())[clear_R].all()
        same += (next_R == wanted.next_token_R.numpy())[clear_R].tolist()
        seen |= {*zip(native.lengths_R.tolist(), accepted_R.tolist(), strict=True)}
    assert np.mean(same) > 0.99, "but for sums in another order"
    assert {(3, 0), (3, 3), (1, 1), (0, 0)} <= seen or certain


def test_a_row_is_only_looked_at_when_it_is_reached() -> None:
    """A refused first token: what the rows after it hold does not matter, and costs nothing."""
    native, _ = proposals(300, [SETTINGS["top-k and top-p"]] * 4)  # the least likely token never comes
    uniforms_R2 = np.full((4, 2), 1 - 2**-53)
    refused = replace(native, tokens_RG=native.tokens_RG.copy())
    refused.tokens_RG[3, 0] = int(native.logits_NV[6].argmin())
    first = refused.verify(uniforms_R2)
    refused.logits_NV[7:] = float("nan")
    for before, after in zip(first, refused.verify(uniforms_R2), strict=True):
        assert before[3] == after[3]
    assert first[0][3] == 0


@pytest.mark.slow
def test_the_first_token_of_a_round_has_the_targets_distribution_on_a_real_row() -> None:
    """Chi-square over many verdicts: drawn from q, verified, the residual's token where it was refused."""
    count, vocab, setting = 20_000, 49_152, Sampling(0.8, top_k=40, top_p=0.95)
    p_logits_V, noise_V = some_logits(2, vocab, 3.0, seed=5)
    p_logits_V[:40] += 8
    q = described((p_logits_V + noise_V / 3)[None], [setting])
    uniforms = np.random.default_rng(7).random((count, 3))
    q_V = q.dense()[0].double()
    drafted = sample(q_V.expand(count, -1), torch.from_numpy(uniforms[:, 0])).numpy()
    chances = q_V.numpy()[drafted]
    firsts = []
    for rows in np.split(np.arange(count), 20):
        many, zeros = len(rows), np.zeros(len(rows), np.int64)
        accepted, following = NativeProposals(
            p_logits_V.expand(2 * many, -1),
            row_settings([setting] * many),
            zeros + 1,
            drafted[rows, None],
            chances[rows, None],
            zeros,
            q,
        ).verify(uniforms[rows, 1:])
        firsts.append((np.where(accepted > 0, drafted[rows], following), accepted))
    first, accepted = (torch.from_numpy(np.concatenate(a)) for a in zip(*firsts, strict=True))
    probs_V = described(p_logits_V[None], [setting]).dense()[0].double()
    kept = probs_V.nonzero().flatten()
    expected = probs_V[kept] * count
    found = torch.bincount(first, minlength=vocab)
    assert int(found.sum() - found[kept].sum()) == 0
    statistic, freedom = float(((found[kept] - expected) ** 2 / expected).sum()), len(kept) - 1
    assert 0.2 < float((accepted > 0).double().mean()) < 0.98, "both ways are taken"
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["plain", "top-p", "top-k and top-p", "min-p"])
def test_both_ways_draw_from_one_distribution_on_real_rows(name: str, real_rows: Tensor) -> None:
    """Two-sample chi-square of 20,000 draws each, over the tokens that came five times at least."""
    count, settings = 20_000, row_settings([SETTINGS[name]])
    for row, logits_V in enumerate(real_rows):
        first, second = np.random.default_rng(row).random((2, count))
        described_rows = described(logits_V.expand(count, -1), [SETTINGS[name]] * count)
        made_V = sampling._processed(logits_V[None], settings)[0]
        drawn = torch.searchsorted(made_V.double().cumsum(0), torch.from_numpy(second), right=True)
        counts = [
            torch.bincount(tokens, minlength=len(logits_V))
            for tokens in (described_rows.draw(first), drawn.clamp_max(len(logits_V) - 1))
        ]
        both = (counts[0] + counts[1]).double()
        often = both >= 10
        statistic = float(((counts[0] - counts[1])[often].double() ** 2 / both[often]).sum())
        freedom = int(often.sum()) - 1
        assert statistic < freedom + 5 * (2 * max(freedom, 1)) ** 0.5
        assert int(counts[0][made_V == 0].sum()) == 0


def test_rows_over_fewer_columns_stand_for_the_tokens_they_name() -> None:
    """A reduced draft vocabulary: q is 0 outside it, in probabilities and in residuals."""
    vocab, ids_C = 300, torch.arange(1, 300, 3)
    q_logits, p_logits = some_logits(4, len(ids_C), 2.0), some_logits(4, vocab, 2.0, seed=3)
    own = described(q_logits, [Sampling(1.0)] * 4)
    q = NativeRows(own.library, q_logits, *own._kept[1:3], ids_C, vocab)
    wide = torch.full((4, vocab), float("-inf")).index_copy_(1, ids_C, q_logits)
    torch.testing.assert_close(q.dense(), torch.softmax(wide, -1))
    residual = (described(p_logits, [Sampling(0.9)] * 4).dense() - q.dense()).clamp_min(0)
    never, zeros = q.dense().argmin(-1, keepdim=True).numpy(), np.zeros((4, 1))
    for u in (0.05, 0.4, 0.77):
        verdict = NativeProposals(
            p_logits.repeat_interleave(2, 0),
            row_settings([Sampling(0.9)] * 4),
            np.ones(4, np.int64),
            never,
            zeros,
            np.arange(4),
            q,
        ).verify(np.full((4, 2), u))
        assert verdict[0].tolist() == [0] * 4
        assert verdict[1].tolist() == DenseRows(residual).draw(np.full(4, u)).tolist()


def test_a_row_without_a_number_above_minus_infinity_is_its_first_token() -> None:
    logits_NV = torch.tensor([[float("nan"), float("-inf"), float("-inf")]])
    settings = row_settings([Sampling(1.0)])
    assert described(logits_NV, [Sampling(1.0)]).dense().tolist() == [[1.0, 0.0, 0.0]]
    assert sampling._processed(logits_NV, settings).tolist() == [[1.0, 0.0, 0.0]]
