"""Evaluation in real processes that share the prompts: the records are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.forked import Ranks
from draftkit.draft.checkpoint import save_drafter
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter

pytestmark = pytest.mark.slow

PROMPTS = 7


class Evaluations:
    """Evaluates a drafter at both temperatures, in one process or in several."""

    def __init__(self, target: TransformersTarget, target_folder: Path, folder: Path) -> None:
        self._folder, self._target = folder, target_folder
        save_drafter(make_drafter(target), folder / "drafter", {}, torch.float32)
        with (folder / "prompts.jsonl").open("w") as file:
            for i in range(PROMPTS):
                row = {"id": f"p{i}", "domain": ["code", "chat"][i % 2], "prompt": f"What is a list? {i}"}
                file.write(json.dumps(row) + "\n")

    def words(self, out: Path, batch_size: int) -> list[str]:
        """The command, without the program."""
        sets = [f"target.path={self._target}", "evaluate.max_new_tokens=12", "evaluate.speed_prompts=1"]
        sets += [f"evaluate.batch_size={batch_size}"]
        command = ["evaluate", "-d", str(self._folder / "drafter"), "-o", str(out)]
        command += ["-p", str(self._folder / "prompts.jsonl")]
        return [*command, *(part for word in sets for part in ("--set", word))]

    def results(self, batch_size: int, processes: int = 1) -> list[dict[str, Any]]:
        out = self._folder / f"out-{processes}-{batch_size}"
        ended = Ranks(self.words(out, batch_size), processes, out.with_name("log")).finish()
        assert [code for code, _ in ended] == [0] * processes, ended
        spoken = [told.count("next: ") for _, told in ended]
        assert spoken == [1] + [0] * (processes - 1), "one process speaks"
        return read(out)


def read(out: Path) -> list[dict[str, Any]]:
    """The results without what belongs to a run: speed, clock, threads."""
    results = [json.loads((out / f"evaluate-T{t}.json").read_text()) for t in (0, 1)]
    for result in results:
        assert result.pop("speed")["all"]["prompts"] == 2, "measured once"
        del result["environment"], result["settings"]["made_from"]
    return results


@pytest.fixture(scope="module")
def evaluations(
    target: TransformersTarget, target_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluations:
    return Evaluations(target, target_folder, tmp_path_factory.mktemp("evaluations"))


@pytest.fixture(scope="module")
def alone(evaluations: Evaluations) -> list[dict[str, Any]]:
    """One prompt at a time, in one process."""
    return evaluations.results(1)


def test_processes_that_share_the_prompts_give_the_records_of_one(
    evaluations: Evaluations, alone: list[dict[str, Any]]
) -> None:
    assert [len(result["records"]) for result in alone] == [PROMPTS, PROMPTS]
    assert alone[0]["records"] != alone[1]["records"], "temperature is felt"
    assert evaluations.results(1, 4) == alone


def test_they_do_so_when_each_answers_several_prompts_at_once(evaluations: Evaluations) -> None:
    assert evaluations.results(8, 2) == evaluations.results(8)


def test_torchrun_gives_the_records_of_one_process(
    evaluations: Evaluations, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "draftkit.cli", *evaluations.words(tmp_path, 1), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)) == 2, "one process speaks"
    assert read(tmp_path) == alone
