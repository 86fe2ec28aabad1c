"""A target's tokenizer and chat template."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import AutoTokenizer

from draftkit.errors import TargetError
from draftkit.target.transformers import resolve_target


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The target's fast tokenizer. Raises TargetError when there is none or it has no chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_target(path), revision=revision)
    except (OSError, ValueError) as error:
        raise TargetError(f"{path}: cannot load a tokenizer: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast or not tokenizer.chat_template:
        raise TargetError(f"{path}: a fast tokenizer with a chat template is needed; add one to the folder")
    return tokenizer


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template's text."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the whole tokenizer (vocabulary, merges, special tokens)."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
