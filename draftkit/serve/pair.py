"""A target and its drafter by name, as an engine with a tokenizer: what the server and `LLM` begin with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.target.tokenizer import load_tokenizer

log = logging.getLogger("draftkit.serve")
EMBEDDED_NAME = "tiny"
_OWN_DRAFTERS = (Path(__file__).parents[1] / "assets" / "tiny" / "drafter", Path("runs/quickstart/drafter/best"))


def open_pair(target: str, drafter: str | None, settings: EngineSettings) -> tuple[Engine, Any]:
    """Load both (slow). `drafter` is a folder, "none", or None: the embedded target then takes its own. Raises
    DraftkitError."""
    tokenizer = load_tokenizer(target)
    folder = find_drafter(target, drafter)
    engine = Engine(target, folder, settings)
    info = engine.info
    log.info("drafter %s (%s), forward %s, %d KV blocks", folder or "none", info.algorithm, info.forward, info.kv_blocks_total)
    return engine, tokenizer


def find_drafter(target: str, drafter: str | None) -> Path | None:
    """The folder of the drafter: the one that was named, none for "none", and for the embedded target, where no word was
    said, the one that came with it or that the quickstart made."""
    if drafter is not None:
        return None if drafter == "none" else Path(drafter)
    if target != EMBEDDED_NAME:
        return None
    found = next((f for f in _OWN_DRAFTERS if (f / "config.json").exists()), None)
    if found is None:
        log.info("there is no drafter for the embedded target yet; make one with: draftkit quickstart --out runs/quickstart")
    return found
