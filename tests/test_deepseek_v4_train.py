"""A DeepSeek-V4 module trained by two processes: experts lie apart, and what is learnt is what one process
learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checks.forked import Ranks
from draftkit import feature_stages, stages
from draftkit.config import load_recipe
from draftkit.data.conversations import Conversation, Message
from support import split_experts
from support.deepseek_v4 import tiny_folder

SAID = [
    Conversation(
        str(i), "chat", (Message("user", f"Add {i}."), Message("assistant", "3 + 4 = 7." * (1 + i % 3)))
    )
    for i in range(10)
]


def test_experts_that_lie_apart_give_what_they_give_in_one_place(tmp_path: Path) -> None:
    """Outputs and gradients, with as many tokens in one process as there are, and none in the other."""
    done = Ranks([], 2, tmp_path / "log", program=split_experts.main).finish()
    assert [code for code, _ in done] == [0, 0], done
    [line] = [line for line in done[0][1].splitlines() if line.startswith("[{")]
    told = json.loads(line)
    assert [t["apart"] for t in told] == [True, True]
    assert max(t["worst"] for t in told) < 1e-5
    assert [t["held"] for t in told] == [[[2, 64, 64], [2, 64, 32]]] * 2  # two of the four experts


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Of three rows the second process has one: it goes through the last micro-batch without any."""
    folder = tiny_folder(tmp_path / "v4")
    raw = json.loads((folder / "config.json").read_text())
    values: dict[str, Any] = {"target.path": folder, "drafter.mask_token_id": raw["dspark_noise_token_id"]}
    values |= {"train.steps": 6, "train.batch_size": 3, "train.anchors": 4, "train.validation_share": 0.3}
    values |= {"train.micro_batch_size": 1, "train.decode_prompts": 0, "capture.dtype": "float32"}
    sets = [f"{k}={v}" for k, v in values.items()]
    recipe = load_recipe("tiny-deepseek-v4", sets)
    feature_stages.run_capture(*stages.open_target(recipe), recipe, SAID, tmp_path / "features")

    def train(out: Path, processes: int, *more: str) -> list[float]:
        words = ["train", "-r", "tiny-deepseek-v4", "-f", str(tmp_path / "features"), "-o", str(out)]
        words += [w for s in (*sets, *more) for w in ("--set", s)]
        done = Ranks(words, processes, tmp_path / "log").finish()
        assert [code for code, _ in done] == [0] * processes, done
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    alone = train(tmp_path / "one", 1)
    assert len(alone) == 6
    assert train(tmp_path / "two", 2, "train.shard=true") == pytest.approx(alone, abs=1e-4)
    first, second = (load_file(tmp_path / n / "last" / "model.safetensors") for n in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name].float(), value.float(), atol=2e-3, rtol=1e-2)
