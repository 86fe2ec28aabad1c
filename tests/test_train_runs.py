"""Whole training runs: what they write, going on after an interruption, checkpoints, guards and logs."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftkit import stages, train_stages
from draftkit.config import Recipe, dump_recipe, load_recipe
from draftkit.draft.checkpoint import load_drafter, open_drafter
from draftkit.draft.drafter import LossReport
from draftkit.errors import CheckpointError, ConfigError, DataError, Interrupted
from draftkit.features.store import FeatureStore
from draftkit.settings import TrainSettings
from draftkit.target.transformers import TransformersTarget
from draftkit.train import trainer
from draftkit.train.batches import BatchMaker, Cut
from draftkit.train.folder import read_folder, write_folder
from draftkit.train.trainer import Progress
from draftkit.train.validation import expected_lengths
from support.targets import make_target_folder
from support.training import ALONE, losses, read_log

# --- what a step sees


def test_training_learns_and_writes_what_it_says(run: Any, fast: TrainSettings, tmp_path: Path) -> None:
    report = run(tmp_path, replace(fast, steps=60, validate_every=20, decode_prompts=2))
    curve = losses(tmp_path)
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    assert report.steps == len(curve) == 60
    assert {"code", "chat", "macro", "loss", "decoded"} == report.accepted_len.keys()
    validations = [r["validation"] for r in read_log(tmp_path) if "validation" in r]
    assert len(validations) == 3
    assert report.best == max(v["macro"] for v in validations) > 1
    assert 1 <= report.accepted_len["decoded"] <= 5
    for name in ("best", "last"):
        assert load_drafter(tmp_path / name).config.block_size == 4
    note = json.loads((tmp_path / "best" / "draftkit.json").read_text())
    assert note["validation"] == next(v for v in validations if v["macro"] == report.best)


def test_simulated_length_is_one_plus_the_survivals(store: FeatureStore) -> None:
    batch = next(BatchMaker(store, range(8), 8, 6, 0, Cut()).batches(0))
    cells = batch.anchors_BA.numel() * 2
    rows = torch.tensor([0, 1, 2, 6, 7])  # blocks 0 and 3 are whole, block 1 is not
    accept = torch.tensor([0.5, 0.5, 0.9, 1.0, 0.25])
    report = LossReport(torch.tensor(0.0), torch.tensor(1.0), {}, accept, rows)
    lengths, domains = expected_lengths(report, batch, 2)
    assert cells > 7
    assert lengths.tolist() == pytest.approx([1 + 0.5 + 0.25, 1 + 1.0 + 0.25])
    assert domains.tolist() == batch.domain_BA.flatten()[[0, 3]].tolist()


def test_an_interrupted_run_goes_on_bit_for_bit(run: Any, fast: TrainSettings, tmp_path: Path) -> None:
    run(tmp_path / "whole", fast)

    def stop(progress: Progress) -> None:
        if progress.step == 7:
            raise Interrupted(143)

    with pytest.raises(Interrupted):
        run(tmp_path / "parts", fast, stop)
    assert len(losses(tmp_path / "parts")) == 7
    run(tmp_path / "parts", fast)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = (load_drafter(tmp_path / p / "last").state_dict() for p in ("whole", "parts"))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("steps", [12, 10], ids=["after the last check", "before the last check"])
def test_a_signal_after_the_last_step_ends_the_run_too(
    steps: int, run: Any, fast: TrainSettings, tmp_path: Path
) -> None:
    """No step is left to ask about it; what would follow the training must not begin."""

    def ctrl_c(progress: Progress) -> None:
        if progress.step == steps:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, replace(fast, steps=steps), ctrl_c)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert run(tmp_path, replace(fast, steps=steps)).steps == steps
    assert len(losses(tmp_path)) == steps, "and the second run has no step to make"
    load_drafter(tmp_path / "last")


def test_the_log_forgets_what_a_lost_part_of_a_run_wrote(
    run: Any, fast: TrainSettings, tmp_path: Path
) -> None:
    """After a kill the log is ahead of the state, and its last line may be torn."""
    run(tmp_path, replace(fast, steps=8))
    log = tmp_path / "log.jsonl"
    kept = losses(tmp_path)
    log.write_text(log.read_text() + json.dumps({"step": 9, "loss": 99.0}) + '\n{"step": 10, "lo')
    run(tmp_path, fast)
    assert losses(tmp_path)[:8] == kept
    assert [r["step"] for r in read_log(tmp_path)] == list(range(1, 13))


def test_a_state_of_another_run_is_refused(run: Any, fast: TrainSettings, tmp_path: Path) -> None:
    run(tmp_path, replace(fast, steps=2))
    with pytest.raises(CheckpointError, match="another recipe or other features"):
        run(tmp_path, replace(fast, lr=1e-3))
    run(tmp_path, replace(fast, steps=3, micro_batch_size=1, keep_checkpoints=1))
    state = tmp_path / "state" / "state.safetensors"
    good = state.read_bytes()
    for damaged in (b"nothing", good[:-9] + bytes([good[-9] ^ 4]) + good[-8:]):
        state.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"^{state}: is damaged \(another sha256"):
            run(tmp_path, fast)
    state.write_bytes(good)
    run(tmp_path, fast)


def test_a_state_of_another_start_is_refused(run: Any, fast: TrainSettings, tmp_path: Path) -> None:
    """Where a drafter begins shows neither in its shape nor in the train section."""
    two = replace(fast, steps=2)
    run(tmp_path, two, start="target (2,)")
    for other in ("random None", "target None", "target (1,)"):
        with pytest.raises(CheckpointError, match="another recipe"):
            run(tmp_path, two, start=other)
    run(tmp_path, two, start="target (2,)")


def test_a_state_is_whole_after_kills_at_any_two_moments_of_writing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    left = 0  # renames and removals until the kill

    def deadly(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(Path, "rename", deadly(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
    killed = 0
    for moments in itertools.product(range(7), repeat=2):
        folder, left = tmp_path / "{}{}".format(*moments) / "state", 99
        write_folder(folder, {"step": torch.tensor(0)}, {"step": 0})
        for step in (1, 2):
            left = moments[step - 1]
            try:
                write_folder(folder, {"step": torch.tensor(step)}, {"step": step})
            except Killed:
                killed += 1
        found = read_folder(folder)
        assert found is not None and int(found[0]["step"]) == found[1]["step"], moments
    assert killed > 60


def test_the_log_has_a_step_before_the_state_does(
    run: Any, fast: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kill between the two would leave a hole: a run goes on after the step of its state."""
    seen: list[tuple[int, int]] = []
    save = trainer.save_state

    def watched(folder: Path, parallel: Any, optimizer: Any, position: Any) -> None:
        seen.append((position.step, read_log(tmp_path)[-1]["step"]))
        save(folder, parallel, optimizer, position)

    monkeypatch.setattr(trainer, "save_state", watched)
    run(tmp_path, replace(fast, validate_every=3))
    assert len(seen) > 1 and all(saved == logged for saved, logged in seen)


