"""Two processes on one file of records, one of which is killed: the other one takes over what it left."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from checks.forked import finished, start
from support.patience import wait_until
from support.records import prompts, records
from support.stopping import ANSWERS, signal_at, wait_for_stop

pytestmark = pytest.mark.slow


def test_what_a_killed_process_left_is_taken_over_and_nothing_is_there_twice(
    target_folder: Path, tmp_path: Path
) -> None:
    source, shared, alone = tmp_path / "prompts.jsonl", tmp_path / "shared.jsonl", tmp_path / "alone.jsonl"
    rows = [{"id": p.id, "domain": p.domain, "messages": p.as_dicts()} for p in prompts(260)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"target.path={target_folder}", "target.dtype=float32", "generate.max_new_tokens=12"]
    command = ["generate", "-p", str(source), *[x for s in settings for x in ("--set", s)], "-o"]
    parts = shared.with_name("shared.jsonl.parts")

    to_shared = [*command, str(shared)]
    first = start(to_shared, tmp_path / "log0", before=partial(signal_at, ANSWERS, 5))
    assert first.pid is not None
    wait_for_stop(first.pid)
    second = start(to_shared, tmp_path / "log1")
    wait_until(
        lambda: len([f for f in parts.glob("*.jsonl") if f.stat().st_size]) > 1 or not second.is_alive()
    )
    assert second.is_alive(), "it waits for what the first one holds"
    first.kill()
    first.join()
    second.join()
    assert second.exitcode == 0, (tmp_path / "log1").read_text()
    code, told = finished([*command, str(alone)], tmp_path / "log")
    assert code == 0, told
    assert records(shared) == records(alone) and len(records(shared)) == 260
    assert not parts.exists()
