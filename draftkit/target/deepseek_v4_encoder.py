"""DeepSeek's package `deepseek-recipe` as it is installed: whether it is, what it writes, and which
generation of its encoder a checkpoint's name says."""

from __future__ import annotations

import hashlib
import re
from importlib import import_module
from typing import Any

from draftkit.errors import TargetError
from draftkit.target.deepseek_v4_messages import tool_of

INSTALL = "pip install 'draftkit[deepseek]'"
_OFFICIAL = re.compile(r"DeepSeek-V4-(?:Flash|Pro)-\d{4}")
_PREVIEW = re.compile(r"DeepSeek-V4-(?:Flash|Pro)(?:-DSpark|-Base)?")
_PROBE = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A", "reasoning_content": "R"},
    {"role": "user", "content": "V"},
)
_PROBE_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def generation(name: str) -> str | None:
    """The generation, "official" or "preview", that a checkpoint's name says; None for another name."""
    last = name.rstrip("/").split("/")[-1]
    if _OFFICIAL.fullmatch(last):
        return "official"
    return "preview" if _PREVIEW.fullmatch(last) else None


def load_recipe() -> Any:
    """DeepSeek's package. Raises TargetError that says what to install."""
    try:
        return import_module("deepseek_recipe")
    except ImportError as error:
        raise TargetError(
            f"DeepSeek-V4 is spoken to through deepseek-recipe, which is missing: {INSTALL}"
        ) from error


def encoder_digest() -> str:
    """sha256 of what the installed encoder makes of a fixed conversation, in each mode."""
    recipe, told = load_recipe(), []
    for thinking, effort in ((False, None), (True, "low"), (True, "high"), (True, "max")):
        messages = [
            recipe.AssistantMessage(m["content"], m.get("reasoning_content"))
            if m["role"] == "assistant"
            else (recipe.SystemMessage if m["role"] == "system" else recipe.UserMessage)(m["content"])
            for m in _PROBE
        ]
        conversation = recipe.Conversation(
            messages, thinking_mode=thinking, reasoning_effort=effort, tools=[tool_of(recipe, _PROBE_TOOL)]
        )
        told.append(recipe.DeepseekV4Encoding().render_conversation(conversation).prompt)
    return hashlib.sha256("\0".join(told).encode()).hexdigest()
