"""A small tokenizer with DeepSeek-V4's special tokens; as in its own, markup and thinking tags are not called
special."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from support.targets import TEXTS
from tools.tiny_target.tokenizer import train_tokenizer

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
SPECIAL += [
    f"<｜{name}｜>" for name in ("latest_reminder", "action", "query", "title", "extracted_url", "read_url")
]
MARKUP = ["<think>", "</think>", "｜DSML｜"]


def v4_tokenizer(name: str = "deepseek-ai/DeepSeek-V4-Flash-0731") -> PreTrainedTokenizerFast:
    """Byte-level, so that every text comes back; without a chat template."""
    tokenizer = train_tokenizer(TEXTS)
    tokenizer.add_special_tokens({"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]})
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL[2:]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    tokenizer.chat_template = None
    tokenizer.name_or_path = name
    return tokenizer
