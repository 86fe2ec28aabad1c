"""The command line from outside: it imports little, and every ending has its exit code and its one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from draftkit import __version__, cli
from draftkit.errors import ConfigError, Interrupted
from draftkit.ops.native_build import library_names

HEAVY = ("torch", "transformers", "draftkit.config", "numpy", "matplotlib", "fastapi", "huggingface_hub")
COMMANDS = [
    command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
]


def draftkit(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "draftkit.cli", *arguments], capture_output=True, text=True, cwd=cwd
    )


def run_main(body: str) -> subprocess.Popen[str]:
    """`draftkit probe` in a process, with `body` as what the command does."""
    program = (
        "import sys, time\nfrom draftkit import cli\nfrom draftkit.errors import ConfigError\n"
        f"@cli.app.command()\ndef probe() -> None:\n    {body}\n"
        "sys.argv = ['draftkit', 'probe']\ncli.main()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_asking_for_help_imports_nothing_heavy_and_not_much(arguments: list[str]) -> None:
    """What it takes is the time of its imports, which differs from machine to machine: they are counted."""
    program = (
        f"import sys; sys.argv = ['draftkit', *{arguments!r}]\nfrom draftkit.cli import main\n"
        "try:\n    main()\nfinally:\n"
        f"    print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], len(sys.modules) < 400)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY [] True"


def test_help_lists_every_command_with_a_phrase() -> None:
    text = draftkit("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^\W*{name}\s+\w+", text, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_of_itself(name: str) -> None:
    done = CliRunner().invoke(cli.app, [name, "--help"])
    assert f"draftkit {name}" in done.output.split("Example", 1)[-1]


def test_version_is_the_package_version() -> None:
    assert draftkit("--version").stdout.strip() == __version__


def test_an_unknown_command_is_a_usage_error() -> None:
    done = draftkit("trian")
    assert done.returncode == 2
    assert "trian" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_option_is_a_usage_error() -> None:
    done = draftkit("train")
    assert done.returncode == 2
    assert "--features" in done.stderr or "--out" in done.stderr


def test_a_mistake_in_an_override_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = draftkit("quickstart", "--set", "train.lr=fast", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --set train.lr: must be a number, got 'fast'\n"
    assert list(tmp_path.iterdir()) == []  # refused before anything is written


def test_an_error_of_several_lines_is_shown_as_one() -> None:
    done = run_main("raise ConfigError('first\\n  second')")
    _, errors = done.communicate()
    assert (done.returncode, errors) == (2, "error: first second\n")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run_main(f"open({str(tmp_path / 'file' / 'x')!r}, 'w')")
    _, errors = done.communicate()
    assert done.returncode == 1
    assert errors.startswith("error: ")
    assert str(tmp_path) in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["quickstart", "-o", "file"],
        ["generate", "-o", "folder"],
        ["generate", "-o", "file/below.jsonl"],
        ["generate", "-o", "/proc/x.jsonl"],
        ["generate", "-p", "file", "-o", "../{}/file"],
        ["capture", "-c", "file", "-o", "file"],
        ["train", "-f", "folder", "-o", "file"],
        ["evaluate", "-d", "folder", "-o", "file"],
        ["export", "-d", "folder", "-o", "file"],
        ["calibrate", "-d", "folder", "-o", "file/below"],
        ["profile", "-o", "folder"],
        ["profile", "-o", "step_rate.png"],
        ["simulate", "-o", "file"],
        ["bench", "--url", "http://127.0.0.1:9", "-o", "file"],
    ],
    ids=" ".join,
)
def test_an_out_that_cannot_be_used_is_refused_before_the_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("mine")
    *rest, out = (argument.format(tmp_path.name) for argument in arguments)
    error = CliRunner().invoke(cli.app, [*rest, out]).exception
    assert isinstance(error, ConfigError), repr(error)
    assert str(error).startswith(f"--out {out} ") and "\n" not in str(error)
    assert Path("file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_bug_keeps_its_traceback() -> None:
    done = run_main("raise ZeroDivisionError('a bug')")
    _, errors = done.communicate()
    assert done.returncode == 1
    assert "Traceback" in errors
    assert "ZeroDivisionError: a bug" in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_the_command_and_sets_the_exit_code(number: signal.Signals, code: int) -> None:
    body = (
        "try:\n        print('started', flush=True)\n        time.sleep(1e6)\n"
        "    finally:\n        print('state saved', flush=True)"
    )
    process = run_main(body)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, number)
    output, errors = process.communicate()
    assert process.returncode == code
    assert output == "state saved\n"
    assert errors == "error: interrupted\n"


@pytest.mark.parametrize("name", ["train", "profile"])
def test_an_interrupted_command_promises_to_go_on_only_where_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise Interrupted(130)

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(cli, "raise_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["draftkit", name])
    with pytest.raises(SystemExit):
        cli.main()
    promise = "; run the same command again to go on" if name in cli.GOES_ON else ""
    assert capsys.readouterr().err == f"error: interrupted{promise}\n"
    assert cli.GOES_ON.issubset(COMMANDS) and (name == "train") == bool(promise)


def test_exit_codes_of_errors() -> None:
    assert ConfigError("x").exit_code == 2
    assert [Interrupted(code).exit_code for code in (130, 143)] == [130, 143]


@pytest.mark.slow
def test_compile_builds_everything_once(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "draftkit.cli", "compile"]
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    built = sorted(path.name for path in (tmp_path / "draftkit").glob("*.so"))
    assert first.returncode == 0 and [name.split("-")[0] for name in built] == library_names()
    assert [
        line.split(":")[0] for line in first.stdout.splitlines()
    ] == library_names() and "not compiled" not in first.stdout
    changed = [path.stat().st_mtime_ns for path in sorted((tmp_path / "draftkit").iterdir())]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "draftkit").iterdir())] == changed


def test_compile_without_a_compiler_says_what_happens_then(tmp_path: Path) -> None:
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PATH": str(tmp_path),
        "CXX": "no-such-compiler",
    }
    done = subprocess.run(
        [sys.executable, "-m", "draftkit.cli", "compile"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == [
        f"{name}: not compiled" for name in library_names()
    ]
    assert done.stdout.count("no C++ compiler found") == len(library_names())
