"""What a run has left in its folders, for the report: every part may be missing, as in a run that was cut
off."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftkit.errors import DataError, DraftkitError, reason
from draftkit.evaluate.run import EvalResult
from draftkit.schedule.traces import Traces, load_traces

PLACES = ("", "results", "drafter/best", "best", "bench", "calibration")


@dataclass(frozen=True)
class RunFiles:
    """`results` by temperature; `drafter` is the provenance of the drafter, `stages` seconds by stage,
    `bench` what `draftkit bench` wrote. `missing` names the parts that are not there, in words."""

    folder: Path
    results: tuple[EvalResult, ...]
    drafter: dict[str, Any] | None
    traces: Traces | None
    bench: dict[str, Any] | None
    stages: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]


def read_run(folder: Path) -> RunFiles:
    """Find the files of a run. Raises DataError when it has neither an evaluation nor a drafter, or a file is
    damaged."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of a run, or of an evaluation's results")
    results = tuple(EvalResult.load(path) for path in _found(folder, "evaluate-T*.json"))
    drafter, bench, times = (_json(folder, name) for name in ("draftkit.json", "bench.json", "times.json"))
    if not results and drafter is None:
        raise DataError(
            f"{folder}: has neither evaluate-T*.json nor draftkit.json in it or in "
            f"{', '.join(PLACES[1:])}; give the "
            "folder of a run"
        )
    traces_path = next(iter(_found(folder, "traces.safetensors")), None)
    try:
        traces = load_traces(traces_path) if traces_path else None
    except DraftkitError as error:
        raise DataError(f"{error}; remove it, the report goes without") from error
    parts = {
        "an evaluation (draftkit evaluate)": results,
        "the drafter's provenance (draftkit train)": drafter,
        "recorded proposals (draftkit calibrate)": traces,
        "a load test (draftkit bench)": bench,
    }
    stages = tuple(times.get("stages", [])) if times else ()
    missing = tuple(name for name, part in parts.items() if not part)
    return RunFiles(folder, results, drafter, traces, bench, stages, missing)


def _found(folder: Path, pattern: str) -> list[Path]:
    """Files of a name in the first place that has one."""
    return next((files for place in PLACES if (files := sorted((folder / place).glob(pattern)))), [])


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    path = next(iter(_found(folder, name)), None)
    if path is None:
        return None
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: is damaged ({reason(error)}); remove it, the report goes without"
        ) from error
    if not isinstance(said, dict):
        raise DataError(
            f"{path}: is a {type(said).__name__}, not a mapping; remove it, the report goes without"
        )
    return said
