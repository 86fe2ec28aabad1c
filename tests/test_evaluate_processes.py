"""Evaluation in real processes: torchrun shares the prompts, and the records are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from draftkit.draft.checkpoint import save_drafter
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter

pytestmark = pytest.mark.slow

PROMPTS = 7


def evaluated(folder: Path, target_folder: Path, processes: int, batch_size: int) -> list[dict[str, Any]]:
    """The results of both temperatures, without what belongs to a run: speed, clock, threads."""
    out = folder / f"out-{processes}-{batch_size}"
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    sets = [f"target.path={target_folder}", "evaluate.max_new_tokens=12", "evaluate.speed_prompts=1"]
    sets += [f"evaluate.batch_size={batch_size}"]
    command = [*start, "draftkit.cli", "evaluate", "-d", str(folder / "drafter"), "-o", str(out), "--json"]
    command += ["-p", str(folder / "prompts.jsonl"), *(part for word in sets for part in ("--set", word))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)) == 2, "one process speaks"
    results = [json.loads((out / f"evaluate-T{t}.json").read_text()) for t in (0, 1)]
    for result in results:
        assert result.pop("speed")["all"]["prompts"] == 2, "measured once"
        del result["environment"], result["settings"]["made_from"]
    return results


@pytest.mark.parametrize("batch_size", [1, 8])
def test_processes_that_share_the_prompts_give_the_records_of_one(
    batch_size: int, target: TransformersTarget, target_folder: Path, tmp_path: Path
) -> None:
    save_drafter(make_drafter(target), tmp_path / "drafter", {}, torch.float32)
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for i in range(PROMPTS):
            row = {"id": f"p{i}", "domain": ["code", "chat"][i % 2], "prompt": f"What is a list? {i}"}
            file.write(json.dumps(row) + "\n")
    alone = evaluated(tmp_path, target_folder, 1, batch_size)
    assert [len(result["records"]) for result in alone] == [PROMPTS, PROMPTS]
    assert alone[0]["records"] != alone[1]["records"], "temperature is felt"
    for processes in (2, 4):
        assert evaluated(tmp_path, target_folder, processes, batch_size) == alone
