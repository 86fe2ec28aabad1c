"""Where a run's numbers go: `log.jsonl` always, TensorBoard and Weights & Biases when the recipe asks for
them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from draftkit.errors import ConfigError
from draftkit.output import as_json, naming, write_text

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class TrainLog:
    """One line per step in `folder/log.jsonl`; a resumed run drops the lines after the step it goes on from.

    Only the first process writes. Raises ConfigError when a tracker is asked for that is not installed.
    """

    def __init__(
        self, folder: Path, step: int, trackers: tuple[str, ...], run: dict[str, Any], writes: bool
    ) -> None:
        self._modules = {name: _import(name) for name in trackers}
        self._file = self._board = self._wandb = None
        if not writes:
            return
        self._path = folder / "log.jsonl"
        _keep_until(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        if "tensorboard" in trackers:
            self._board = self._modules["tensorboard"].SummaryWriter(
                folder / "tensorboard", purge_step=step + 1
            )
        if "wandb" in trackers:
            self._wandb = self._modules["wandb"].init(
                project="draftkit",
                name=folder.name,
                dir=str(folder),
                config=run,
                id=_run_id(folder),
                resume="allow",
            )

    def write(self, step: int, line: dict[str, Any]) -> None:
        """Add the numbers of a step; nested ones get names like "validation/macro" in the trackers."""
        if self._file is None:
            return
        with naming(self._path):
            self._file.write(as_json({"step": step} | line) + "\n")
            self._file.flush()
        flat = dict(_flattened(line))
        if self._board is not None:
            for name, value in flat.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink, close in ((self._file, "close"), (self._board, "close"), (self._wandb, "finish")):
            if sink is not None:
                getattr(sink, close)()


def _import(tracker: str) -> Any:
    try:
        return importlib.import_module(TRACKERS[tracker])
    except ImportError as error:
        raise ConfigError(
            f"train.track: {tracker} is not installed ({error}); pip install 'draftkit[log]', or leave it out"
        ) from error


def _keep_until(path: Path, step: int) -> None:
    """Drop lines after `step`, and a last one that a kill left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break
    write_text(path, "".join(line + "\n" for line in kept))


def _run_id(folder: Path) -> str:
    """The same for a run that goes on: W&B then adds to its curves."""
    path = folder / "wandb-id"
    if not path.exists():
        import secrets

        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text("utf-8")


def _flattened(line: dict[str, Any], before: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        found += (
            _flattened(value, f"{before}{name}/")
            if isinstance(value, dict)
            else [(before + name, float(value))]
        )
    return found
