"""What draftkit writes may be read by whoever the umask lets read it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from draftkit.draft.checkpoint import save_drafter
from draftkit.features.manifest import begin_store
from draftkit.features.writer import StoreWriter
from draftkit.permissions import follow_umask
from draftkit.schedule.traces import save_traces
from draftkit.target.transformers import TransformersTarget
from draftkit.train.parallel import ParallelDrafter, World
from draftkit.train.state import Position, save_state
from support.drafters import make_drafter
from support.stores import made_manifest, made_text
from support.traces import made_traces


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=["all", "group", "owner"])
def allowed(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of a new file under some umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def write_everything(target: TransformersTarget, folder: Path) -> None:
    drafter = make_drafter(target)
    parallel = ParallelDrafter(drafter, World(0, 1, torch.device("cpu")), False, torch.float32)
    optimizer = torch.optim.AdamW(parallel.trained.values())
    save_state(folder / "state", parallel, optimizer, Position(1, 1.0, 1.0, 0, 0, "f"))
    save_drafter(drafter, folder / "drafter", {}, torch.float32)
    begin_store(folder / "features", made_manifest())
    with StoreWriter(folder / "features") as writer:
        writer.add([(made_text(), 0, b"x")])
    save_traces(made_traces(prompts=2, rows=3), folder / "traces.safetensors")


def test_every_file_has_the_mode_of_a_file_that_open_makes(
    target: TransformersTarget, allowed: int, tmp_path: Path
) -> None:
    write_everything(target, tmp_path)
    assert (tmp_path / "features" / "shard-000-00000.bin").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(allowed) for path in files
    }


def test_the_umask_itself_is_never_touched_and_nothing_is_left_beside_the_file(
    allowed: int, tmp_path: Path
) -> None:
    path, seen = tmp_path / "file", set[int]()
    path.touch(mode=0o600)
    writers = [threading.Thread(target=lambda: [follow_umask(path) for _ in range(50)]) for _ in range(2)]
    for writer in writers:
        writer.start()
    for number in range(200):
        (tmp_path / f"other-{number}").touch()
        seen.add((tmp_path / f"other-{number}").stat().st_mode & 0o777)
    for writer in writers:
        writer.join()
    assert seen == {allowed} and path.stat().st_mode & 0o777 == allowed
    assert len(list(tmp_path.iterdir())) == 201
