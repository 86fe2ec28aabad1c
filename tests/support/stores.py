"""Feature stores of a loaded target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from draftkit.data.messages import Conversation
from draftkit.features.capture import CaptureReport, capture
from draftkit.features.compute import TargetReader
from draftkit.features.manifest import StoreManifest, begin_store
from draftkit.features.record import Text
from draftkit.features.texts import PartTexts
from draftkit.features.writer import StoreWriter
from draftkit.settings import CaptureSettings
from draftkit.target.interface import Target
from draftkit.target.prompt_format import PromptFormat


def made_manifest(
    dtype: str = "float32", layers: tuple[int, ...] = (1, 2), hidden_size: int = 2
) -> StoreManifest:
    """The manifest of a store that no target made."""
    names = {name: name for name in ("target", "fingerprint", "template_hash", "tokenizer_hash")}
    sizes = {"dtype": dtype, "feature_layers": layers, "hidden_size": hidden_size, "max_length": 1024}
    return StoreManifest(**names, **sizes, cut_answers="keep")  # type: ignore[arg-type]


def made_text(number: int = 0, length: int = 8, domain: str = "chat") -> Text:
    """Tokens of which the second half is an answer."""
    mask = torch.arange(length) >= length // 2
    return Text((number, 0, 0), f"c{number}", domain, torch.arange(length) + number, mask)


def made_store(folder: Path, texts: Sequence[Text], manifest: StoreManifest) -> Path:
    """A finished store of texts with random features, in one part."""
    begin_store(folder, manifest)
    generator = torch.Generator().manual_seed(0)
    records = []
    for text in texts:
        width = len(manifest.feature_layers) * manifest.hidden_size
        features, hidden = (
            torch.randn(len(text.mask), n, generator=generator) for n in (width, manifest.hidden_size)
        )
        records.append((text, 0, manifest.form.encode(text, features, hidden)))
    with StoreWriter(folder) as writer:
        writer.add(records)
        part = PartTexts(list(texts))
        writer.note({"part": 0, "records": len(records), "digest": "d"} | part.note())
        about = {"first": 0, "parts": 1, "conversations": len(texts), "first_conversation": 0}
        writer.note({"input": True, "digest": "d"} | about)
    return folder


def capture_by(
    target: Target,
    shown: PromptFormat,
    conversations: Iterable[Conversation],
    out: Path,
    layers: tuple[int, ...],
    settings: CaptureSettings,
    tick: Callable[[int, int], None] = lambda conversations, tokens: None,
    append: bool = False,
) -> CaptureReport:
    """Fill a store by a target in this process."""
    reader = TargetReader(target, tuple(sorted(layers)), settings.batch_tokens)
    return capture(target.info, reader, shown, conversations, out, layers, settings, tick, append)
