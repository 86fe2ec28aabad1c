"""Described rows against probabilities made in float64, at the sizes of real vocabularies, and proposals over
them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from draftkit.ops import sampling
from draftkit.ops.native_sampling import NativeRows, native_rows
from draftkit.ops.sampling import DenseRows, Sampling, distributions, row_settings, sample
from draftkit.ops.verify import RULES, DenseProposals, NativeProposals, Rule, length_distribution, verify
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
    rows_N = torch.cat([p_logits_RGV[r, : n + 1] for r, n in enumerate(lengths_R)])
    p = described(rows_N, [s for s, n in zip(settings, lengths_R, strict=True) for _ in range(n + 1)])
    q = described(q_logits, [s for s in settings for _ in range(gamma)])
    tokens, chances = q.draw_with_chances(np.random.default_rng(seed).random(requests * gamma))
    tokens_RG, first_R = tokens.reshape(requests, gamma), (lengths_R + 1).cumsum() - lengths_R - 1
    native = NativeProposals(
        tokens_RG,
        chances.reshape(requests, gamma),
        p,
        first_R,
        q,
        np.arange(requests) * gamma,
        torch.from_numpy(lengths_R),
    )
    cells = first_R[:, None] + np.minimum(np.arange(gamma + 1), lengths_R[:, None])
    p_RGV, q_RGV = p.dense().double()[cells], q.dense().double().view(requests, gamma, vocab)
    return native, DenseProposals(torch.from_numpy(tokens_RG), p_RGV, q_RGV, native.lengths_R)


@pytest.mark.parametrize("vocab", [13, 300, VOCAB])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_rule_finds_the_same_in_described_rows(rule: Rule, vocab: int) -> None:
    names = ("plain", "top-p", "top-k and top-p", "greedy", "plain", "all", "top-p", "plain")
    native, dense = proposals(vocab, [SETTINGS[name] for name in names])
    found_RG, weights_RG = length_distribution(rule, native)
    wanted_RG, wanted_weights_RG = length_distribution(rule, dense)
    torch.testing.assert_close(found_RG, wanted_RG, atol=2e-5, rtol=1e-4)
    verified_RG = torch.arange(4) <= native.lengths_R[:, None]
    torch.testing.assert_close(weights_RG[verified_RG], wanted_weights_RG[verified_RG], atol=2e-5, rtol=1e-4)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1] + 1e-4
    for accepted in range(4):
        reached_R = torch.minimum(torch.full_like(native.lengths_R, accepted), native.lengths_R)
        weights_R = wanted_weights_RG.gather(1, reached_R[:, None]).squeeze(1)
        same = [
            native.draw(reached_R, weights_R, u.expand(len(names)))
            == dense.draw(reached_R, weights_R, u.expand(len(names)))
            for u in grid
        ]
        assert torch.stack(same).double().mean() > 0.99


def test_the_first_token_of_a_round_has_the_targets_distribution_on_a_real_row() -> None:
    """Chi-square over many verdicts: drawn from q, verified, the residual's token where it was refused;
    beside the old way."""
    count, vocab, setting = 20_000, 49_152, Sampling(0.8, top_k=40, top_p=0.95)
    p_logits_V, noise_V = some_logits(2, vocab, 3.0, seed=5)
    p_logits_V[:40] += 8
    q_logits_V = p_logits_V + noise_V / 3
    p = described(torch.stack([p_logits_V, p_logits_V]), [setting] * 2)
    q = described(q_logits_V[None], [setting])
    uniforms = torch.from_numpy(np.random.default_rng(7).random((count, 3)))
    drafted = sample(q.dense().expand(count, -1), uniforms[:, 0])
    chances = q.chances(np.zeros(count, np.int64), drafted.numpy())
    lengths_R, zeros = torch.ones(count, dtype=torch.int64), np.zeros(count, np.int64)
    native = NativeProposals(drafted[:, None].numpy(), chances[:, None], p, zeros, q, zeros, lengths_R)
    verdict = verify(RULES["token"], native, uniforms[:, 1:])
    first = torch.where(verdict.accepted_R > 0, drafted, verdict.next_token_R)
    probs_V = p.dense()[0].double()
    kept = probs_V.nonzero().flatten()
    expected = probs_V[kept] * count
    found = torch.bincount(first, minlength=vocab)
    assert int(found.sum() - found[kept].sum()) == 0
    statistic, freedom = float(((found[kept] - expected) ** 2 / expected).sum()), len(kept) - 1
    assert 0.2 < float((verdict.accepted_R > 0).double().mean()) < 0.98, "both ways are taken"
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
    q = NativeRows(own._library, q_logits, *own._kept[1:3], ids_C, vocab)
    wide = torch.full((4, vocab), float("-inf")).index_copy_(1, ids_C, q_logits)
    torch.testing.assert_close(q.dense(), torch.softmax(wide, -1))
    p = described(p_logits, [Sampling(0.9)] * 4)
    places, weights = np.arange(4), np.array([1.0, 0.7, 0.4, 1.0])
    residual = (torch.from_numpy(weights)[:, None] * p.dense() - q.dense()).clamp_min(0)
    np.testing.assert_allclose(p.residual_sums(places, q, places, weights), residual.sum(-1), rtol=1e-5)
    for u in (0.05, 0.4, 0.77):
        uniforms = np.full(4, u)
        drawn = p.draw_residuals(places, q, places, weights, uniforms)
        assert drawn.tolist() == DenseRows(residual).draw(uniforms).tolist()
