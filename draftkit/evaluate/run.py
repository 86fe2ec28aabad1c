"""Evaluation of a target and a drafter on prompts: one record per prompt, aggregates, speed in the same run."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from draftkit import __version__
from draftkit.decode import Decoded, decode
from draftkit.draft.drafter import Drafter
from draftkit.errors import DataError
from draftkit.evaluate.metrics import (
    Interval,
    PromptRecord,
    acceptance_by_position,
    accepted_length,
    domains_of,
    macro_accepted_length,
    record_of,
)
from draftkit.ops.sampling import Sampling
from draftkit.ops.verify import TOKEN_RULE, Rule
from draftkit.target.interface import Target

Tick = Callable[[], None]


@dataclass(frozen=True)
class EvalPrompt:
    """A rendered prompt: its token ids and where it belongs."""

    prompt_id: str
    domain: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate. `speed_prompts` prompts, spread over the domains, are also decoded plainly; 0 for none."""

    sampling: Sampling
    max_new_tokens: int = 128
    seed: int = 980406
    speed_prompts: int = 15
    threads: int | None = None


@dataclass(frozen=True)
class Speed:
    """Tokens per second of drafting over plain decoding, prompt by prompt: the median ratio and its quartiles."""

    prompts: int
    ratio: float
    low_quartile: float
    high_quartile: float
    plain_tokens_per_s: float
    drafting_tokens_per_s: float


@dataclass(frozen=True)
class EvalResult:
    """Everything that a table or a plot is drawn from; `save` writes it as one JSON file."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    accepted_len: dict[str, Interval]  # by domain, and "macro"
    acceptance: dict[str, list[float]]  # conditional acceptance by position, by domain, and "all"
    speed: Speed | None
    records: tuple[PromptRecord, ...]

    def save(self, path: Path) -> None:
        """Write as JSON (NaN as null), the file replaced in one rename."""
        text = json.dumps(_without_nan(asdict(self)), indent=1)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> EvalResult:
        """Read what `save` wrote. Raises DataError when the file is damaged."""
        try:
            raw = json.loads(path.read_text("utf-8"))
            return cls(
                environment=raw["environment"],
                settings=raw["settings"],
                accepted_len={k: Interval(**_with_nan(v)) for k, v in raw["accepted_len"].items()},
                acceptance={k: list(_with_nan(dict(enumerate(v))).values()) for k, v in raw["acceptance"].items()},
                speed=Speed(**raw["speed"]) if raw["speed"] else None,
                records=tuple(_record(r) for r in raw["records"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is not an evaluation result ({error}); remove it and evaluate again") from error


def evaluate(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[EvalPrompt],
    settings: EvalSettings,
    rule: Rule = TOKEN_RULE,
    tick: Tick = lambda: None,
) -> EvalResult:
    """Decode every prompt with the drafter; decode some of them plainly, in turn, for the speed ratio.

    The seed of a prompt is the base seed plus its index, so that results do not depend on order or process count.
    `tick` is called after every answer.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    timed = set(_spread(prompts, settings.speed_prompts))
    records: list[PromptRecord] = []
    pairs: list[tuple[Decoded, Decoded]] = []
    if prompts:  # the first passes pay for lazy set-up; they are not measured
        for warm in (None, drafter):
            decode(target, warm, prompts[0].tokens, settings.sampling, 8, 0, rule)
    for index, prompt in enumerate(prompts):
        seed = settings.seed + index
        limit = settings.max_new_tokens
        drafted = decode(target, drafter, prompt.tokens, settings.sampling, limit, seed, rule)
        if index in timed:
            pairs.append((decode(target, None, prompt.tokens, settings.sampling, limit, seed, rule), drafted))
        records.append(record_of(drafted, prompt.prompt_id, prompt.domain, drafter.gamma))
        tick()
    domains = {d: [r for r in records if r.domain == d] for d in domains_of(records)}
    lengths = {d: accepted_length(chosen) for d, chosen in domains.items()}
    return EvalResult(
        environment=environment(),
        settings=asdict(settings) | {"rule": rule.name, "target": target.info.name, "prompts": len(prompts)},
        accepted_len=lengths | {"macro": macro_accepted_length(records)},
        acceptance={d: acceptance_by_position(chosen) for d, chosen in domains.items()}
        | {"all": acceptance_by_position(records)},
        speed=_speed(pairs),
        records=tuple(records),
    )


def environment() -> dict[str, Any]:
    """Versions and hardware that stand behind a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "draftkit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() says "x86_64" there
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _speed(pairs: Sequence[tuple[Decoded, Decoded]]) -> Speed | None:
    if not pairs:
        return None

    def rate(decoded: Decoded) -> float:
        return len(decoded.tokens) / (decoded.prefill_seconds + decoded.decode_seconds)

    ratios = sorted(rate(drafted) / rate(plain) for plain, drafted in pairs)
    return Speed(
        prompts=len(pairs),
        ratio=median(ratios),
        low_quartile=ratios[len(ratios) // 4],
        high_quartile=ratios[3 * len(ratios) // 4],
        plain_tokens_per_s=median(rate(plain) for plain, _ in pairs),
        drafting_tokens_per_s=median(rate(drafted) for _, drafted in pairs),
    )


def _spread(prompts: Sequence[EvalPrompt], count: int) -> list[int]:
    """Indices of about `count` prompts, the same number of every domain."""
    by_domain: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_domain.setdefault(prompt.domain, []).append(index)
    each = -(-count // max(1, len(by_domain)))
    return [i for indices in by_domain.values() for i in indices[:each]]


def _record(raw: dict[str, Any]) -> PromptRecord:
    lists = {k: tuple(tuple(x) if isinstance(x, list) else x for x in v) for k, v in raw.items() if isinstance(v, list)}
    return PromptRecord(**(raw | lists))


def _with_nan(values: dict[Any, Any]) -> dict[Any, float]:
    return {k: float("nan") if v is None else v for k, v in values.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and value != value else value
