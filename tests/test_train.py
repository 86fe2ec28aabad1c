"""The trainer in one process: what a step sees, the step itself, resuming, checkpoints, guards and logs."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftkit import train_stages
from draftkit.config import Recipe, load_recipe
from draftkit.errors import DataError
from draftkit.features.store import FeatureStore
from draftkit.settings import TrainSettings
from draftkit.target.transformers import TransformersTarget
from draftkit.train import trainer
from draftkit.train.batches import BatchMaker, Cut, choose_anchors, collate, pack, split_source, steps_from
from draftkit.train.optim import lr_scale, new_optimizer, take_step
from draftkit.train.parallel import ParallelDrafter
from support.training import ALGORITHMS, ALONE, in_double, losses, read_log, recipe_for

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
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer).double()
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
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
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
        drafter = train_stages.new_drafter_for(recipe, target, tokenizer).double()
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
        drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
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


def test_the_target_s_head_has_the_drafter_s_type(
    recipe: Recipe, target: TransformersTarget, tokenizer: Any
) -> None:
    """Else each chunk of each loss makes it anew: a third of an EAGLE-3 step at a vocabulary of 49,152."""
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
    drafter.target_head_VH = drafter.lm_head.weight.detach().bfloat16()
    ParallelDrafter(drafter, ALONE, False, torch.bfloat16)
    assert drafter.target_head_VH.dtype == drafter.lm_head.weight.dtype == torch.float32


def test_betas_are_the_recipe_s(
    store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any
) -> None:
    parallel = ParallelDrafter(
        train_stages.new_drafter_for(recipe, target, tokenizer), ALONE, False, torch.float32
    )
    assert new_optimizer(parallel, 1e-3, 0.0).defaults["betas"] == (0.9, 0.95)
    assert new_optimizer(parallel, 1e-3, 0.0, (0.9, 0.999)).defaults["betas"] == (0.9, 0.999)
    assert load_recipe("qwen3-4b-dspark", []).train.betas == (0.9, 0.999)


def test_gradients_are_clipped_to_the_norm(
    store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any, fast: TrainSettings
) -> None:
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
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
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
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
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
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
        drafter = train_stages.new_drafter_for(recipe, target, tokenizer)
        with join_world() as world:
            trainer.train(
                store, drafter, lambda: target, tmp_path / dtype, replace(settings, dtype=dtype), {}, world
            )
        assert all(p.dtype == torch.float32 for p in drafter.parameters())
        curves.append(losses(tmp_path / dtype))
    assert torch.get_float32_matmul_precision() == "highest", "as it was before"
    assert curves[0] == pytest.approx(curves[1], rel=0.02)


# --- the run
