"""A target's tokenizer and chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from draftkit.errors import TargetError
from draftkit.target.transformers import resolve_target

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The target's fast tokenizer. Raises TargetError when there is none or it has no chat template."""
    source = resolve_target(path, revision)
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in TOKENIZER_FILES):
        raise TargetError(f"{path}: has no tokenizer.json; save the tokenizer into the folder too")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TargetError(f"{path}: cannot load a tokenizer: {lines[0]}") from error
    if not tokenizer.is_fast or not tokenizer.chat_template:
        raise TargetError(f"{path}: a fast tokenizer with a chat template is needed; add one to the folder")
    return tokenizer


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template's text."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the whole tokenizer (vocabulary, merges, special tokens)."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
