"""A drafter's model card: what it was trained for and on, what was measured with intervals, and how to run
it. It says what it does not know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from draftkit.draft.drafter import DrafterShape
from draftkit.errors import DataError, reason
from draftkit.handover.engines import ENGINES
from draftkit.handover.export import command_for

SERVERS = ("vllm", "sglang", "mlx")  # that load the folder itself


def model_card(
    repo: str,
    config: DrafterShape,
    note: dict[str, Any],
    results: Sequence[dict[str, Any]],
    licence: str | None,
    data: str | None,
) -> str:
    """README.md of a drafter's repository. `note` is the drafter's provenance, `results` what evaluations
    wrote, `data` and `licence` what the owner says of them."""
    target = str(note.get("target") or "a target that its note does not name")
    head: dict[str, Any] = {
        "library_name": "draftkit",
        "tags": ["speculative-decoding", "drafter", config.algorithm],
    }
    head |= {"base_model": target} if "/" in target else {}
    head |= {"license": licence} if licence else {}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# A {config.algorithm} drafter for {target}",
        "It proposes tokens that the target checks: answers keep the target's own distribution, whatever it "
        "proposes.",
        _measured(results),
        _trained(config, note, data),
        _run(repo, config, target),
        "Licence: "
        + (licence or "not stated by its owner; the target's licence applies to its copies of weights."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """What `draftkit evaluate` wrote into a folder, by temperature. Raises DataError when there is nothing,
    or it is damaged."""
    paths = sorted(folder.glob("evaluate-T*.json"))
    if not paths:
        raise DataError(f"{folder}: has no evaluate-T*.json; run draftkit evaluate -d DRAFTER -o {folder}")
    found = []
    for path in paths:
        try:
            said = json.loads(path.read_text("utf-8"))
            said["accepted_len"]["macro"]["value"], said["settings"]["sampling"]["temperature"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path}: is not an evaluation result ({reason(error)}); evaluate again"
            ) from error
        found.append(said)
    return found


def _measured(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return "## Measured\n\nNothing was measured on prompts that were held out."
    lines = [
        "## Measured",
        "",
        "Accepted length: tokens per pass of the target, its own counted. 95 % intervals.",
    ]
    for result in results:
        settings, machine = result["settings"], result.get("environment", {})
        temperature = settings["sampling"]["temperature"]
        lines += ["", f"Temperature {temperature:g}, {settings['prompts']} prompts, at most "]
        lines[-1] += f"{settings['max_new_tokens']} tokens each:"
        lines += ["", "| domain | accepted length | 95 % |", "|---|---|---|"]
        for name, one in result["accepted_len"].items():
            value, low, high = (one[part] for part in ("value", "low", "high"))
            if value is not None:
                lines.append(f"| {name} | {value:.2f} | {low:.2f} to {high:.2f} |")
        speed = (result.get("speed") or {}).get("all")
        if speed:
            lines += [
                "",
                f"Speed, one request at a time in draftkit's engine on {machine.get('device', '?')}: ",
            ]
            lines[-1] += f"{speed['ratio']:.2f} x of that without a drafter ({speed['low']:.2f} to "
            lines[-1] += f"{speed['high']:.2f}, {speed['prompts']} prompts)."
    return "\n".join(lines)


def _trained(config: DrafterShape, note: dict[str, Any], data: str | None) -> str:
    recipe = note.get("recipe") or {}
    said = {
        "target": note.get("target"),
        "target's fingerprint": note.get("target_fingerprint"),
        "chat template (sha256)": note.get("template_hash"),
        "template switches": json.dumps(note["template_switches"]) if "template_switches" in note else None,
        "layers": config.num_layers,
        "drafted tokens": config.gamma,
        "features of target layers (outputs)": ", ".join(map(str, config.feature_layers)),
        "draft vocabulary": config.draft_vocab_size or "the target's",
        "data": data or "not stated by its owner",
        "recipe": recipe.get("name"),
        "steps": note.get("step"),
        "started from": note.get("started_from"),
        "draftkit": note.get("draftkit"),
    }
    rows = [f"| {name} | {value} |" for name, value in said.items() if value is not None]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *rows])


def _run(repo: str, config: DrafterShape, target: str) -> str:
    lines = ["## Run it", "", f"    draftkit serve --target {target} --drafter FOLDER"]
    for name in SERVERS:
        refused = ENGINES[name].refusals(config)
        if refused:
            lines += ["", f"{name} {ENGINES[name].checked} does not load it: {'; '.join(refused)}."]
        else:
            place = Path(repo)
            lines += [
                "",
                f"{name} ({ENGINES[name].checked}):",
                "",
                f"    {command_for(name, config, target, place)}",
            ]
    lines += [
        "",
        "For llama.cpp: `draftkit export --for llama.cpp --target TARGET.gguf`. Engines without a planner ",
    ]
    lines[-1] += "draft all tokens always: `draftkit doctor` says how many pay on a machine."
    return "\n".join(lines)
