"""A drafter goes to the hub with a card that says what was measured, and what nobody said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from draftkit import cli
from draftkit.errors import CheckpointError, ConfigError, DataError
from draftkit.evaluate.metrics import Interval
from draftkit.evaluate.run import EvalResult
from draftkit.handover.hub import push
from draftkit.target.place import EMBEDDED

DRAFTER = EMBEDDED / "drafter"


class Hub:
    """What HfApi is asked for, and the files that it was given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.files = error, {}
        self.created: list[tuple[str, bool]] = []

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        if self.error:
            raise self.error
        self.created.append((repo, private))

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> Any:
        self.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}


def measured(folder: Path) -> Path:
    lengths = {"math": Interval(3.21, 3.0, 3.4), "macro": Interval(2.5, 2.4, 2.6)}
    settings = {"sampling": {"temperature": 1.0}, "target": "tiny", "prompts": 72, "max_new_tokens": 128}
    folder.mkdir()
    EvalResult({"device": "a CPU"}, settings, lengths, {"all": []}, {}, ()).save(folder / "evaluate-T1.json")
    return folder


def test_the_card_holds_what_was_measured_and_says_what_nobody_said(tmp_path: Path) -> None:
    made = push(DRAFTER, "me/tiny-dspark", measured(tmp_path / "results"), dry_run=True)
    assert made.url == ""
    _, head, body = made.card.split("---", 2)
    assert yaml.safe_load(head)["tags"] == ["speculative-decoding", "drafter", "dspark"]
    assert "| math | 3.21 | 3.00 to 3.40 |" in body and "Temperature 1, 72 prompts" in body
    assert "data | not stated by its owner" in body and "Licence: not stated" in body
    assert "vllm serve tiny --speculative-config" in body and "me/tiny-dspark" in body
    bare = push(DRAFTER, "me/x", licence="mit", data="its own answers", dry_run=True).card
    assert "Nothing was measured" in bare and "license: mit" in bare and "| data | its own answers |" in bare


def test_only_the_drafters_files_are_sent(tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    folder.mkdir()
    for path in DRAFTER.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / ".env").write_text("HF_TOKEN=secret")
    hub = Hub()
    made = push(folder, "me/d", private=True, api=hub)
    assert hub.created == [("me/d", True)] and made.url == "https://huggingface.co/me/d"
    assert (
        set(hub.files)
        == {"config.json", "draftkit.json", "model.safetensors", "README.md"}
        == set(made.files)
    )
    assert hub.files["model.safetensors"] == (DRAFTER / "model.safetensors").read_bytes()


def test_bad_input_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    hub = Hub()
    for repo in ("name", "a/b/c", "me/../x", "me/"):
        with pytest.raises(ConfigError, match="give OWNER/NAME"):
            push(DRAFTER, repo, api=hub)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        push(tmp_path, "me/d", api=hub)
    with pytest.raises(DataError, match=r"has no evaluate-T"):
        push(DRAFTER, "me/d", tmp_path, api=hub)
    assert hub.created == []


def test_a_hub_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"me/d: the hub does not take it \(no route\); log in with `hf auth login`"
    ):
        push(DRAFTER, "me/d", api=Hub(OSError("no route\nand a long story")))


def test_the_command_shows_what_it_would_send() -> None:
    done = CliRunner().invoke(cli.app, ["push", str(DRAFTER), "me/d", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["files"]) >= {"config.json", "README.md"}
