"""The host waits for the device a few times in a loss, however many chunks it has: counted where it would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from draftkit.draft import loss_terms, losses
from draftkit.draft.loss_chunks import cut_rows
from draftkit.draft.losses import Rows, distillation_loss
from draftkit.settings import LossSettings
from support.loss_rows import GAMMA, TERMS, VOCABULARY, make_rows

METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
# operations whose output's size depends on numbers: a device has to tell it to the host
SIZED = ("_local_scalar_dense", "nonzero", "_unique", "unique_dim", "unique_consecutive", "masked_select")
SIZED += ("is_nonzero", "equal", "repeat_interleave", "bincount")


class Waits(TorchDispatchMode):
    """Counts what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        if name.startswith(SIZED) or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits_of(rows: Rows, settings: LossSettings, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    counter = Waits()
    with monkeypatch.context() as patch, counter:
        for method in METHODS:
            original = getattr(torch.Tensor, method)

            def counted(self: torch.Tensor, *args: Any, of: Any = original, by: str = method) -> Any:
                counter.seen.append(by)
                return of(self, *args)

            patch.setattr(torch.Tensor, method, counted)
        distillation_loss(rows, settings).loss.backward()
    return counter.seen


@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("kind", ["whole", "reduced", "tokens alone"])
def test_waits_do_not_grow_with_the_chunks(
    settings: LossSettings, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows()
    if kind == "reduced":
        part = torch.arange(VOCABULARY - 4)
        head = replace(rows.head, weight_VH=rows.head.weight_VH[: VOCABULARY - 4])
        assert rows.markov is not None
        markov = rows.markov[0], rows.markov[1].detach()[: VOCABULARY - 4].requires_grad_()
        rows = replace(rows, head=head, markov=markov, draft_ids_W=part, tokens_N=rows.tokens_N % 19)
    if kind == "tokens alone":
        rows = replace(rows, target_hidden_NH=rows.target_hidden_NH[:, :0])
        settings = replace(settings, ce=1.0, tv=0.0, kl=0.0, lk=0.0)
    few = waits_of(rows, settings, monkeypatch)
    monkeypatch.setattr(losses, "CHUNK_ROWS", GAMMA)
    chunks = cut_rows(rows.grid_N, rows.place_N, GAMMA, GAMMA, GAMMA).parts
    monkeypatch.setattr(losses, "SLICE_LOGITS", GAMMA * VOCABULARY)
    many = waits_of(rows, settings, monkeypatch)
    assert len(chunks) == 6
    assert many == few and 0 < len(few) <= 6, few


def test_the_counter_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more wait in each chunk is seen."""
    original = loss_terms.row_values

    def waiting(*args: Any) -> torch.Tensor:
        found: torch.Tensor = original(*args)
        assert float(found.sum()) > 0
        return found

    monkeypatch.setattr(loss_terms, "row_values", waiting)
    few = waits_of(make_rows(), LossSettings(), monkeypatch)
    monkeypatch.setattr(losses, "CHUNK_ROWS", GAMMA)
    monkeypatch.setattr(losses, "SLICE_LOGITS", GAMMA * VOCABULARY)
    assert len(waits_of(make_rows(), LossSettings(), monkeypatch)) > len(few) + 4
