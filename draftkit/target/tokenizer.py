"""A target's tokenizer and chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from draftkit.errors import TargetError
from draftkit.target.deepseek_v4_encoder import INSTALL, encoder_digest, load_recipe
from draftkit.target.deepseek_v4_prompts import speaks_deepseek_v4
from draftkit.target.loading import model_type, resolve_target

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_tokenizer(path: str, revision: str | None = None, template: bool = True) -> Any:
    """The target's fast tokenizer. Raises TargetError when there is none, or, with `template`, when it has no
    chat template."""
    source = resolve_target(path, revision)
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in TOKENIZER_FILES):
        raise TargetError(f"{path}: has no tokenizer.json; save the tokenizer into the folder too")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TargetError(f"{path}: cannot load a tokenizer: {lines[0]}") from error
    if model_type(source, revision) == "deepseek_v4":
        if not speaks_deepseek_v4(tokenizer):
            raise TargetError(
                f"{path}: DeepSeek-V4 is spoken to through deepseek-recipe ({INSTALL}), not through a chat "
                "template; give DeepSeek's own tokenizer, without a template"
            )
        load_recipe()
        return tokenizer
    if not tokenizer.is_fast:
        raise TargetError(f"{path}: a fast tokenizer is needed; add its tokenizer.json to the folder")
    if template and not tokenizer.chat_template:
        raise TargetError(f"{path}: a tokenizer with a chat template is needed; add one to the folder")
    return tokenizer


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template's text; of DeepSeek-V4, which has none, of what its encoder writes."""
    if speaks_deepseek_v4(tokenizer):
        return encoder_digest()
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the whole tokenizer (vocabulary, merges, special tokens)."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
