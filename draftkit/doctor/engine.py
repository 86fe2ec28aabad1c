"""What the engine that will run the pair makes of this drafter, and its version."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from draftkit.doctor.findings import Finding
from draftkit.draft.drafter import DrafterShape
from draftkit.handover.engines import Engine


def check_engine(engine: Engine, config: DrafterShape, folder: Path) -> tuple[list[Finding], list[str]]:
    """What it refuses or runs otherwise, and what its owner must know."""
    handed = f"hand it over: draftkit export --for {engine.name}, which says what can be done"
    findings = [
        Finding(f"{engine.name}", f"does not load this drafter: {reason}", "it does not run at all", handed)
        for reason in engine.refusals(config)
    ]
    findings += [
        Finding(f"{engine.name}", reason, "acceptance there, not the answers", "measure it there: --url")
        for reason in engine.differences(config)
    ]
    if engine.name == "vllm" and "dflash" in folder.name.lower() and config.algorithm == "dspark":
        findings.append(
            Finding(
                "vllm method",
                f"the folder's name {folder.name} holds 'dflash', from which vLLM takes the method",
                "it does not load, or drafts with another layout",
                'give "method": "dspark", or name the folder anew',
            )
        )
    return findings, [*_version(engine), *(f"{engine.name}: {note}" for note in engine.all_notes(config))]


def _version(engine: Engine) -> list[str]:
    checked = f"{engine.name}: the rules were read in version {engine.checked}"
    if not engine.package:
        return [checked]
    try:
        return [f"{checked}, {metadata.version(engine.package)} is installed here"]
    except metadata.PackageNotFoundError:
        return [f"{checked}; it is not installed here"]
