"""The stages of scheduling, each from files to files: record traces, calibrate, profile, simulate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from draftkit.data.generate import GenerateSettings, answer_batch
from draftkit.draft.drafter import Drafter
from draftkit.evaluate.run import EvalPrompt
from draftkit.ops.sampling import Sampling
from draftkit.ops.verify import TOKEN_RULE
from draftkit.schedule.record import TraceItem, TraceSettings, record_traces
from draftkit.schedule.traces import Traces, load_traces, save_traces
from draftkit.stages import progress_bar
from draftkit.target.fingerprint import fingerprint
from draftkit.target.transformers import TransformersTarget


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
    """Answer all prompts and record traces into `out`, or read them from there when the file is of this very pair.

    `folder` is where the drafter was loaded from. Raises ScheduleError when the file is there and of another pair.
    """
    own = fingerprint(folder)
    if out.exists():
        traces = load_traces(out)
        traces.check_origin(target.info.fingerprint, own)
        return traces
    settings, items = GenerateSettings(sampling, max_new_tokens, seed=seed), []
    with progress_bar("record", 2 * len(prompts)) as (bar, task):
        for first in range(0, len(prompts), settings.batch_size):
            batch = prompts[first : first + settings.batch_size]
            seeds = [(seed, first + i) for i in range(len(batch))]
            answers = answer_batch(target, [p.tokens for p in batch], seeds, settings)
            items += [
                TraceItem(p.prompt_id, p.domain, p.tokens, a.tokens) for p, a in zip(batch, answers, strict=True)
            ]
            bar.update(task, advance=len(batch))
        recording = TraceSettings(sampling, TOKEN_RULE, seed + 1)
        traces = record_traces(target, drafter, items, recording, own, lambda n: bar.update(task, advance=n))
    save_traces(traces, out)
    return traces
