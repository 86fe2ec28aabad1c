"""Putting a drafter on the Hugging Face hub, with a card that says what was measured."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftkit.draft.checkpoint import read_config
from draftkit.draft.checkpoint_files import (
    CONFIG,
    INDEX,
    PROVENANCE,
    WEIGHTS,
    read_note,
    read_provenance,
    read_tensors,
)
from draftkit.errors import ConfigError, DataError
from draftkit.handover.model_card import model_card, read_results
from draftkit.output import write_text

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Pushed:
    """What goes to the hub, or went: files with their bytes, the card, and the address, empty when it was not
    sent."""

    repo: str
    files: dict[str, int]
    card: str
    url: str


def push(
    folder: Path,
    repo: str,
    results: Path | None = None,
    licence: str | None = None,
    data: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    api: Any = None,
) -> Pushed:
    """Send a drafter's folder with a model card; `api` is an HfApi, None makes one. Raises ConfigError for
    a name that no repository has, CheckpointError for a damaged folder, DataError for results that are none
    or a hub that does not take it."""
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"repository {repo!r}: give OWNER/NAME, of letters, digits, '.', '_' and '-'")
    note = read_provenance(folder)
    layers = ((note.get("recipe") or {}).get("drafter") or {}).get("feature_layers")
    config = read_config(folder, max(layers) + 2 if layers else None)
    read_tensors(folder)  # a damaged or foreign folder is refused before anything is sent
    card = model_card(repo, config, note, read_results(results) if results else [], licence, data)
    files = {name: (folder / name).stat().st_size for name in _files(folder)} | {
        "README.md": len(card.encode())
    }
    if dry_run:
        return Pushed(repo, files, card, "")
    return Pushed(repo, files, card, _send(folder, repo, card, list(files), private, api))


def _files(folder: Path) -> list[str]:
    """The drafter's own files: nothing else of a folder is sent."""
    shards = (
        sorted(set(read_note(folder / INDEX)["weight_map"].values())) if (folder / INDEX).exists() else []
    )
    names = [CONFIG, PROVENANCE, WEIGHTS, INDEX, "recipe.yaml", *map(str, shards)]
    return [name for name in names if (folder / name).is_file()]


def _send(folder: Path, repo: str, card: str, names: list[str], private: bool, api: Any) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = api or HfApi()
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            if name != "README.md":
                shutil.copyfile(folder / name, Path(place) / name)
        write_text(Path(place) / "README.md", card)
        try:
            hub.create_repo(repo, private=private, exist_ok=True)
            done = hub.upload_folder(
                repo_id=repo, folder_path=place, commit_message="A drafter, with its card"
            )
        except (HfHubHTTPError, OSError, ValueError) as error:  # OSError: no network; ValueError: no token
            first = next(
                (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
            )
            raise DataError(
                f"{repo}: the hub does not take it ({first}); log in with `hf auth login` (or HF_TOKEN) "
                "and try again"
            ) from error
    return str(getattr(done, "commit_url", "") or f"https://huggingface.co/{repo}")
