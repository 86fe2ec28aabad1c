"""Capture: the target reads conversations, and what it thought goes into a feature store, shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from draftkit.data.conversations import Conversation
from draftkit.data.features import (
    MANIFEST,
    SampleEntry,
    StoreManifest,
    read_manifest,
    write_manifest,
    write_shard,
)
from draftkit.data.samples import Sample, SampleCounts, samples_of
from draftkit.data.spool import SampleSpool
from draftkit.errors import FeatureStoreError
from draftkit.settings import CaptureSettings
from draftkit.target.prompt_format import PromptFormat
from draftkit.target.tokenizer import tokenizer_hash
from draftkit.target.transformers import DTYPES, TransformersTarget, check_feature_layers

SHARD_SAMPLES = 256
MADE_FROM = {  # fields of a manifest in words, where their names are not
    "fingerprint": "another target",
    "feature_layers": "other feature layers",
    "template_hash": "another chat template",
    "tokenizer_hash": "another tokenizer",
    "switches": "other template switches",
    "conversations_hash": "other conversations",
}
SPARE_BYTES = 256 * 2**20  # left free on the disk


@dataclass(frozen=True)
class CaptureReport:
    """What was captured: samples, their tokens and those that the target wrote, and what was left out and
    why."""

    samples: int
    tokens: int
    too_long: int
    counts: SampleCounts

    def left_out(self) -> str:
        """How many conversations and answers were left out, and why; how many answers were cut."""
        c = self.counts
        cut = f"{c.cut} cut answers" + (f", {c.cut_dropped} of them dropped" if c.cut_dropped else "")
        rewritten = f"{c.rewritten} rewritten by the chat template"
        return f"{self.too_long} too long, {c.without_answer} without an answer, {rewritten}, {cut}"


def capture(
    target: TransformersTarget,
    prompt_format: PromptFormat,
    conversations: Iterable[Conversation],
    out: Path,
    feature_layers: tuple[int, ...],
    settings: CaptureSettings,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> CaptureReport:
    """Fill the store in `out`; shards that are there already are kept, so that an interrupted capture goes
    on.

    Raises FeatureStoreError when `out` holds a store of something else or the disk has too little room,
    DataError when the chat template refuses a conversation.
    """
    layers = tuple(sorted(feature_layers))
    check_feature_layers(layers, target.info.num_layers)
    out.mkdir(parents=True, exist_ok=True)
    counts = SampleCounts()
    samples = samples_of(conversations, prompt_format, target.info.vocab_size, counts, settings.cut_answers)
    with SampleSpool(samples, out, settings.max_length) as spool:
        report = CaptureReport(len(spool), spool.tokens, spool.too_long, counts)
        if not len(spool):
            none = (
                f"none of {counts.conversations} conversations has an answer within "
                f"{settings.max_length} tokens"
            )
            raise FeatureStoreError(f"{none} ({report.left_out()}); give others")
        _fill(
            target,
            spool,
            out,
            layers,
            settings,
            _open(target, prompt_format, spool, out, layers, settings),
            tick,
        )
    return report


def _fill(
    target: TransformersTarget,
    spool: SampleSpool,
    out: Path,
    layers: tuple[int, ...],
    settings: CaptureSettings,
    manifest: StoreManifest,
    tick: Callable[[int, int], None],
) -> None:
    """Write the shards that are missing."""
    done = {shard.file for shard in manifest.shards if (out / shard.file).exists()}
    manifest = replace(manifest, shards=tuple(s for s in manifest.shards if s.file in done))
    starts = range(0, len(spool), SHARD_SAMPLES)
    missing = [s for i, s in enumerate(starts) if _name(i) not in done]
    left = sum(int(spool.lengths[s : s + SHARD_SAMPLES].sum()) for s in missing)
    check_room(out, left * bytes_per_token(target, layers, settings))
    for number, start in enumerate(starts):
        end = min(start + SHARD_SAMPLES, len(spool))
        if _name(number) not in done:
            part = spool.part(start, end)
            shard = write_shard(out, _name(number), _read(target, part, layers, settings), _entries(part))
            manifest = replace(
                manifest, shards=tuple(sorted((*manifest.shards, shard), key=lambda s: s.file))
            )
            write_manifest(out, manifest)
        tick(end, len(spool))


def bytes_per_token(target: TransformersTarget, layers: tuple[int, ...], settings: CaptureSettings) -> int:
    """Disk bytes of one captured token."""
    width = (len(layers) + 1) * target.info.hidden_size
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


def _entries(part: Sequence[Sample]) -> tuple[SampleEntry, ...]:
    entries, start = [], 0
    for sample in part:
        entries.append(SampleEntry(sample.id, sample.domain, start, len(sample.tokens), sample.conversation))
        start += len(sample.tokens)
    return tuple(entries)


def _open(
    target: TransformersTarget,
    prompt_format: PromptFormat,
    spool: SampleSpool,
    out: Path,
    layers: tuple[int, ...],
    settings: CaptureSettings,
) -> StoreManifest:
    wanted = StoreManifest(
        target=target.info.name,
        fingerprint=target.info.fingerprint,
        feature_layers=layers,
        template_hash=prompt_format.digest,
        tokenizer_hash=tokenizer_hash(prompt_format.tokenizer),
        conversations_hash=spool.digest(),
        conversations=len(spool),
        dtype=settings.dtype,
        hidden_size=target.info.hidden_size,
        switches=dict(prompt_format.switches),
        today=prompt_format.today.isoformat() if prompt_format.today else None,
    )
    if not (out / MANIFEST).exists():
        write_manifest(out, wanted)
        return wanted
    found = read_manifest(out)
    differing = [k for k, v in wanted.made_from().items() if found.made_from()[k] != v]
    if differing:
        what = MADE_FROM.get(differing[0], f"another {differing[0].replace('_', ' ')}")
        raise FeatureStoreError(f"{out}: holds a store of {what}; choose another folder or remove it")
    return found


def _read(
    target: TransformersTarget, part: Sequence[Sample], layers: tuple[int, ...], settings: CaptureSettings
) -> dict[str, Tensor]:
    """Features of the conversations laid end to end; batches of similar length, padded on the right."""
    features, hidden = [], []
    size = max(1, settings.batch_tokens // max(len(r.tokens) for r in part))
    for start in range(0, len(part), size):
        batch = part[start : start + size]
        longest = max(len(r.tokens) for r in batch)
        tokens_BT = torch.tensor([[*r.tokens, *[0] * (longest - len(r.tokens))] for r in batch])
        # causal: padding after them changes nothing
        output = target.forward(tokens_BT.to(target.device), None, layers)
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
