"""The parts of a training step that are compiled on GPUs, compiled here for the CPU: the same losses, no
compilation for each length, and steps that go on where nothing can be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from draftkit.draft import losses
from draftkit.draft.drafter import Drafter, TrainBatch
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.features.source import FeatureSample
from draftkit.ops import attention, compiled
from draftkit.settings import LossSettings
from draftkit.train.batches import choose_anchors, collate
from support.drafters import EAGLE_CONFIG, block_drafter

STEPS = 5
SETTINGS = LossSettings(kl=0.2)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that was compiled stays."""
    yield
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


def drafter_of(algorithm: str) -> Drafter:
    if algorithm == "dspark":  # of two layers: compiled once, not once for each
        return block_drafter().train()
    torch.manual_seed(0)
    drafter = EagleDrafter(EAGLE_CONFIG)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter.train()


def batch(step: int) -> TrainBatch:
    """Conversations of other lengths in each step."""
    generator, rows, anchors = torch.Generator().manual_seed(step), [], []
    for length in (11 + 3 * step, 23 - step):
        tokens = torch.randint(0, 40, (length,), generator=generator)
        mask = torch.arange(length) >= 4 + step % 3
        vectors = (torch.randn(length, width, generator=generator) for width in (32, 16))
        rows.append([FeatureSample("", "all", tokens, mask, *vectors)])
        anchors.append([choose_anchors(mask, 6, step)])
    return collate(rows, anchors, ("all",))


def train(algorithm: str, seen: Any = lambda: 0) -> tuple[list[float], list[int]]:
    """The losses of some steps, and what `seen` says after each."""
    drafter = drafter_of(algorithm)
    optimizer = torch.optim.SGD([p for p in drafter.parameters() if p.requires_grad], lr=0.02)
    found, after = [], []
    for step in range(STEPS):
        report = drafter.loss(batch(step), SETTINGS)
        loss = report.loss_sum / report.weight_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
        after.append(seen())
    return found, after


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Compile for the CPU; neither attention nor losses in C++, which a GPU does not have."""
    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr(compiled, "compiles_on", lambda kind: True)
    monkeypatch.setattr(losses, "native_fits", lambda *_: False)
    monkeypatch.setattr(attention, "native_fits", lambda *_: False)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dspark", "eagle3"])
def test_compiled_steps_have_the_losses_of_others_and_compile_once(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = train(algorithm)
    counter = CompileCounterWithBackend("inductor")
    as_on_a_gpu(monkeypatch, counter)
    found, frames = train(algorithm, lambda: counter.frame_count)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert wanted[-1] != wanted[0]
    assert frames[0] >= 4, "queries, keys, what follows attention, and the losses"
    assert frames[-1] == frames[1], f"compiled again for other lengths: {frames}"


def test_what_cannot_be_compiled_is_told_once_and_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, _ = train("dspark")

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler\nand much more")

    as_on_a_gpu(monkeypatch, broken)
    found, _ = train("dspark")
    assert found == pytest.approx(wanted, abs=1e-5)
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be compiled here" in line]
    assert len(told) == len(set(told)) == 4, told
    assert all("no compiler" in line for line in told)


def test_a_backward_that_cannot_be_compiled_is_told_like_a_forward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no backward")

    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)
    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr(compiled, "compiles_on", lambda kind: True)
    x = torch.arange(3.0, requires_grad=True)
    compiled.for_device(cubed, torch.device("cuda"))(x).backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 3.0, 12.0]
    assert "cubed cannot be compiled here (no backward)" in capsys.readouterr().err


def cubed(x: torch.Tensor) -> torch.Tensor:
    return (x**3).sum()


def test_a_machine_without_a_compiler_is_found_out_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nsee the manual")

    monkeypatch.setattr(torch, "compile", missing)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)  # on a GPU, which is not here
    compiled.compiles_on.cache_clear()
    assert not compiled.compiles_on("cuda") and not compiled.compiles_on("cpu")
    compiled.compiles_on.cache_clear()
    told = "train: a step cannot be compiled here (no C++ compiler); goes on as it is, slower\n"
    assert capsys.readouterr().err == told
