"""A target and its drafter by name, as an engine with a tokenizer: what the server and `LLM` begin with."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import Drafter
from draftkit.engine.engine import Engine
from draftkit.engine.memory import return_freed_memory
from draftkit.engine.models import load_for_engine
from draftkit.engine.settings import EngineSettings
from draftkit.errors import ScheduleError, ServeError
from draftkit.schedule.calibration import Calibration, load_calibration
from draftkit.schedule.step_rate_table import load_step_rate
from draftkit.target.deepseek_v4_prompts import speaks_deepseek_v4
from draftkit.target.fingerprint import fingerprint
from draftkit.target.place import EMBEDDED, EMBEDDED_PAIR, SMOLLM2_DRAFTER, SMOLLM2_PAIR
from draftkit.target.tokenizer import load_tokenizer

log = logging.getLogger("draftkit.serve")


@dataclass(frozen=True)
class PackagedDrafter:
    """A drafter that comes with draftkit, and the calibration of its confidences."""

    folder: Path
    calibration: Path


PACKAGED = {  # by the name of its target
    "tiny": PackagedDrafter(EMBEDDED / "drafter", EMBEDDED_PAIR / "calibration.json"),
    "smollm2": PackagedDrafter(SMOLLM2_DRAFTER, SMOLLM2_PAIR / "calibration.json"),
}


@dataclass(frozen=True)
class PlanFiles:
    """What was measured about a pair before: the files of `draftkit profile` and `draftkit calibrate`."""

    step_rate: Path | None = None
    calibration: Path | None = None


def open_pair(
    target: str, drafter: str | None, settings: EngineSettings, files: PlanFiles | None = None
) -> tuple[Engine, Any]:
    """Load both (slow). `drafter` is a folder, "none", or None: a target of `PACKAGED` then takes its own,
    with its own calibration. Raises DraftkitError, also for files that belong to another pair."""
    files = files or PlanFiles()
    tokenizer = load_tokenizer(target, template=False)
    if not tokenizer.chat_template and not speaks_deepseek_v4(tokenizer):
        log.info("%s has no chat template: it completes texts, and chats are refused", target)
    folder = find_drafter(target, drafter)
    if folder is None and (given := files.step_rate or files.calibration):
        raise ScheduleError(
            f"{given}: there is no drafter, so nothing to plan; give --drafter or leave the file out"
        )
    loaded = load_for_engine(target, settings)
    if (settings.max_length or 0) > loaded.info.max_length:
        raise ServeError(
            f"max_length is {settings.max_length}; {target} allows {loaded.info.max_length} at most"
        )
    opened = open_drafter(folder, loaded) if folder else None
    if folder and opened:
        own = fingerprint(folder)
        if files.step_rate:
            table = load_step_rate(files.step_rate)
            table.check_target(loaded.info.fingerprint)
            table.check_drafter(own)
            settings = replace(settings, step_rate=table.middle())
        said = files.calibration is not None or drafter is not None
        if said:
            calibration = _read_calibration(files.calibration, opened, own)
        else:
            calibration = _packaged_calibration(PACKAGED[target].calibration, opened, own)
        settings = replace(settings, calibration=calibration)
    engine = Engine(loaded, opened, settings)
    del loaded, opened  # the engine has its own layout of the weights
    return_freed_memory()
    info = engine.info
    log.info(
        "drafter %s (%s), forward %s, %d KV blocks",
        folder or "none",
        info.algorithm,
        info.forward,
        info.kv_blocks_total,
    )
    return engine, tokenizer


def find_drafter(target: str, drafter: str | None) -> Path | None:
    """The folder of the drafter: the one that was named, none for "none"; where none was named, the one that
    is packaged for this target, if there is one."""
    if drafter is not None:
        return None if drafter == "none" else Path(drafter)
    return PACKAGED[target].folder if target in PACKAGED else None


def _read_calibration(path: Path | None, drafter: Drafter, own: str) -> Calibration | None:
    if path is None:
        return None
    calibration = load_calibration(path, drafter.gamma, own)
    if not drafter.has_confidence:
        raise ScheduleError(
            f"{path}: this drafter has no confidence head, so there is nothing to calibrate; leave it out"
        )
    return calibration


def _packaged_calibration(path: Path, drafter: Drafter, own: str) -> Calibration | None:
    """The packaged one; None, and a line in the log, where it is of another drafter."""
    try:
        calibration = load_calibration(path, drafter.gamma, own)
    except ScheduleError as error:
        log.info("confidences are taken as they are: %s", error)
        return None
    log.info("confidences are calibrated by %s", path)
    return calibration
