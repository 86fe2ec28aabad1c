"""What the operator gives: options that cannot work are named as they were given, and the target's own
sampling."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from draftkit.commands import serve
from draftkit.engine.settings import EngineSettings
from draftkit.errors import ServeError, TargetError
from draftkit.serve.params import sampling_params
from draftkit.serve.protocol import CompletionBody
from draftkit.serve.sampling_defaults import sampling_defaults
from draftkit.serve.server import _bind, load_served
from support.fake_engine import fake_served, replace

SERVED = fake_served()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_gib": float("nan")}, "--kv-gib is nan"),
        ({"kv_gib": float("inf")}, "--kv-gib is inf"),
        ({"kv_gib": 0.0}, "--kv-gib is 0;"),
        ({"kv_gib": -1.0}, "--kv-gib is -1;"),
        ({"max_body": 0}, "--max-body is 0;"),
        ({"max_waiting": 0}, "--max-waiting is 0;"),
        ({"drain_seconds": -1.0}, "--drain-seconds is -1;"),
        ({"drain_seconds": float("nan")}, "--drain-seconds is nan;"),
        ({"max_running": 0}, "--max-running is 0;"),
        ({"max_running": 100_000_000}, "--max-running is 100000000; it may be 65536 at most"),
        ({"name": ""}, "--name is empty;"),
        ({"name": " "}, "--name is empty;"),
        ({"max_length": 1}, "--max-length is 1;"),
        ({"generation_config": "some"}, "--generation-config is 'some';"),
    ],
    ids=str,
)
def test_an_option_that_cannot_work_is_named_as_it_was_given(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftkit.serve.server.run_server", lambda *_: pytest.fail("it serves"))
    with pytest.raises(ServeError) as caught:
        serve.command(**options)
    assert str(caught.value).startswith(message) and caught.value.exit_code == 2


def test_a_key_that_is_missing_does_not_leave_the_door_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTKIT_API_KEY", "")
    with pytest.raises(ServeError, match=r"^DRAFTKIT_API_KEY is empty; give a key"):
        serve.command()


def test_what_only_the_loaded_target_can_tell_is_named_by_option_too(monkeypatch: pytest.MonkeyPatch) -> None:
    small = EngineSettings(kv_bytes=1073, compile=False)
    with pytest.raises(
        ServeError,
        match=r"^--kv-gib of 1e-06 GiB hold 0 tokens .* give [\d.]+ GiB or a smaller --max-length$",
    ):
        load_served("tiny", "none", None, small)
    with pytest.raises(ServeError, match=r"^--max-length is 999999; tiny allows 2048 at most$"):
        load_served("tiny", "none", None, replace(small, max_length=999_999))

    def too_much(*_: object) -> None:
        raise MemoryError("96 GiB")

    monkeypatch.setattr("draftkit.engine.engine.Scheduler", too_much)
    with pytest.raises(
        ServeError, match=r"^memory does not hold this server: .*; give a --max-running below 64,"
    ):
        load_served("tiny", "none", None, EngineSettings(max_length=64, kv_bytes=2**22, compile=False))


@pytest.mark.parametrize("host", ["300.1.1.1", "192.0.2.1", ".."])
def test_a_host_that_is_not_ours_is_not_blamed_on_the_port(host: str) -> None:
    with pytest.raises(ServeError, match=r"choose another --host$"):
        _bind(host, 0)


def folder(path: Path, told: str | None) -> str:
    (path / "config.json").touch()
    (path / "model.safetensors").touch()
    if told is not None:
        (path / "generation_config.json").write_text(told)
    return str(path)


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 50, "eos_token_id": 2},
            {"temperature": 0.6, "top_k": 50},
        ),
        ({"top_p": 0.9, "min_p": None, "repetition_penalty": 1.1}, {"top_p": 0.9, "repetition_penalty": 1.1}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"do_sample": True}, {}),
        (None, {}),
    ],
)
def test_what_the_file_sets_is_taken_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, told: Any, taken: dict[str, Any]
) -> None:
    with caplog.at_level(logging.INFO, "draftkit.serve"):
        assert sampling_defaults(folder(tmp_path, None if told is None else json.dumps(told))) == taken
    assert [name for name in taken if f"{name} {taken[name]:g}" not in caplog.text] == []
    assert len(caplog.records) == bool(taken)


def test_the_embedded_target_sets_nothing() -> None:
    assert sampling_defaults("tiny") == {}


@pytest.mark.parametrize("told", ['{"top_p": 7}', '{"temperature": "hot"}', '{"top_k": 2.5}', "{"])
def test_a_file_that_cannot_work_says_how_to_do_without_it(tmp_path: Path, told: str) -> None:
    with pytest.raises(TargetError, match="--generation-config none"):
        sampling_defaults(folder(tmp_path, told))


def test_requests_take_the_targets_sampling_where_they_leave_it_out() -> None:
    served = replace(SERVED, defaults={"temperature": 0.6, "top_k": 10**6, "min_p": 0.1})
    body = CompletionBody.model_validate({"prompt": "a", "temperature": 0.9, "top_p": None, "min_p": 0})
    params = sampling_params(body, served, None)
    assert (params.temperature, params.top_p, params.min_p) == (0.9, 1.0, 0)
    assert params.top_k == served.engine.info.vocab_size
    assert sampling_params(CompletionBody(prompt="a"), served, None).temperature == 0.6


@pytest.mark.slow
def test_collecting_garbage_does_not_go_over_what_is_loaded() -> None:
    """Hundreds of thousands of objects, of libraries mostly: a collection of all of them held every stream
    up."""
    code = (
        "import gc; from draftkit.engine.settings import EngineSettings; from draftkit.serve.server "
        "import load_served\n"
        "settings = EngineSettings(max_running=2, max_length=64, kv_bytes=2**22, compile=False)\n"
        "served = load_served('tiny', 'none', None, settings)\n"
        "print(gc.get_freeze_count(), len(gc.get_objects()))"
    )
    frozen, left = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(frozen) > 100_000 and int(left) < int(frozen) / 20
