"""The table of algorithms: every row is whole, and one file and one row add a kind of drafter to all of
draftkit."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from draftkit import feature_stages, stages, train_stages
from draftkit.config import load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.decode import decode
from draftkit.draft.algorithms import ALGORITHMS, algorithm_named
from draftkit.draft.checkpoint import open_drafter
from draftkit.engine.engine import Engine
from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import ConfigError
from draftkit.evaluate.run import EvalPrompt, evaluate
from draftkit.ops.sampling import Sampling
from draftkit.settings import EvaluateSettings
from draftkit.target.transformers import TransformersTarget
from support.average_drafter import ROW, AverageDrafter
from support.engine import PROMPTS, finish, small, tokens_of


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_paged_form_of_every_row_is_there(name: str) -> None:
    row = algorithm_named(name)
    assert row.forms
    assert name in ("dspark_v4", "dflash2", "xpress") or (
        row.paged is not None and resolve_name(row.paged)
    )  # it runs through `propose`


def test_an_unknown_algorithm_is_answered_with_the_known_ones_before_the_target_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stages, "load_target", None)
    with pytest.raises(
        ConfigError,
        match=r"drafter\.algorithm: 'medusa' is not known, choose one of dspark, dflash, eagle3, dflash2, "
        r"xpress, dspark_v4",
    ):
        stages.open_target(load_recipe("tiny-dspark", ["drafter.algorithm=medusa"]))


def test_one_file_and_one_row_add_an_algorithm(
    target: TransformersTarget, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained from a recipe, written, read, evaluated, and served beside others, with the target's own greedy
    answers."""
    monkeypatch.setitem(ALGORITHMS, "average", ROW)
    small_run = [
        f"target.path={target_folder}",
        "drafter.block_size=3",
        "drafter.num_features=2",
        "train.steps=30",
    ]
    small_run += ["train.batch_size=4", "train.anchors=8", "train.validation_share=0.3", "train.lr=1e-2"]
    recipe = load_recipe("tiny-dspark", ["drafter.algorithm=average", "drafter.num_layers=null", *small_run])
    opened, tokenizer = stages.open_target(recipe)
    said = [
        Conversation(
            str(i),
            "code",
            (Message("user", f"Add {i} and {i}."), Message("assistant", "Step 1: 3 + 4 = 7." * 3)),
        )
        for i in range(8)
    ]
    feature_stages.run_capture(opened, tokenizer, recipe, said, tmp_path / "features")
    source = feature_stages.open_features(recipe, opened, tokenizer, [tmp_path / "features"])
    train_stages.run_train(opened, tokenizer, recipe, source, tmp_path / "run")
    drafter = open_drafter(tmp_path / "run" / "best", target)
    assert isinstance(drafter, AverageDrafter) and drafter.gamma == 3
    assert float(drafter.steps.detach().abs().max()) > 0, "nothing was learnt"

    engine = Engine(target, drafter, small(max_running=4))
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=24, temperature=0.0))
    outputs = finish(engine)
    for index, prompt in enumerate(PROMPTS):
        wanted = decode(target, drafter, prompt, Sampling(0.0), 24)
        assert tokens_of(outputs[str(index)]) == list(wanted.tokens)
        assert wanted.tokens == decode(target, None, prompt, Sampling(0.0), 24).tokens
    assert engine.metrics.drafted > 0 and engine.metrics.kv_used == 0
    assert not engine._models.drafter._contexts  # type: ignore[union-attr]

    prompts = [EvalPrompt(str(i), "code", tuple(p)) for i, p in enumerate(PROMPTS[:3])]
    found = evaluate(
        target, drafter, prompts, EvaluateSettings(max_new_tokens=8, speed_prompts=0), Sampling(0.0)
    )
    assert found.accepted_len["macro"].value >= 1


def test_sampled_answers_of_a_drafter_without_a_paged_form_have_the_targets_distribution(
    target: TransformersTarget,
) -> None:
    """The second token of 600 answers at temperature 1, against the distribution itself."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    config = ROW.shape(
        load_recipe("tiny-dspark").drafter,
        shape
        | {
            "vocab_size": target.info.vocab_size,
            "feature_layers": (0, 2),
            "num_target_layers": 4,
            "block_size": 3,
        },
        0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALGORITHMS, "average", ROW)
        drafter = ROW.module(config).double().eval()
        drafter.lm_head.weight.data.copy_(target.head_weight())
        engine = Engine(target, drafter, small(max_running=32))
        for seed in range(600):
            engine.add_request(
                str(seed), [4, 20, 31, 7], SamplingParams(max_tokens=3, temperature=1.0, seed=seed, top_k=3)
            )
        answers = [tokens_of(outputs) for outputs in finish(engine).values()]
    assert engine.metrics.drafted >= 600
    first = max({a[0] for a in answers}, key=[a[0] for a in answers].count)
    seconds = [a[1] for a in answers if a[0] == first and len(a) > 1]
    read = target.forward(torch.tensor([[4, 20, 31, 7, first]]), None)
    chances = torch.softmax(target.logits(read.last_hidden_BTH[0, -1]), -1)
    top = chances.topk(3)
    for token, chance in zip(top.indices.tolist(), (top.values / top.values.sum()).tolist(), strict=True):
        sigma = (chance * (1 - chance) / len(seconds)) ** 0.5
        assert abs(seconds.count(token) / len(seconds) - chance) < 5 * sigma + 1e-9