def test_a_refused_training_leaves_the_recipe_of_the_drafter_that_is_there(
    store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any, tmp_path: Path
) -> None:
    def train(**changes: Any) -> str:
        sections = {"drafter": {"feature_layers": [0, 2]}, "train": {"steps": 1} | changes}
        chosen = recipe.model_copy(update={k: replace(getattr(recipe, k), **v) for k, v in sections.items()})
        train_stages.run_train(target, tokenizer, chosen, store, tmp_path)
        return dump_recipe(chosen)

    written = train()
    assert (tmp_path / "recipe.yaml").read_text() == written
    with pytest.raises(CheckpointError, match="another recipe"):
        train(lr=1e-3)
    assert (tmp_path / "recipe.yaml").read_text() == written
    longer = train(steps=2)
    assert (tmp_path / "recipe.yaml").read_text() == longer != written


def test_only_the_newest_numbered_checkpoints_stay(run: Any, fast: TrainSettings, tmp_path: Path) -> None:
    run(tmp_path / "two", replace(fast, validate_every=3, keep_checkpoints=2))
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoints").iterdir()) == [
        "step-000009",
        "step-000012",
    ]
    load_drafter(tmp_path / "two" / "checkpoints" / "step-000012")
    run(tmp_path / "none", replace(fast, keep_checkpoints=0))
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_a_run_ends_early_when_validation_stops_getting_better(
    run: Any, fast: TrainSettings, tmp_path: Path
) -> None:
    """A learning rate of nearly zero: after the first validation nothing gets better."""
    settings = replace(fast, lr=1e-12, steps=100, validate_every=2, patience=3)
    report = run(tmp_path, settings)
    assert report.stopped_early
    assert report.steps == 2 * (1 + 3)
    assert run(tmp_path, settings).steps == report.steps, "and does not go on when it is started again"


