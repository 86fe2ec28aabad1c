"""Mistakes with DeepSeek-V4 on the command line: exit code 2, one line, and nothing is left half written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from draftkit import cli
from draftkit.target.prompt_format import TemplateError
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from support.deepseek_v4 import said, system, tiny_folder, user
from support.records import records

INDEX, SECOND = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
ANSWERED = [{"role": "user", "content": "Add 3."}, {"role": "assistant", "content": "3 + 4 = 7."}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{bad"}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("v4") / "DeepSeek-V4-tiny")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "DeepSeek-V4-Flash-0731"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the entry point; the one line that it ends with."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["draftkit", *map(str, words)])
        monkeypatch.setattr(cli, "raise_on_signals", lambda: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in said, said
        [line] = [line for line in said.splitlines() if line.startswith("error: ")]
        return line

    return run


def change(folder: Path, **fields: Any) -> None:
    """Set fields of `config.json`."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | fields))


def put(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of one that is there."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    save_file(load_file(file) | {name: tensor}, file)


def capture(folder: Path, out: Path, said: list[dict[str, Any]] = ANSWERED) -> list[object]:
    """The words of a capture of one conversation."""
    talk = out.with_name("talk.jsonl")
    talk.write_text(json.dumps({"id": "a", "messages": said}) + "\n")
    return ["capture", "-r", "tiny-deepseek-v4", "--set", f"target.path={folder}", "-c", talk, "-o", out]


def cut(folder: Path) -> None:
    """Half a shard."""
    whole = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(whole[: len(whole) // 2])


def one_file(folder: Path, share: float) -> None:
    """A checkpoint of one file, of which a share is left."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])


EIGHT_BITS = torch.zeros(32, 64).to(torch.float8_e4m3fn)
BAD_TARGETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "V4.1": (lambda f: change(f, model_type="deepseek_v41"), "is DeepSeek-V4.1, another architecture"),
    "shard missing": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing, which the index names"),
    "shard cut": (cut, f"{SECOND}: is damaged"),
    "file cut": (lambda f: one_file(f, 0.5), "model.safetensors: is damaged"),
    "file empty": (lambda f: one_file(f, 0), "model.safetensors: is damaged"),
    "no index": (lambda f: (f / INDEX).unlink(), f"has no model.safetensors and no {INDEX}"),
    "index no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX}: is damaged"),
    "index without map": (lambda f: (f / INDEX).write_text("[]"), "has no weight_map from tensors to files"),
    "index leads out": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {"embed.weight": "../x"}})),
        "has no weight_map from tensors to files beside it",
    ),
    "scales missing": (
        lambda f: put(f, "layers.0.attn.wq_a.weight", EIGHT_BITS),
        "scales missing: layers.0.attn.wq_a.scale",
    ),
    "hc_mult 3": (lambda f: change(f, hc_mult=3), "hc_head_base is F32 [4], must be"),
    "hc_mult text": (
        lambda f: change(f, hc_mult="4"),
        "hc_mult is '4', must be a whole number of at least 1",
    ),
    "o_groups 0": (lambda f: change(f, o_groups=0), "o_groups is 0, must be a whole number"),
    "ratios": (lambda f: change(f, compress_ratios=[[0]] * 5), "compress_ratios must have 0, 4 or 128"),
    "rope": (lambda f: change(f, rope_scaling="yarn"), "Validation error for field 'rope_parameters'"),
    "scoring": (lambda f: change(f, scoring_func="sum"), "has 'sum', which Transformers does not know"),
    "taps": (lambda f: change(f, dspark_target_layer_ids="last"), "must be a list of layers"),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_checkpoints_that_are_none(
    name: str, folder: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    damage, told = BAD_TARGETS[name]
    damage(folder)
    line = refused(*capture(folder, tmp_path / "features"))
    assert told in line and str(folder) in line
    assert not list((tmp_path / "features").iterdir())


def without_module(folder: Path) -> None:
    """A preview checkpoint's configuration."""
    raw = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in raw.items() if not name.startswith("dspark_")}
    (folder / "config.json").write_text(json.dumps(kept))


def wrong_scales(folder: Path) -> None:
    """More scales than the weight has blocks: read as they are, they would be other numbers."""
    put(folder, "mtp.0.attn.wq_a.weight", EIGHT_BITS)
    index = json.loads((folder / INDEX).read_text())
    name = "mtp.0.attn.wq_a.scale"
    index["weight_map"][name] = index["weight_map"]["mtp.0.attn.wq_a.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    put(folder, name, torch.ones(7, 9).to(torch.float8_e8m0fnu))


BAD_MODULES: dict[str, tuple[Callable[[Path], object], str]] = {
    "preview": (without_module, "has no dspark_* keys: a preview checkpoint without a DSpark module"),
    "scales missing": (
        lambda f: put(f, "mtp.0.attn.wq_a.weight", EIGHT_BITS),
        "scales missing: mtp.0.attn.wq_a.scale",
    ),
    "scales of another shape": (wrong_scales, "mtp.0.attn.wq_a.scale is F8_E8M0 [7, 9], must be"),
    "integers": (
        lambda f: put(f, "mtp.1.attn.wkv.weight", torch.zeros(32, 64, dtype=torch.int64)),
        "mtp.1.attn.wkv.weight is torch.int64 [32, 64], must be",
    ),
    "rank": (lambda f: change(f, dspark_markov_rank=8), "markov_head.markov_w1.weight is F32"),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_modules_that_are_none(
    name: str, folder: Path, refused: Callable[..., str], sound: Path, tmp_path: Path
) -> None:
    """`export` reads the module before it writes anything."""
    damage, told = BAD_MODULES[name]
    damage(folder)
    out = Path(shutil.copytree(sound, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = refused("export", "-d", folder, "-o", out, "--form", "bundled")
    assert told in line and str(folder) in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.slow
def test_what_is_asked_of_a_sound_one(
    folder: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments that are no JSON, a longer block than the module has, efforts of the other encoder, no
    encoder."""
    out = tmp_path / "out"
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    line = refused(*capture(folder, out, [*ANSWERED, {"role": "user", "content": "go"}, called]))
    assert "JSON" in line and "arguments" in line, line
    longer = ["--set", "drafter.block_size=7", "--start-from", folder]
    noise = json.loads((folder / "config.json").read_text())["dspark_noise_token_id"]
    longer += ["--set", f"drafter.mask_token_id={noise}"]
    words = ["train", *capture(folder, tmp_path / "run")[1:], *longer]
    assert "block_size is 5, the recipe has 7" in refused(*words)
    low = ["--set", "target.template_switches={reasoning_effort: low, encoder: preview}"]
    assert "the preview encoder has no low" in refused(*capture(folder, out), *low)
    monkeypatch.setitem(sys.modules, "deepseek_recipe", None)
    assert "pip install 'draftkit[deepseek]'" in refused(*capture(folder, out))
    assert not list(out.iterdir())


def test_the_doctor_names_what_is_wrong_with_a_pair(
    folder: Path, sound: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """A preview's module before official weights that lost a scale, served with the preview's encoder; and
    V4.1, which is no V4."""
    module = Path(shutil.copytree(sound, tmp_path / "DeepSeek-V4-Flash-DSpark"))
    put(folder, "layers.0.attn.wq_a.weight", EIGHT_BITS)
    words = ["doctor", "--target", str(folder), "-d", str(module), "--switch", "encoder=preview", "--json"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 1, done.output
    found = {f["check"]: f["what"] for f in json.loads(done.stdout)["findings"]}
    assert "scales missing: layers.0.attn.wq_a.scale" in found["checkpoint"]
    assert "is of the official weights, the module was made for" in found["generation"]
    assert "was trained with the official one" in found["encoder"]
    change(folder, model_type="deepseek_v41")
    assert "is DeepSeek-V4.1" in refused("doctor", "--target", folder, "-d", module)


def write(path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    path.write_text("".join(json.dumps({"id": n, "messages": m}) + "\n" for n, m in rows.items()))


SCHEMA = {"type": "object"}
FORM = "response_format"
GOOD_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_FIELDS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "unknown": (
        [user("x", task="translate")],
        "messages[0]: DeepSeek-V4's task 'translate' is not known, choose one of action",
    ),
    "no text": ([user("x", task=["query"])], "messages[0]: DeepSeek-V4's task ['query'] is not known"),
    "false": ([user("x", task=False)], "messages[0]: DeepSeek-V4's task False is not known"),
    "not last": ([user("x", task="query"), user("y")], "only the last message may have a task"),
    "answered twice": (
        [user("x", task="query"), said("a"), user("y"), said("b")],
        "only the last message may have a task, before the answer to it",
    ),
    "task of a tool": (
        [user("x"), said("", tool_calls=[GOOD_CALL]), {"role": "tool", "content": "r", "task": "query"}],
        "messages[2]: DeepSeek-V4's task 'query' belongs to a message of the user",
    ),
    "task of an answer": (
        [user("x"), said("a", task="query")],
        "task 'query' belongs to a message of the user",
    ),
    "title of a question": ([user("x", task="title")], "task 'title' belongs to a message of the assistant"),
    "prefix of a question": ([user("x", prefix=True)], "prefix belongs to a message of the assistant"),
    "task of a developer": (
        [{"role": "developer", "content": "x", "task": "query"}, user("y")],
        "task 'query' belongs to a message of the user",
    ),
    "nothing": ([user("x", task="")], "task '' is not known"),
    "format of an answer": (
        [user("x"), said("a", response_format=SCHEMA)],
        "messages[1]: DeepSeek-V4's response_format belongs to a message of the system",
    ),
    "task of the answer": ([user("x"), said("a", task="math")], "task 'math' is not known"),
    "title of nothing": (
        [user("x"), said("", reasoning_content="r", task="title")],
        "task 'title': the message has no content to give a title to; leave it out",
    ),
    "title of calls": (
        [user("x"), said("a", task="title", tool_calls=[GOOD_CALL])],
        "task 'title': after its tool_calls an answer ends",
    ),
    "prefix no switch": (
        [user("x"), said("a", prefix="yes")],
        "messages[1]: DeepSeek-V4's prefix is 'yes', must be true or false",
    ),
    "prefix a number": ([user("x"), said("a", prefix=1)], "prefix is 1, must be true or false"),
    "prefix empty": ([user("x"), said("", prefix=True)], "prefix: the message has no content to go on with"),
    "prefix of parts": (
        [user("x"), said("", prefix=True) | {"content": [{"type": "text", "text": ""}]}],
        "prefix: the message has no content to go on with",
    ),
    "prefix with calls": (
        [user("x"), said("a", prefix=True, tool_calls=[GOOD_CALL])],
        "after its tool_calls an answer",
    ),
    "prefix and title": ([user("x"), said("a", prefix=True, task="title")], "leave prefix out"),
    "prefix in the middle": (
        [user("x"), said("a", prefix=True), said("b"), user("y")],
        "only the last message may have a prefix",
    ),
    "DeepSeek's name": (
        [user("x"), said("a", wo_eos=True), user("y")],
        "only the last message may have a prefix",
    ),
    "form a text": (
        [system("json"), user("x")],
        "messages[0]: DeepSeek-V4's response_format is a str, must be",
    ),
    "form empty": ([system({}), user("x")], "response_format is empty"),
    "form without schema": (
        [system({"type": "json_schema"}), user("x")],
        "needs json_schema.schema, an object",
    ),
    "form with no schema in it": (
        [system({"type": "json_schema", "json_schema": {"name": "n"}}), user("x")],
        "needs json_schema.schema, an object",
    ),
    "form of a question": ([user("x", response_format=SCHEMA)], f"{FORM} belongs to a message of the system"),
    "two forms": ([system(SCHEMA), system(SCHEMA), user("x")], f"only one message may have a {FORM}"),
    "half a character": ([system({"a": "\ud800"}), user("x")], "holds half a character"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_mistakes_are_told_with_file_and_line_before_the_target_is_loaded(
    name: str, refused: Callable[..., str], unloadable: list[str], tmp_path: Path
) -> None:
    row, told = BAD_FIELDS[name]
    file = tmp_path / "p.jsonl"
    write(file, {"ok": [user("x")], name: row})
    line = refused("generate", *unloadable, "-p", file, "-o", tmp_path / "a.jsonl")
    assert f"{file}:2: " in line and told in line, line
    assert "DeepSeek-V4's" in line or "only" in told or "half a character" in told, line
    for command in (["capture", "-o", tmp_path / "f"], ["plan"]):
        assert line == refused(*command, *unloadable, "-c", file)


@pytest.fixture
def unloadable(tmp_path: Path) -> list[str]:
    """Options for a folder that is DeepSeek-V4's by its configuration, and has nothing else."""
    (tmp_path / "v4").mkdir()
    (tmp_path / "v4" / "config.json").write_text('{"model_type": "deepseek_v4"}')
    return ["-r", "tiny-deepseek-v4", "--set", f"target.path={tmp_path / 'v4'}"]


@pytest.mark.parametrize("task", ["query", "title"])
def test_thinking_that_is_asked_of_a_task_that_forbids_it(
    task: str, refused: Callable[..., str], unloadable: list[str], folder: Path, tmp_path: Path
) -> None:
    row = {"title": [user("x"), said("a", task="title")], "query": [user("x", task="query")]}[task]
    file = tmp_path / "p.jsonl"
    write(file, {"ok": [user("x", task="action")], "bad": row})
    on = ["--set", "target.template_switches={thinking: true}"]
    out = tmp_path / "a.jsonl"
    for command in (
        ["generate", "-p", file, "-o", out],
        ["capture", "-c", file, "-o", tmp_path / "f"],
        ["train", "-c", file, "-o", tmp_path / "r"],
        ["plan", "-c", file],
    ):
        line = refused(*command, *unloadable, *on)
        assert f"{file}:2: " in line and f"task {task!r} is answered without thinking" in line, line
    there = ["-r", "tiny-deepseek-v4", "--set", f"target.path={folder}", "--set", "generate.max_new_tokens=2"]
    words = ["generate", *there, *on, "--skip-invalid", "-p", str(file), "-o", str(out)]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert list(records(out)) == ["ok"], "the other one is left out"


def test_a_chat_template_refuses_what_it_does_not_look_for(
    refused: Callable[..., str], target_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    write(file, {"a": [user("x", task="query")]})
    line = refused("generate", "--target", target_folder, "-p", file, "-o", tmp_path / "a.jsonl")
    assert "conversation a: " in line and "task is a field of DeepSeek-V4's" in line, line
    assert "remove it for other targets than DeepSeek-V4" in line
    write(file, {"a": [user("x"), said("Step 1", prefix=True)]})  # which no answer follows
    two = ["--set", "drafter.num_features=2"]
    line = refused("capture", "--target", target_folder, *two, "-c", file, "-o", tmp_path / "f")
    assert "conversation a: " in line and "prefix is a field of DeepSeek-V4's" in line, line
    tokenizer = load_tokenizer(str(target_folder))
    tokenizer.chat_template = "{% for m in messages %}{{ m['task'] }}:{{ m.content }}{% endfor %}"
    shown = TemplateFormat(tokenizer)
    assert shown.text([user("x", task="query")]) == "query:x"
    for message in (said("a", prefix=True), said("a", wo_eos=True), system(SCHEMA)):
        with pytest.raises(TemplateError, match="this template does not look for it"):
            shown.prompt([user("x"), message])
    assert shown.text([user("x", task="query", prefix=False, response_format=None)]) == "query:x"
