"""The trainer in one process: what a step sees, the step itself, resuming, checkpoints, guards and logs."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import sys
import types
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftkit import stages
from draftkit.config import Recipe, dump_recipe, load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.draft.checkpoint import load_drafter, open_drafter
from draftkit.draft.drafter import LossReport, TrainBatch
from draftkit.errors import CheckpointError, ConfigError, DataError, Interrupted
from draftkit.features.store import FeatureStore
from draftkit.settings import CaptureSettings, TrainSettings
from draftkit.target.prompt_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from draftkit.train import trainer
from draftkit.train.batches import BatchMaker, Cut, choose_anchors, collate, pack, split_source, steps_from
from draftkit.train.folder import read_folder, write_folder
from draftkit.train.optim import lr_scale, new_optimizer, take_step
from draftkit.train.parallel import ParallelDrafter, World
from draftkit.train.trainer import Progress, TrainReport
from draftkit.train.validation import expected_lengths
from support.stores import capture_by
from support.targets import make_target_folder

WORDS = "list value holds step return what add number the a of is".split()
ALONE = World(0, 1, torch.device("cpu"))
ALGORITHMS = ["dspark", "dflash", "eagle3"]


def conversations(count: int = 14) -> list[Conversation]:
    rng = random.Random(4)
    text = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randrange(low, high)))  # noqa: E731
    return [
        Conversation(
            f"c{i}", ["code", "chat"][i % 2], (Message("user", text(1, 6)), Message("assistant", text(3, 20)))
        )
        for i in range(count)
    ]


def recipe_for(target_folder: Path, algorithm: str = "dspark") -> Recipe:
    sizes = [
        "drafter.num_features=2",
        "drafter.num_layers=1",
        "drafter.block_size=4",
        "drafter.markov_rank=6",
    ]
    train = [
        "train.batch_size=4",
        "train.steps=12",
        "train.anchors=8",
        "train.lr=1e-2",
        "train.validate_every=4",
    ]
    train += ["train.validation_share=0.2", "train.decode_prompts=0", f"drafter.algorithm={algorithm}"]
    return load_recipe("tiny-dspark", [f"target.path={target_folder}", *sizes, *train])


@pytest.fixture(scope="module")
def recipe(target_folder: Path) -> Recipe:
    return recipe_for(target_folder)


@pytest.fixture(scope="module")
def tokenizer(target_folder: Path) -> Any:
    return load_tokenizer(str(target_folder))


@pytest.fixture(scope="module")
def store(
    target: TransformersTarget, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    folder = tmp_path_factory.mktemp("store")
    capture_by(
        target, TemplateFormat(tokenizer), conversations(), folder, (0, 2), CaptureSettings(dtype="float32")
    )
    return FeatureStore(folder)


@pytest.fixture
def fast(recipe: Recipe) -> TrainSettings:
    return recipe.train


@pytest.fixture
def run(store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any) -> Any:
    def start(
        out: Path, settings: TrainSettings, report: Any = lambda p: None, drafter: Any = None, start: str = ""
    ) -> TrainReport:
        drafter = drafter or stages.new_drafter_for(recipe, target, tokenizer)
        return trainer.train(
            store, drafter, lambda: target, out, settings, {"note": "x"}, ALONE, report, start=start
        )

    return start


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_log(folder) if "loss" in r]


def in_double(batch: TrainBatch) -> TrainBatch:
    return replace(
        batch, features_BTF=batch.features_BTF.double(), last_hidden_BTH=batch.last_hidden_BTH.double()
    )


# --- what a step sees


def test_rows_hold_every_conversation_once_and_never_more_than_fits() -> None:
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 40))]
        capacity = rng.randrange(100, 400)
        rows = pack(lengths, capacity)
        assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
        assert all(len(row) == 1 or sum(lengths[i] for i in row) <= capacity for row in rows)
        if capacity >= max(lengths):
            assert len(rows) <= 1 + 2 * sum(lengths) // capacity, "no two rows could have been one"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_packed_conversation_has_the_loss_it_has_alone(
    algorithm: str, store: FeatureStore, target_folder: Path, target: TransformersTarget, tokenizer: Any
) -> None:
    """Each document of a shared row, with its own anchors, against a batch of that document only."""
    recipe = recipe_for(target_folder, algorithm)
    drafter = stages.new_drafter_for(recipe, target, tokenizer).double()
    settings = recipe.train.loss
    samples = [store[i] for i in (3, 9, 5, 12)]
    anchors = [choose_anchors(s.loss_mask_T, 6, i) for i, s in enumerate(samples)]
    domains = ("chat", "code")
    packed = in_double(collate([samples[:3], samples[3:]], [anchors[:3], anchors[3:]], domains))
    whole = drafter.loss(packed, settings)
    alone = [
        drafter.loss(in_double(collate([[s]], [[a]], domains)), settings)
        for s, a in zip(samples, anchors, strict=True)
    ]
    assert all(float(r.weight_sum.detach()) > 0 for r in alone)
    torch.testing.assert_close(whole.loss_sum, torch.stack([r.loss_sum for r in alone]).sum())
    torch.testing.assert_close(whole.weight_sum, torch.stack([r.weight_sum for r in alone]).sum())
    torch.testing.assert_close(
        whole.accept_N.sort().values, torch.cat([r.accept_N for r in alone]).sort().values
    )
    for name, value in whole.sums.items():
        torch.testing.assert_close(value, torch.stack([r.sums[name] for r in alone]).sum())


def test_a_step_takes_the_same_conversations_and_anchors_however_it_is_cut(store: FeatureStore) -> None:
    def seen(cut: Cut, step: int) -> list[tuple[Any, ...]]:
        found = []
        for batch in BatchMaker(store, range(len(store)), 6, 5, 3, cut).batches(step):
            for row, anchors in enumerate(batch.anchors_BA):
                for anchor in anchors[batch.anchor_mask_BA[row]].tolist():
                    mine = batch.document_BT[row] == batch.document_BT[row, anchor]
                    text = tuple(batch.tokens_BT[row][mine].tolist())
                    found.append((text, int(batch.positions_BT[row, anchor])))
        return found

    for step in (0, 1, 2, 5):
        whole = sorted(seen(Cut(), step))
        assert whole == sorted(seen(Cut(row_tokens=10_000), step))
        assert whole == sorted(seen(Cut(micro_batch_size=1), step))
        for processes in (2, 3, 8):
            parts = [
                seen(Cut(micro_batch_size=2, rank=r, processes=processes), step) for r in range(processes)
            ]
            assert whole == sorted(x for part in parts for x in part)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_sees_the_same_batches_made_ahead_or_in_line(store: FeatureStore, device: str) -> None:
    maker = BatchMaker(store, range(len(store)), 4, 5, 3, Cut())
    # batches are made on the CPU in both cases
    with closing(steps_from(maker, 2, torch.device(device))) as steps:
        for step, found in zip((2, 3, 4), steps, strict=False):
            for one, other in zip(found, maker.batches(step), strict=True):
                assert all(
                    torch.equal(getattr(one, n), v)
                    for n, v in vars(other).items()
                    if isinstance(v, torch.Tensor)
                )


def test_an_epoch_takes_every_conversation_once_and_the_next_one_in_another_order(
    store: FeatureStore,
) -> None:
    maker = BatchMaker(store, range(len(store)), 4, 5, 3, Cut())
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in maker.samples(step)] for e in (0, 1)]
    assert maker.per_epoch == 4
    assert [sorted(e) for e in epochs] == [list(range(14))] * 2
    assert epochs[0] != epochs[1]


def test_all_processes_make_the_same_number_of_micro_batches_also_with_fewer_rows_than_processes(
    store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any
) -> None:
    cuts = [Cut(micro_batch_size=1, rank=r, processes=5) for r in range(5)]
    made = [list(BatchMaker(store, range(3), 3, 5, 0, cut).batches(0)) for cut in cuts]
    assert len({len(m) for m in made}) == 1
    empty = [m[0] for m in made if not m[0].anchor_mask_BA.any()]
    assert empty
    drafter = stages.new_drafter_for(recipe, target, tokenizer)
    report = drafter.loss(empty[0], recipe.train.loss)
    report.loss_sum.backward()
    assert float(report.weight_sum.detach()) == float(report.loss_sum.detach()) == 0
    assert all(
        float(p.grad.abs().max()) == 0 for p in drafter.parameters() if p.requires_grad and p.grad is not None
    )


def test_a_split_takes_from_every_domain_and_keeps_the_rest(store: FeatureStore) -> None:
    split = split_source(store, 0.2, 0)
    assert sorted([*split.train.tolist(), *split.validation.tolist()]) == list(range(len(store)))
    assert {store[i].domain for i in split.validation} == {"code", "chat"}


# --- the step


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_accumulation_gives_the_same_step(
    algorithm: str, store: FeatureStore, target_folder: Path, target: TransformersTarget, tokenizer: Any
) -> None:
    """Eight conversations at once, packed or not, in micro-batches of two rows or of one: what counts is
    every token once."""
    recipe = recipe_for(target_folder, algorithm)
    settings = recipe.train
    steps = []
    for cut in (Cut(), Cut(row_tokens=500), Cut(micro_batch_size=2), Cut(micro_batch_size=1)):
        drafter = stages.new_drafter_for(recipe, target, tokenizer).double()
        parallel = ParallelDrafter(drafter, ALONE, False, torch.float32)
        batches = [in_double(b) for b in BatchMaker(store, range(len(store)), 8, 6, 0, cut).batches(0)]
        optimizer = torch.optim.SGD(parallel.trained.values(), lr=1.0)
        done = take_step(parallel, optimizer, batches, settings.loss, 0.1)
        steps.append((len(batches), done, drafter.fc.weight.detach().clone()))
    assert steps[0][0] < steps[2][0] < steps[3][0]
    for _, done, weight in steps[1:]:
        assert done.loss == pytest.approx(steps[0][1].loss, rel=1e-9)
        assert done.grad_norm == pytest.approx(steps[0][1].grad_norm, rel=1e-6)
        assert done.rows == steps[0][1].rows
        torch.testing.assert_close(weight, steps[0][2], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
def test_recomputed_activations_change_no_bit_and_are_not_kept(
    algorithm: str, store: FeatureStore, target_folder: Path, target: TransformersTarget, tokenizer: Any
) -> None:
    recipe = recipe_for(target_folder, algorithm)
    batch = next(BatchMaker(store, range(len(store)), 8, 6, 0, Cut()).batches(0))
    found = []
    for recompute in (False, True):
        drafter = stages.new_drafter_for(recipe, target, tokenizer)
        drafter.recompute = recompute
        runs = []
        layer = drafter.get_submodule("layers.0")
        layer.register_forward_pre_hook(lambda module, inputs, runs=runs: runs.append(1))
        report = drafter.loss(batch, recipe.train.loss)
        report.loss_sum.backward()
        grads = [p.grad for p in drafter.parameters() if p.grad is not None]
        found.append((report.loss_sum.detach(), grads, len(runs)))
    assert [runs for *_, runs in found] == [1, 2]
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_betas_are_the_recipe_s(
    store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any
) -> None:
    parallel = ParallelDrafter(stages.new_drafter_for(recipe, target, tokenizer), ALONE, False, torch.float32)
    assert new_optimizer(parallel, 1e-3, 0.0).defaults["betas"] == (0.9, 0.95)
    assert new_optimizer(parallel, 1e-3, 0.0, (0.9, 0.999)).defaults["betas"] == (0.9, 0.999)
    assert load_recipe("qwen3-4b-dspark", []).train.betas == (0.9, 0.999)


def test_gradients_are_clipped_to_the_norm(
    store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any, fast: TrainSettings
) -> None:
    drafter = stages.new_drafter_for(recipe, target, tokenizer)
    parallel = ParallelDrafter(drafter, ALONE, False, torch.float32)
    before = {n: p.detach().clone() for n, p in parallel.trained.items()}
    optimizer = torch.optim.SGD(parallel.trained.values(), lr=1.0)
    done = take_step(
        parallel, optimizer, BatchMaker(store, range(8), 8, 6, 0, Cut()).batches(0), fast.loss, 0.25
    )
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in parallel.trained.items()])
    assert done.grad_norm > 0.25
    assert float(moved.norm()) == pytest.approx(0.25, rel=1e-3)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any, fast: TrainSettings
) -> None:
    drafter = stages.new_drafter_for(recipe, target, tokenizer)
    parallel = ParallelDrafter(drafter, ALONE, False, torch.float32)
    optimizer = new_optimizer(parallel, 1e-2, 0.0)
    good = list(BatchMaker(store, range(8), 8, 6, 0, Cut()).batches(0))
    bad = [replace(b, features_BTF=torch.full_like(b.features_BTF, float("inf"))) for b in good]
    before = drafter.fc.weight.detach().clone()
    assert not take_step(parallel, optimizer, bad, fast.loss, 1.0).finite
    assert torch.equal(drafter.fc.weight, before)
    assert take_step(parallel, optimizer, good, fast.loss, 1.0).finite
    assert not torch.equal(drafter.fc.weight, before)


def test_losses_that_are_not_finite_stop_the_run(
    recipe: Recipe, target: TransformersTarget, tokenizer: Any, run: Any, fast: TrainSettings, tmp_path: Path
) -> None:
    drafter = stages.new_drafter_for(recipe, target, tokenizer)
    drafter.fc.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="4 steps in a row without a finite loss"):
        run(tmp_path, replace(fast, steps=100, max_skipped=3), drafter=drafter)
    assert [r["skipped"] for r in read_log(tmp_path)] == [1, 2, 3]


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    scales = [lr_scale(i / 100, 0.1, 1.0) for i in range(101)]
    assert scales[:10] == sorted(scales[:10]) and scales[10:] == sorted(scales[10:], reverse=True)
    assert (scales[5], scales[10], scales[55], scales[100]) == pytest.approx((0.5, 1.0, 0.5, 0.0))
    late = [lr_scale(i / 100, 0.1, 0.4) for i in range(101)]
    assert (late[5], late[30], late[60], late[80], late[100]) == pytest.approx((0.5, 1.0, 1.0, 0.5, 0.0))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16_passes_keep_float32_parameters_and_come_close(
    algorithm: str,
    store: FeatureStore,
    target_folder: Path,
    target: TransformersTarget,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    from draftkit.train.parallel import join_world

    recipe = recipe_for(target_folder, algorithm)
    settings = replace(recipe.train, steps=6)
    curves = []
    for dtype in ("float32", "bfloat16"):
        drafter = stages.new_drafter_for(recipe, target, tokenizer)
        with join_world() as world:
            trainer.train(
                store, drafter, lambda: target, tmp_path / dtype, replace(settings, dtype=dtype), {}, world
            )
        assert all(p.dtype == torch.float32 for p in drafter.parameters())
        curves.append(losses(tmp_path / dtype))
    assert torch.get_float32_matmul_precision() == "highest", "as it was before"
    assert curves[0] == pytest.approx(curves[1], rel=0.02)


# --- the run


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


@pytest.mark.parametrize("steps", [12, 10], ids=["behind the last check", "before the last check"])
def test_a_signal_behind_the_last_step_ends_the_run_too(
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
    """Else a kill between the two would leave a hole: a run goes on behind the step of its state."""
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
        stages.run_train(target, tokenizer, chosen, store, tmp_path)
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
    drafter = stages.new_drafter_for(recipe, target, tokenizer)
    trainer.train(store, drafter, lambda: target, tmp_path / "run", replace(fast, steps=2), provenance, ALONE)
    open_drafter(tmp_path / "run" / "best", target)
    other = stages.load_target(str(make_target_folder(tmp_path / "other", seed=3)))
    with pytest.raises(CheckpointError, match="trained for another target"):
        open_drafter(tmp_path / "run" / "best", other)


def test_a_log_line_is_json_also_when_a_number_is_not_finite(
    recipe: Recipe, target: TransformersTarget, tokenizer: Any, run: Any, fast: TrainSettings, tmp_path: Path
) -> None:
    drafter = stages.new_drafter_for(recipe, target, tokenizer)
    drafter.fc.weight.data.fill_(float("nan"))
    with pytest.raises(DataError):
        run(tmp_path, replace(fast, max_skipped=1), drafter=drafter)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None
