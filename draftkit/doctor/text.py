"""Whether the pair is shown text as the drafter was trained on: target, tokenizer, template, switches,
dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from draftkit.doctor.findings import Finding
from draftkit.doctor.pair import Pair
from draftkit.target.tokenizer import template_hash

# from 25 % to 60 % acceptance with the switch as in training: z-lab/dflash#133
_TEMPLATE_COST = "acceptance, often half of it (z-lab/dflash#133)"


def check_text(pair: Pair, switches: dict[str, Any]) -> list[Finding]:
    """All findings of this family. `switches` are the template's variables as the pair will be served.

    A drafter without provenance says nothing of its training, so nothing is found.
    """
    checks = (_target(pair), _template(pair), _switches(pair, switches), _dtype(pair))
    return [finding for found in checks for finding in found]


def _target(pair: Pair) -> Iterator[Finding]:
    made_for, info = pair.note.get("target_fingerprint"), pair.target.info
    if made_for and made_for != info.fingerprint:
        yield Finding(
            "target",
            f"was trained for {pair.note.get('target', 'a target')} ({made_for[:12]}), this one is "
            f"{info.name} ({info.fingerprint[:12]}): other weights, configuration or tokenizer",
            "acceptance, more the more the two differ",
            "serve the target of the training, or train on: draftkit specialise --start-from",
        )


def _template(pair: Pair) -> Iterator[Finding]:
    trained = pair.note.get("template_hash")
    if trained and trained != template_hash(pair.tokenizer):
        yield Finding(
            "chat template",
            "is not the template of the training",
            _TEMPLATE_COST,
            "serve with the training's template (vLLM: --chat-template), or train with this one",
        )


def _switches(pair: Pair, switches: dict[str, Any]) -> Iterator[Finding]:
    trained = pair.note.get("template_switches")
    if trained is not None and trained != switches:
        shown = ", ".join(f"{name}={value}" for name, value in trained.items()) or "none"
        asked = ", ".join(f"{name}={value}" for name, value in switches.items()) or "the template's defaults"
        yield Finding(
            "template switches",
            f"was trained with {shown}, will be served with {asked}",
            _TEMPLATE_COST,
            f"serve with chat_template_kwargs {trained}, or train with {switches}",
        )


def _dtype(pair: Pair) -> Iterator[Finding]:
    method = getattr(pair.target.text_config, "quantization_config", None)
    if method is not None and pair.note.get("recipe"):
        name = method.get("quant_method") if isinstance(method, dict) else type(method).__name__
        yield Finding(
            "target dtype",
            f"the target is quantised ({name}), the features of the training were "
            f"{pair.note['recipe'].get('target', {}).get('dtype', 'not')}",
            "a few percent of acceptance at 8 bits, more at 4",
            "capture and train with the target as it is served",
        )
