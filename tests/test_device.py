"""Every stage on a device that is not the CPU gives what it gives on the CPU, and mixes no tensors of the
two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftkit.data.conversations import Conversation, Message
from draftkit.data.padded_answers import PaddedAnswers
from draftkit.decode import decode
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import open_drafter, save_drafter
from draftkit.draft.drafter import Drafter
from draftkit.draft.warm_start import start_from_target
from draftkit.engine.answers import decode_all, sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.evaluate.profile import ProfileSettings, profile
from draftkit.evaluate.run import EvalPrompt, evaluate
from draftkit.features.store import FeatureStore
from draftkit.ops.sampling import Sampling
from draftkit.schedule.record import TraceItem, TraceSettings, record_traces
from draftkit.settings import CaptureSettings, EvaluateSettings, GenerateSettings
from draftkit.target.loading import load_target
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter, make_eagle
from support.elsewhere import DEVICE, elsewhere
from support.stores import capture_by

PROMPTS = [(1, 2, 3), (4, 5, 6, 7, 8), (9,) * 20]
SAMPLINGS = [Sampling(), Sampling(0.8, top_k=9, top_p=0.9, min_p=0.01)]


@pytest.fixture
def there(target_folder: Path) -> Iterator[TransformersTarget]:
    """The small target on the other device."""
    with elsewhere():
        yield load_target(str(target_folder), dtype="float64", device=DEVICE)


def drafters(target: TransformersTarget) -> list[Drafter]:
    """A DSpark and an EAGLE-3 drafter, on the CPU."""
    return [make_drafter(target), make_eagle(target, (5, 7, 9))]


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with elsewhere():
        mine = torch.tensor([1.0, 2.0], device=DEVICE)
        assert (mine * 2 + torch.ones(2, device=DEVICE)).cpu().tolist() == [3, 5]
        assert mine[torch.tensor([1])].device == mine.device  # indices may come from the CPU
        with pytest.raises(RuntimeError, match="same device"):
            mine + torch.ones(2)
        with pytest.raises(TypeError, match="numpy"):
            mine.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_the_loop_and_the_engine_answer_alike(
    target: TransformersTarget, there: TransformersTarget, sampling: Sampling
) -> None:
    for drafter in drafters(target):
        wanted = [decode(target, drafter, prompt, sampling, 7, seed=3).tokens for prompt in PROMPTS]
        engine = Engine(target, drafter, EngineSettings(plan="fixed", max_length=64))
        asked = [(prompt, sampling_params(sampling, 7, 3)) for prompt in PROMPTS]
        in_batch = [d.tokens for d in decode_all(engine, asked)]
        moved = drafter.to(there.device).eval()
        assert [decode(there, moved, prompt, sampling, 7, seed=3).tokens for prompt in PROMPTS] == wanted
        for plan in ("fixed", "planned"):
            engine = Engine(there, moved, EngineSettings(plan=plan, max_length=64))  # type: ignore[arg-type]
            assert [d.tokens for d in decode_all(engine, asked)] == in_batch


@pytest.mark.slow
def test_traces_answers_and_features_are_the_same(
    target: TransformersTarget, there: TransformersTarget, target_folder: Path, tmp_path: Path
) -> None:
    settings = GenerateSettings(max_new_tokens=6, batch_size=3)
    seeds = [(0, i) for i in range(len(PROMPTS))]
    answers = PaddedAnswers(target, 3)(PROMPTS, seeds, settings)
    assert PaddedAnswers(there, 3)(PROMPTS, seeds, settings) == answers
    items = [
        TraceItem(str(i), "chat", p, a.tokens) for i, (p, a) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    for drafter in drafters(target):
        wanted = record_traces(target, drafter, items, TraceSettings(Sampling(1.0)), "d")
        found = record_traces(
            there, drafter.to(there.device).eval(), items, TraceSettings(Sampling(1.0)), "d"
        )
        for name in ("confidence_NG", "draft_max_NG", "accepted_N", "block_accepted_N", "usable_N"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5)
    tokenizer = load_tokenizer(str(target_folder))
    said = [
        Conversation(str(i), "chat", (Message("user", "hi"), Message("assistant", "yes " * (i + 1))))
        for i in range(5)
    ]
    for place, model in (("here", target), ("there", there)):
        shown = TemplateFormat(tokenizer)
        capture_by(model, shown, said, tmp_path / place, (0, 2), CaptureSettings(dtype="float32"))
    pairs = zip(FeatureStore(tmp_path / "here"), FeatureStore(tmp_path / "there"), strict=True)  # type: ignore[call-overload]
    assert all(torch.equal(a.features_TF, b.features_TF) for a, b in pairs)


def test_evaluation_validation_and_profile_run(
    target: TransformersTarget, there: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [EvalPrompt(str(i), "chat", p) for i, p in enumerate(PROMPTS)]
    for batch_size in (1, 8):
        settings: Any = EvaluateSettings(max_new_tokens=5, batch_size=batch_size, speed_prompts=1)
        wanted = evaluate(target, make_drafter(target), prompts, settings, Sampling()).records
        found = evaluate(
            there, make_drafter(target).to(there.device).eval(), prompts, settings, Sampling()
        ).records
        assert [r.emitted for r in found] == [r.emitted for r in wanted]
    table = profile(there, make_drafter(target), "d", ProfileSettings((1, 4), (8,), (1, 2), repeats=1))
    assert table.measured.clock == "wall clock"


def test_drafters_begin_and_are_opened_beside_a_target_elsewhere(
    target: TransformersTarget, there: TransformersTarget, tmp_path: Path
) -> None:
    for make in (make_drafter, lambda model: make_eagle(model, (5, 7, 9))):
        wanted, found = make(target), make(there)
        if isinstance(wanted, BlockDrafter) and isinstance(found, BlockDrafter):
            start_from_target(wanted, list(target.layers), target.final_norm())
            start_from_target(found, list(there.layers), there.final_norm())
        save_drafter(found, tmp_path / type(found).__name__, {}, torch.float64)
        opened = open_drafter(tmp_path / type(found).__name__, there, torch.float64)
        for name, value in wanted.state_dict().items():
            assert opened.state_dict()[name].device == there.device
            # it is read in float32
            torch.testing.assert_close(opened.state_dict()[name].cpu(), value, atol=1e-6, rtol=1e-6)
