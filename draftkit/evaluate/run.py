"""Evaluation of a target and a drafter on prompts: one record per prompt, aggregates, speed in the same
run."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from draftkit import __version__
from draftkit.decode import Decoded, decode
from draftkit.draft.drafter import Drafter
from draftkit.engine.answers import decode_all, sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.paged_model import unsupported
from draftkit.engine.settings import EngineSettings
from draftkit.errors import DataError
from draftkit.evaluate.metrics import (
    ANSWER_PLACES,
    CONTEXT_TOKENS,
    Interval,
    PromptRecord,
    acceptance_by_position,
    accepted_length,
    domains_of,
    lengths_by_place,
    macro_accepted_length,
    record_of,
)
from draftkit.evaluate.speed import Speed, measure_speed
from draftkit.ops.sampling import Sampling
from draftkit.ops.verify import TOKEN_RULE
from draftkit.output import as_json, write_text
from draftkit.progress import SILENT, Bar
from draftkit.settings import EvaluateSettings
from draftkit.target.transformers import TransformersTarget
from draftkit.train.parallel import ALONE, World

Tick = Callable[[], None]


@dataclass(frozen=True)
class EvalPrompt:
    """A rendered prompt: its token ids and where it belongs."""

    prompt_id: str
    domain: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class EvalResult:
    """Everything that a table or a plot is drawn from; `save` writes it as one JSON file."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    accepted_len: dict[str, Interval]  # by domain, and "macro"
    acceptance: dict[str, list[float]]  # conditional acceptance by position, by domain, and "all"
    speed: dict[str, Speed]  # by domain, and "all"; empty when nothing was timed
    records: tuple[PromptRecord, ...]
    # accepted length by place: "answer" counts tokens of the answer, "context" those of prompt and answer
    by_place: dict[str, dict[str, float]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON (NaN as null), the file replaced in one rename."""
        write_text(path, as_json(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> EvalResult:
        """Read what `save` wrote. Raises DataError when the file is damaged."""
        try:
            raw = json.loads(path.read_text("utf-8"))
            return cls(
                environment=raw["environment"],
                settings=dict(raw["settings"]),
                accepted_len={k: Interval(**_with_nan(v)) for k, v in raw["accepted_len"].items()},
                acceptance={
                    k: list(_with_nan(dict(enumerate(v))).values()) for k, v in raw["acceptance"].items()
                },
                speed={k: Speed(**v) for k, v in raw["speed"].items()},
                records=tuple(_record(r) for r in raw["records"]),
                by_place=dict(raw.get("by_place", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: is not an evaluation result ({error}); remove it and evaluate again"
            ) from error


def evaluate(
    target: TransformersTarget,
    drafter: Drafter,
    prompts: Sequence[EvalPrompt],
    settings: EvaluateSettings,
    sampling: Sampling,
    bar: Bar = SILENT,
    world: World = ALONE,
) -> EvalResult:
    """Answer every prompt with the drafter, `batch_size` at a time by the engine, or one by one by the
    reference loop; `speed_prompts` of every domain are answered once more for the speed, see `measure_speed`.

    Several processes share the prompts, and all return the same records; the first one measures the speed.
    The seed of a prompt is the base seed plus its index, so that results do not depend on order or process
    count. `bar` counts the prompts, and those of the speed in a part of its own. Raises DataError for a
    prompt that does not fit.
    """
    own = range(world.rank, len(prompts), world.size)
    decoded = _answers(target, drafter, prompts, own, settings, sampling, lambda: bar.update(advance=1))
    found = [
        (
            i,
            replace(
                record_of(d, prompts[i].prompt_id, prompts[i].domain, drafter.gamma),
                prompt_tokens=len(prompts[i].tokens),
            ),
        )
        for i, d in zip(own, decoded, strict=True)
    ]
    records = [record for _, record in sorted(world.collect(found), key=lambda pair: pair[0])]
    speed = {}
    if world.first:
        timed, limit = speed_prompts(prompts, settings.speed_prompts), settings.max_new_tokens
        with bar.part(f"speed T={sampling.temperature:g}", sum(map(len, timed.values()))) as part:
            tick = lambda: part.update(advance=1)  # noqa: E731
            speed = measure_speed(target, drafter, timed, sampling, limit, tick)
    return result_of(target, records, settings, sampling, speed)


def result_of(
    target: TransformersTarget,
    records: Sequence[PromptRecord],
    settings: EvaluateSettings,
    sampling: Sampling,
    speed: dict[str, Speed],
) -> EvalResult:
    """The aggregates of some records, with what they were made by."""
    domains = {d: [r for r in records if r.domain == d] for d in domains_of(records)}
    lengths = {d: accepted_length(chosen) for d, chosen in domains.items()}
    return EvalResult(
        environment=environment(target.device),
        settings=asdict(settings)
        | {
            "sampling": asdict(sampling),
            "rule": TOKEN_RULE.name,
            "target": target.info.name,
            "prompts": len(records),
        },
        accepted_len=lengths | {"macro": macro_accepted_length(records)},
        acceptance={d: acceptance_by_position(chosen) for d, chosen in domains.items()}
        | {"all": acceptance_by_position(records)},
        speed=speed,
        records=tuple(records),
        by_place={
            "answer": lengths_by_place(records, ANSWER_PLACES),
            "context": lengths_by_place(records, CONTEXT_TOKENS, context=True),
        },
    )


def _answers(
    target: TransformersTarget,
    drafter: Drafter,
    prompts: Sequence[EvalPrompt],
    chosen: Sequence[int],
    settings: EvaluateSettings,
    sampling: Sampling,
    tick: Tick,
) -> list[Decoded]:
    """Answers to the chosen prompts, of the whole proposal every round, by the engine or, one at a time, by
    the reference loop."""
    asked = [(prompts[i].tokens, settings.seed + i) for i in chosen]
    limit = settings.max_new_tokens
    if settings.batch_size > 1 and not unsupported(target):
        engine = Engine(
            target, drafter, EngineSettings(plan="fixed", max_running=settings.batch_size, prefix_reuse=False)
        )
        requests = [(tokens, sampling_params(sampling, limit, seed)) for tokens, seed in asked]
        return decode_all(engine, requests, tick)
    decoded = []
    for tokens, seed in asked:
        decoded.append(decode(target, drafter, tokens, sampling, limit, seed))
        tick()
    return decoded


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and hardware that a result was made with; `device`: where it was computed, None = on the
    CPU."""
    return {
        "draftkit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(device: torch.device | None = None) -> str:
    """What the hardware calls itself, or the processor without a device."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() says "x86_64" there
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def speed_prompts(prompts: Sequence[EvalPrompt], each: int) -> dict[str, list[tuple[int, ...]]]:
    """Token ids of the first `each` prompts of every domain."""
    by_domain: dict[str, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt.tokens)
    return {domain: found[:each] for domain, found in by_domain.items()}


def _record(raw: dict[str, Any]) -> PromptRecord:
    lists = {
        k: tuple(tuple(x) if isinstance(x, list) else x for x in v)
        for k, v in raw.items()
        if isinstance(v, list)
    }
    return PromptRecord(**(raw | lists))


def _with_nan(values: dict[Any, Any]) -> dict[Any, float]:
    return {k: float("nan") if v is None else v for k, v in values.items()}
