"""Which prompt format a tokenizer has: DeepSeek-V4's encoder, or its own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from draftkit.target.deepseek_v4_prompts import DeepseekFormat, speaks_deepseek_v4
from draftkit.target.template_format import TemplateFormat


def format_of(
    tokenizer: Any, switches: Mapping[str, Any] | None = None, today: date | None = None
) -> TemplateFormat | DeepseekFormat:
    """The tokenizer's prompt format with these switches. Raises ConfigError for switches that it does not
    have, TargetError when a package for it is missing."""
    made = DeepseekFormat if speaks_deepseek_v4(tokenizer) else TemplateFormat
    return made(tokenizer, switches, today)
