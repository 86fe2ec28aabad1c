"""The stages of scheduling, each from files to files: record traces, calibrate, profile, simulate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from draftkit.draft.drafter import Drafter
from draftkit.engine.answers import answerer
from draftkit.errors import ScheduleError
from draftkit.evaluate.profile import ProfileSettings, plot_step_rate, profile
from draftkit.evaluate.run import EvalPrompt
from draftkit.evaluate.schedule_plots import plot_reliability, plot_simulation
from draftkit.ops.sampling import Sampling
from draftkit.output import one_writer
from draftkit.progress import progress_bar
from draftkit.schedule.calibration import Calibration, load_calibration, save_calibration
from draftkit.schedule.machines import MACHINES
from draftkit.schedule.record import TraceItem, TraceSettings, record_traces
from draftkit.schedule.simulate import Load, Outcome, arms_for, parametric_table, simulate
from draftkit.schedule.step_rate_table import StepRateTable, load_step_rate, save_step_rate
from draftkit.schedule.temperature_scaling import Quality, fit_calibration, quality_of
from draftkit.schedule.traces import Origin, Traces, join_traces, load_traces, save_traces
from draftkit.settings import GenerateSettings
from draftkit.target.fingerprint import fingerprint
from draftkit.target.place import SMOLLM2_PAIR
from draftkit.target.transformers import TransformersTarget

FEW_PROMPTS = 30  # below so many a simulated speed says little
TRACES, CALIBRATION, STEP_RATE = "traces.safetensors", "calibration.json", "step_rate.json"


@one_writer(file=True)
def run_record(
    target: TransformersTarget,
    drafter: Drafter,
    folder: Path,
    prompts: Sequence[EvalPrompt],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    out: Path,
) -> Traces:
    """Answer all prompts and record traces into `out`, or read them from there when the file is of this very
    recording.

    Parts of 48 prompts are kept beside it until all are there, so an interrupted run goes on where it was.
    `folder` is where the drafter was loaded from. Raises ScheduleError when a file is there and of another
    pair, prompts or settings, and when no answer has two tokens.
    """
    about, own = target.info, fingerprint(folder)
    prompts_hash = hashlib.sha256(repr(tuple(prompts)).encode()).hexdigest()
    origin = Origin(
        about.name, about.fingerprint, own, sampling.temperature, prompts_hash, max_new_tokens, seed
    )
    if out.exists():
        return _read_own(out, origin)
    settings, parts = (
        GenerateSettings(sampling.temperature, sampling.top_k, sampling.top_p, max_new_tokens),
        [],
    )
    answer_all = answerer(target, settings.batch_size)
    with progress_bar("record", len(prompts)) as bar:
        for first in range(0, len(prompts), settings.batch_size):
            batch = prompts[first : first + settings.batch_size]
            name = hashlib.sha256(repr((origin, first)).encode()).hexdigest()[:16]
            part = out.with_name(f"{out.name}.{name}.part")
            if not part.exists():
                seeds = [(seed, first + i) for i in range(len(batch))]
                answers = answer_all([p.tokens for p in batch], seeds, settings)
                pairs = zip(batch, answers, strict=True)
                items = [TraceItem(p.prompt_id, p.domain, p.tokens, a.tokens) for p, a in pairs]
                kept = TraceSettings(sampling, seed + 1 + first)
                traces = record_traces(target, drafter, items, kept, own, lambda n: bar.update(advance=n))
                save_traces(replace(traces, origin=origin), part)
            parts.append(part)
            bar.update(completed=first + len(batch))  # answers of one token are not traced
    traces = join_traces([_read_own(p, origin) for p in parts])
    if traces.prompts:
        save_traces(traces, out)
    for part in parts:
        part.unlink()
    if not traces.prompts:
        raise ScheduleError(
            f"{len(prompts)} prompts, none with an answer of two tokens or more, so nothing was drafted; "
            f"give other prompts"
        )
    return traces


def _read_own(path: Path, origin: Origin) -> Traces:
    traces = load_traces(path)
    traces.check_origin(origin, path)
    return traces


@dataclass(frozen=True)
class CalibrationReport:
    """The calibration, and its measures on prompts that it was not fitted on."""

    calibration: Calibration
    before: Quality
    after: Quality
    fitted_rows: int
    held_out_rows: int
    missing: int  # confidences that were no numbers, taken as zero
    prompts: int
    refused: bool = False  # what was fitted made the held-out prompts worse: the confidences stay as they are


@one_writer()
def run_calibrate(traces: Traces, out: Path) -> CalibrationReport:
    """Fit on every other prompt, measure on the rest, write `calibration.json` and `reliability.png` into
    `out`.

    Where the fitted temperatures make the error on the held-out half larger, they are not taken: the file
    then holds temperatures of 1. Raises ScheduleError for a drafter without a confidence head and for traces
    of fewer than two prompts.
    """
    if len(traces.prompts) < 2:
        raise ScheduleError(
            f"{out / TRACES}: holds answers to {len(traces.prompts)} prompt; calibration fits on one half "
            f"and measures on the "
            "other: remove it and give two prompts or more"
        )
    if not traces.has_confidence:
        raise ScheduleError(
            "this drafter has no confidence head, so there is nothing to calibrate; serving estimates it"
        )
    fitted, held_out = traces.rows_of(traces.prompts[::2]), traces.rows_of(traces.prompts[1::2])
    confidence_NG = traces.confidence_NG.astype(np.float64)
    kept_NG, usable_NG = traces.labels()
    calibration = replace(
        fit_calibration(confidence_NG[fitted], kept_NG[fitted], usable_NG[fitted]),
        drafter_fingerprint=traces.origin.drafter_fingerprint,
        dataset=f"{len(traces.prompts[::2])} prompts, temperature {traces.origin.temperature:g}",
    )
    held = (kept_NG[held_out], usable_NG[held_out])
    calibrated_NG = calibration.apply(confidence_NG[held_out])
    before, after = quality_of(confidence_NG[held_out], *held), quality_of(calibrated_NG, *held)
    refused = float(np.nanmean(after.ece)) > float(np.nanmean(before.ece))
    if refused:
        ones = (1.0,) * len(calibration.temperatures)
        calibration = replace(calibration, temperatures=ones, ece_after=calibration.ece_before)
    report = CalibrationReport(
        calibration,
        before,
        after,
        len(fitted),
        len(held_out),
        int(np.isnan(confidence_NG).sum()),
        len(traces.prompts),
        refused,
    )
    save_calibration(calibration, out / CALIBRATION)
    plot_reliability(confidence_NG[held_out], calibrated_NG, *held, out / "reliability.png")
    return report


def run_profile(
    target: TransformersTarget,
    drafter: Drafter | None,
    folder: Path | None,
    settings: ProfileSettings,
    out: Path,
) -> StepRateTable:
    """Measure, write the step-rate file and its plot beside it."""
    points = len(settings.tokens) * len(settings.contexts) + (
        len(settings.requests) if drafter is not None else 0
    )
    with progress_bar("profile", points * settings.repeats) as bar:
        own = fingerprint(folder) if folder else ""
        table = profile(target, drafter, own, settings, lambda: bar.update(advance=1))
    save_step_rate(table, out)
    plot_step_rate(table, out.with_suffix(".png"))
    return table


@dataclass(frozen=True)
class SimulationInput:
    """What a simulation runs on, and what is assumed about it."""

    traces: Traces
    table: StepRateTable
    calibration: Calibration | None
    assumptions: tuple[str, ...]


def open_simulation(traces: Path | None, step_rate: str | None, calibration: Path | None) -> SimulationInput:
    """Read files; without traces those of SmolLM2 and its drafter, with their calibration and step rate.

    `step_rate` is a file or one of MACHINES. Raises ScheduleError when the parts belong to different pairs.
    """
    read = load_traces(traces or SMOLLM2_PAIR / TRACES)
    own = None if traces else SMOLLM2_PAIR / CALIBRATION
    chosen = calibration or own
    temperatures = load_calibration(chosen, read.gamma, read.origin.drafter_fingerprint) if chosen else None
    notes = (
        [] if temperatures or not read.has_confidence else ["confidences are taken as they are, uncalibrated"]
    )
    if not read.has_confidence:
        notes.append("the drafter has no confidence head: confidences come from the online estimator")
    elif missing := int(np.isnan(read.confidence_NG).sum()):
        notes.append(f"{missing} confidences are no numbers and count as zero")
    if traces is None:
        notes.append("proposals are those of SmolLM2-135M and its drafter")
    if len(read.prompts) < FEW_PROMPTS:
        notes.append(
            f"only {len(read.prompts)} prompts were traced: record {FEW_PROMPTS} or more for a figure"
        )
    if step_rate in MACHINES:
        free, tile = MACHINES[step_rate]
        notes.append(
            f"{step_rate}: a pass costs 10 ms up to {free} tokens and grows in proportion above, padded "
            f"to {tile}s"
        )
        return SimulationInput(read, parametric_table(free, tile), temperatures, tuple(notes))
    if step_rate is None and traces is not None:
        raise ScheduleError(f"--step-rate: give a file of draftkit profile, or one of {', '.join(MACHINES)}")
    table = load_step_rate(Path(step_rate) if step_rate else SMOLLM2_PAIR / STEP_RATE)
    table.check_target(read.origin.target_fingerprint)
    return SimulationInput(read, table, temperatures, tuple(notes))


def run_simulate(
    source: SimulationInput, loads: Sequence[Load], out: Path | None
) -> tuple[list[Outcome], tuple[str, ...]]:
    """Every arm at every load, in order of loads, and what was assumed; `simulation.png` in `out`, if there
    is one."""
    gamma, longest = source.traces.gamma, max(p.prompt_tokens + p.rows for p in source.traces.prompts)
    most = max(load.concurrency for load in loads) * (gamma + 1)
    arms, outcomes = arms_for(gamma), []
    with progress_bar("simulate", len(arms) * len(loads)) as bar:
        for load in loads:
            for name, arm in arms.items():
                outcomes.append(simulate(source.traces, source.table, load, name, arm, source.calibration))
                bar.update(advance=1)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot_simulation(outcomes, out / "simulation.png")
    return outcomes, (*source.assumptions, *source.table.assumptions(most, longest))
