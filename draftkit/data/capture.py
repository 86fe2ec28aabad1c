"""Capture: the target reads conversations, and what it thought goes into a feature store, shard by shard."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftkit.data.conversations import Conversation
from draftkit.data.features import MANIFEST, SampleEntry, StoreManifest, read_manifest, write_manifest, write_shard
from draftkit.data.template import Rendered, RewrittenError, render_conversation
from draftkit.errors import FeatureStoreError
from draftkit.target.tokenizer import template_hash, tokenizer_hash
from draftkit.target.transformers import DTYPES, TransformersTarget, check_feature_layers

SHARD_CONVERSATIONS = 256
MADE_FROM = {  # fields of a manifest in words, where their names are not
    "fingerprint": "another target",
    "feature_layers": "other feature layers",
    "template_hash": "another chat template",
    "tokenizer_hash": "another tokenizer",
    "conversations_hash": "other conversations",
}
SPARE_BYTES = 256 * 2**20  # left free on the disk


@dataclass(frozen=True)
class CaptureSettings:
    """What is captured. Conversations longer than `max_length` tokens are left out and counted."""

    feature_layers: tuple[int, ...]
    max_length: int = 1024
    batch_tokens: int = 8192
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class CaptureReport:
    """What was captured: conversations, tokens, and how many were left out as too long, without an answer, or rewritten by
    the chat template."""

    conversations: int
    tokens: int
    too_long: int
    without_answer: int
    rewritten: int

    def left_out(self) -> str:
        """How many conversations were left out, and why."""
        rewritten = f"{self.rewritten} rewritten by the chat template"
        return f"{self.too_long} too long, {self.without_answer} without an answer, {rewritten}"


def capture(
    target: TransformersTarget,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    out: Path,
    settings: CaptureSettings,
    tick: Callable[[int], None] = lambda conversations: None,
) -> CaptureReport:
    """Fill the store in `out`; shards that are there already are kept, so that an interrupted capture goes on.

    Raises FeatureStoreError when `out` holds a store of something else or the disk has too little room, DataError when the
    chat template refuses a conversation.
    """
    check_feature_layers(settings.feature_layers, target.info.num_layers)
    rendered = _render(tokenizer, conversations)
    usable = [(c, r) for c, r in rendered if any(r.loss_mask) and len(r.tokens) <= settings.max_length]
    usable.sort(key=lambda item: (len(item[1].tokens), item[0].id))
    tokens = sum(len(r.tokens) for _, r in usable)
    report = CaptureReport(
        len(usable),
        tokens,
        sum(len(r.tokens) > settings.max_length for _, r in rendered),
        sum(not any(r.loss_mask) for _, r in rendered),
        len(conversations) - len(rendered),
    )
    if not usable:
        none = f"none of {len(conversations)} conversations has an answer within {settings.max_length} tokens"
        raise FeatureStoreError(f"{none} ({report.left_out()}); give others")
    manifest = _open(target, tokenizer, usable, out, settings)
    parts = range(0, len(usable), SHARD_CONVERSATIONS)
    done = {shard.file for shard in manifest.shards if (out / shard.file).exists()}
    manifest = replace(manifest, shards=tuple(s for s in manifest.shards if s.file in done))
    left = [p for i, p in enumerate(parts) if _name(i) not in done]
    left_tokens = sum(len(r.tokens) for p in left for _, r in usable[p : p + SHARD_CONVERSATIONS])
    check_room(out, left_tokens * bytes_per_token(target, settings))
    for number, start in enumerate(parts):
        part = usable[start : start + SHARD_CONVERSATIONS]
        if _name(number) not in done:
            tensors = _read(target, [r for _, r in part], settings)
            shard = write_shard(out, _name(number), tensors, _entries(part))
            manifest = replace(manifest, shards=tuple(sorted((*manifest.shards, shard), key=lambda s: s.file)))
            write_manifest(out, manifest)
        tick(len(part))
    return report


def _render(tokenizer: Any, conversations: Sequence[Conversation]) -> list[tuple[Conversation, Rendered]]:
    """The conversations that the chat template does not rewrite."""
    rendered = []
    for conversation in conversations:
        with suppress(RewrittenError):
            rendered.append((conversation, render_conversation(tokenizer, conversation)))
    return rendered


def bytes_per_token(target: TransformersTarget, settings: CaptureSettings) -> int:
    """Disk bytes of one captured token."""
    width = (len(settings.feature_layers) + 1) * target.info.hidden_size
    return width * DTYPES[settings.dtype].itemsize + 9


def check_room(folder: Path, needed: int) -> None:
    """Raise FeatureStoreError when the disk under `folder` has less than `needed` bytes to spare."""
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    if needed > free:
        raise FeatureStoreError(
            f"{folder}: {needed / 2**30:.2f} GiB are needed, {max(0, free) / 2**30:.2f} GiB are free; "
            "free some, choose another disk, fewer conversations or fewer feature layers"
        )


def _name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _entries(part: Sequence[tuple[Conversation, Rendered]]) -> tuple[SampleEntry, ...]:
    entries, start = [], 0
    for conversation, rendered in part:
        entries.append(SampleEntry(conversation.id, conversation.domain, start, len(rendered.tokens)))
        start += len(rendered.tokens)
    return tuple(entries)


def _open(
    target: TransformersTarget,
    tokenizer: Any,
    usable: Sequence[tuple[Conversation, Rendered]],
    out: Path,
    settings: CaptureSettings,
) -> StoreManifest:
    digest = hashlib.sha256(json.dumps([[c.id, c.domain, r.tokens] for c, r in usable]).encode()).hexdigest()
    wanted = StoreManifest(
        target=target.info.name,
        fingerprint=target.info.fingerprint,
        feature_layers=tuple(sorted(settings.feature_layers)),
        template_hash=template_hash(tokenizer),
        tokenizer_hash=tokenizer_hash(tokenizer),
        conversations_hash=digest,
        conversations=len(usable),
        dtype=settings.dtype,
        hidden_size=target.info.hidden_size,
    )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).exists():
        write_manifest(out, wanted)
        return wanted
    found = read_manifest(out)
    differing = [k for k, v in wanted.made_from().items() if found.made_from()[k] != v]
    if differing:
        what = MADE_FROM.get(differing[0], f"another {differing[0].replace('_', ' ')}")
        raise FeatureStoreError(f"{out}: holds a store of {what}; choose another folder or remove it")
    return found


def _read(target: TransformersTarget, part: Sequence[Rendered], settings: CaptureSettings) -> dict[str, Tensor]:
    """Features of the conversations laid end to end; batches of similar length, padded on the right."""
    features, hidden = [], []
    layers = tuple(sorted(settings.feature_layers))
    size = max(1, settings.batch_tokens // max(len(r.tokens) for r in part))
    for start in range(0, len(part), size):
        batch = part[start : start + size]
        longest = max(len(r.tokens) for r in batch)
        tokens_BT = torch.tensor([[*r.tokens, *[0] * (longest - len(r.tokens))] for r in batch])
        output = target.forward(tokens_BT.to(target.device), None, layers)  # causal: padding behind changes nothing
        if output.features_BTF is None:
            raise FeatureStoreError("the target returned no features")
        for row, r in enumerate(batch):
            features.append(output.features_BTF[row, : len(r.tokens)].to("cpu", DTYPES[settings.dtype]))
            hidden.append(output.last_hidden_BTH[row, : len(r.tokens)].to("cpu", DTYPES[settings.dtype]))
    return {
        "tokens": torch.tensor([t for r in part for t in r.tokens]),
        "loss_mask": torch.tensor([m for r in part for m in r.loss_mask]),
        "features": torch.cat(features),
        "last_hidden": torch.cat(hidden),
    }