def test_a_store_that_is_too_small_is_refused(run: Any, fast: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave nothing to train on"):
        run(tmp_path, replace(fast, validation_share=0.999))


def test_trackers_that_are_not_installed_are_named(
    run: Any, fast: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tracker, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            ConfigError, match=rf"train\.track: {tracker} is not installed .* pip install 'draftkit\[log\]'"
        ):
            run(tmp_path, replace(fast, track=(tracker,)))


def test_trackers_get_every_number_of_the_log(
    run: Any, fast: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With modules in their place that note what they are called with, by the names of their public
    functions."""
    scalars: dict[tuple[str, int], float] = {}
    logged: dict[int, dict[str, float]] = {}

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int) -> None:
            assert purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars[name, step] = value

        def close(self) -> None:
            scalars["closed", 0] = 1

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged[step] = values

        def finish(self) -> None:
            logged[0] = {}

    board, bias = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    board.SummaryWriter, bias.init = SummaryWriter, lambda **about: Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", bias)
    run(tmp_path, replace(fast, track=("tensorboard", "wandb")))
    rows = read_log(tmp_path)
    assert [logged[r["step"]]["loss"] for r in rows] == [r["loss"] for r in rows]
    assert [scalars["loss", r["step"]] for r in rows] == [r["loss"] for r in rows]
    assert scalars["validation/macro", 4] == logged[4]["validation/macro"] == rows[3]["validation"]["macro"]
    assert ("closed", 0) in scalars and 0 in logged


def test_a_drafter_of_another_target_is_refused(
    recipe: Recipe,
    target: TransformersTarget,
    tokenizer: Any,
    store: FeatureStore,
    fast: TrainSettings,
    tmp_path: Path,
) -> None:
    provenance = {"target_fingerprint": target.info.fingerprint}
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
    trainer.train(store, drafter, lambda: target, tmp_path / "run", replace(fast, steps=2), provenance, ALONE)
    open_drafter(tmp_path / "run" / "best", target)
    other = stages.load_target(str(make_target_folder(tmp_path / "other", seed=3)))
    with pytest.raises(CheckpointError, match="trained for another target"):
        open_drafter(tmp_path / "run" / "best", other)


def test_a_log_line_is_json_also_when_a_number_is_not_finite(
    recipe: Recipe, target: TransformersTarget, tokenizer: Any, run: Any, fast: TrainSettings, tmp_path: Path
) -> None:
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
    drafter.fc.weight.data.fill_(float("nan"))
    with pytest.raises(DataError):
        run(tmp_path, replace(fast, max_skipped=1), drafter=drafter)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None


def test_parameter_groups_learn_in_their_own_way_and_go_on_in_it(
    recipe: Recipe, target: TransformersTarget, tokenizer: Any, run: Any, fast: TrainSettings, tmp_path: Path
) -> None:
    """A group without learning (almost) stays where it was, one that decays shrinks; a run that was
    interrupted goes on to the same bits, whatever the order of groups."""
    groups = ({"parameters": "markov_head.*", "lr": 1e-12}, {"parameters": "*norm*", "weight_decay": 5.0})
    grouped = TrainSettings(**vars(fast) | {"groups": groups, "warmup": 0.0})
    fresh = train_stages.new_drafter_for(recipe, target, tokenizer).state_dict()
    run(tmp_path / "whole", grouped)
    whole = load_drafter(tmp_path / "whole" / "last").state_dict()
    moved = {n: float((whole[n].float() - fresh[n]).abs().max()) for n in whole if n in fresh}
    assert max(v for n, v in moved.items() if n.startswith("markov_head")) < 1e-2  # as bfloat16 rounds
    assert moved["fc.weight"] > 1e-2
    assert float(whole["norm.weight"].float().mean()) < 0.9

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path / "cut", grouped, stop)
    run(tmp_path / "cut", grouped)
    cut = load_drafter(tmp_path / "cut" / "last").state_dict()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    with pytest.raises(ConfigError, match=r"'rnn\.\*' fits no parameter that is left; there are fc\.weight"):
        run(tmp_path / "none", TrainSettings(**vars(fast) | {"groups": ({"parameters": "rnn.*"},)}))
    assert load_recipe("qwen3-4b-dspark", []).train.groups == (), "DeepSpec has one group"
