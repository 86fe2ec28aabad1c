"""What makes the terminal comfortable: mistakes told at once, a user's own defaults, recipes, chat."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from checks.provoked_errors import MISTAKES, Mistake, prepare, provoke
from draftkit import cli
from draftkit.commands.chat import statistics
from draftkit.commands.early import ENGINE_NAMES, STORES
from draftkit.commands.user_defaults import user_defaults
from draftkit.config import packaged_recipes
from draftkit.errors import ConfigError
from draftkit.features.deepspec import INDEX
from draftkit.features.manifest import MANIFEST
from draftkit.features.speculators import DATA_SET
from draftkit.handover.engines import ENGINES
from draftkit.suggest import following, nearest_path
from support.server import TEXT, Server, serving


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    prepare(folder)
    (folder / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.command)
def test_a_mistake_is_told_before_anything_heavy_is_loaded(mistake: Mistake, prepared: Path) -> None:
    """Without PyTorch, whose import takes seconds; the check says how long each takes."""
    done = provoke(mistake, prepared)
    assert done.returncode == 2 and mistake.told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_usage_error_is_one_line(prepared: Path) -> None:
    for command in ("trian", "capture -c x -o y --taget tiny", "serve --threads zero", "capture"):
        done = provoke(Mistake(command, ""), prepared)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "--help" in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "--set" not in done.stderr


def test_what_is_known_without_torch_is_what_the_stages_know() -> None:
    assert tuple(ENGINES) == ENGINE_NAMES
    assert STORES == (MANIFEST, INDEX, DATA_SET)


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (
            "capture -c answers.jsonl -o features",
            ["--set", "drafter.num_features=3", "--set", "train.lr=1e-3"],
        ),
        ("train -f features -o drafter", ["--set", "drafter.num_features=3", "--set", "train.lr=1e-3"]),
        ("evaluate -d drafter/best -o results", []),
        ("profile -d drafter/best -o step_rate.json", []),
    ],
)
def test_the_next_command_is_given_the_target_and_what_it_reads(command: str, hint: list[str]) -> None:
    overrides = ["generate.seed=1", "drafter.num_features=3", "train.lr=1e-3"]
    told = following(command, "tiny-dspark", overrides, "tiny")
    assert shlex.split(told)[-len(hint) - 2 :] == ["--target", "tiny", *hint]
    assert command in told and "target.path" not in told


def test_a_wrong_guess_is_not_made_by_the_ending_alone(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").touch()
    assert nearest_path(tmp_path / "nothere.jsonl") == ""
    assert nearest_path(tmp_path / "answer.jsonl").endswith("answers.jsonl?")


def test_no_summary_of_a_command_is_cut() -> None:
    text = CliRunner().invoke(cli.app, ["-h"], env={"COLUMNS": "80"}).output
    assert "verify-lossless" in text and "..." not in text.split("Commands:")[1]


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "draftkit", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()


def test_the_shell_completes_the_names_of_recipes() -> None:
    program = "import sys; sys.argv = ['draftkit']; from draftkit.cli import main; main()"
    words = {"COMP_WORDS": "draftkit train -r tiny-ds", "COMP_CWORD": "3"}
    environment = {**os.environ, "_DRAFTKIT_COMPLETE": "complete_bash", **words}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["tiny-dspark"], done


def test_recipes_are_listed_and_shown_and_what_is_shown_loads(tmp_path: Path) -> None:
    listed = CliRunner().invoke(cli.app, ["recipes"]).output
    assert all(name in listed for name in packaged_recipes())
    shown = CliRunner().invoke(cli.app, ["recipes", "tiny-dspark"]).output
    (tmp_path / "mine.yaml").write_text(shown)
    again = CliRunner().invoke(cli.app, ["recipes", str(tmp_path / "mine.yaml")]).output
    assert again == shown and "algorithm: dspark" in shown
    rows = json.loads(CliRunner().invoke(cli.app, ["recipes", "--json"]).output)
    assert {"name": "qwen3-4b-eagle3", "target": "Qwen/Qwen3-4B", "algorithm": "eagle3"} in rows


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "draftkit").mkdir()
    return tmp_path / "draftkit" / "config.toml"


def test_a_users_defaults_are_taken_and_the_command_line_wins(config: Path) -> None:
    assert user_defaults(cli.app) == {}
    config.write_text('[recipes]\nname = "x"\n[simulate]\nstep-rate = "nothing.json"\nconcurrency = 4\n')
    with pytest.raises(ConfigError, match="recipes has no option --name"):
        user_defaults(cli.app)
    config.write_text('[simulate]\nstep-rate = "nothing.json"\n[serve]\nkv_gib = 2\nallow-origin = "*"\n')
    told = user_defaults(cli.app)
    assert told == {
        "simulate": {"step_rate": "nothing.json"},
        "serve": {"kv_gib": 2, "allow_origin": ["*"]},
    }
    run = [sys.executable, "-m", "draftkit", "simulate"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert "--step-rate nothing.json: no such file" in done.stderr
    done = subprocess.run([*run, "--step-rate", "other.json"], capture_output=True, text=True)
    assert "--step-rate other.json: no such file" in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[srve]\n", "no command srve; did you mean serve?"),
        ('[serve]\ntargt = "tiny"\n', "serve has no option --targt; did you mean target?"),
        ("serve = 3\n", "write a table, [serve]"),
        ("[serve.target]\n", "serve.target is a table"),
        ("[serve\n", "cannot be read"),
    ],
)
def test_a_mistake_in_the_users_file_names_it(config: Path, text: str, told: str) -> None:
    config.write_text(text)
    done = subprocess.run([sys.executable, "-m", "draftkit", "recipes"], capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and str(config) in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- chat


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--step-seconds", "0.002") as running:
        yield running


def chat(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "draftkit", "chat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=said)


def test_a_question_is_answered_with_a_line_of_statistics(server: Server) -> None:
    done = chat("--url", server.url, "hello")
    assert done.returncode == 0, done.stderr
    answer, line = done.stdout.rstrip().rsplit("\n", 1)
    assert answer == TEXT
    assert "accepted length 2.9" in line or "accepted length 3.0" in line
    assert "took part in 100 % of" in line and "rested" not in line


def test_a_conversation_goes_on_begins_again_and_does_without_drafts(server: Server) -> None:
    done = chat(
        "--url", f"{server.url}/v1", "--max-tokens", "3", said="one\n\n/drafts\ntwo\n/help\n/new\nthree\n"
    )
    lines = [line for line in done.stdout.splitlines() if "tokens" in line]
    assert done.returncode == 0 and len(lines) == 3
    assert "accepted length" in lines[0] and "drafts are off" in lines[1] and "drafts are off" in done.stderr


def test_what_was_said_before_is_part_of_the_next_question(server: Server) -> None:
    def prompt_tokens(said: str) -> float:
        before = server.metric("prompt_tokens_total")
        assert chat("--url", server.url, "--max-tokens", "3", said=said).returncode == 0
        return server.metric("prompt_tokens_total") - before

    assert prompt_tokens("one\ntwo\n") > prompt_tokens("one\n/new\ntwo\n") + 3


def test_what_the_server_refuses_is_one_line(server: Server) -> None:
    done = chat("--url", server.url, "--max-tokens", "100000", "hello")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {server.url}") and "400" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_drafter_that_rested_is_said_to_have_rested() -> None:
    told = {
        "num_spec_steps": 100,
        "num_spec_tokens": 7,
        "num_draft_tokens": 14,
        "mean_acceptance_length": 1.01,
    }
    line = statistics(101, 1, {"decode_seconds": 2.0, "speculative_decoding": told}, True)
    assert (
        line.startswith("101 tokens, 50 tokens/s, accepted length 1.01")
        and "2 % of 100 rounds: it rested" in line
    )
    assert statistics(5, 5, {}, True) == "5 tokens, no drafter"


@pytest.mark.slow
def test_without_a_url_a_server_is_started_and_ended() -> None:
    done = chat("What is a list?", "--max-tokens", "20")
    assert done.returncode == 0 and " tokens/s, accepted length" in done.stdout, done.stderr
    done = chat("What is a list?", "--drafter", "/nowhere")
    assert done.returncode == 2 and "/nowhere: no such folder" in done.stderr
