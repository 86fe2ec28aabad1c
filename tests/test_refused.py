"""Conversations that the target's chat template refuses: named at the end of a run that may leave out what is
invalid, and the end of one that may not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from draftkit.cli import app
from draftkit.data.conversations import SkippedRows, iterate_conversations
from draftkit.data.refused import asked_ones, learnt_ones
from draftkit.errors import DataError
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from support.records import records

# as Gemma's and Mistral's
ALTERNATING = """{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ANSWER = {"role": "assistant", "content": "a list holds values"}
ROWS = {
    "good": [{"role": "user", "content": "what?"}, ANSWER],
    "system": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "what?"}, ANSWER],
    "twice": [{"role": "user", "content": "what?"}, {"role": "user", "content": "and?"}, ANSWER],
    "long": [{"role": "user", "content": "what?"}, ANSWER, {"role": "user", "content": "and?"}, ANSWER],
}


@pytest.fixture
def folder(target_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    shutil.copytree(target_folder, folder)
    (folder / "chat_template.jinja").write_text(ALTERNATING)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": name, "messages": m}) + "\n" for name, m in ROWS.items()))
    return path


@pytest.mark.parametrize("stage", ["generate", "capture"])
def test_what_a_template_refuses_is_named_and_the_rest_goes_on(
    stage: str, folder: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    command = [stage, "-p" if stage == "generate" else "-c", str(rows), "-o", str(out)]
    command += ["--set", f"target.path={folder}", "--set", "generate.max_new_tokens=4"]
    command += ["--set", "drafter.num_features=2"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, DataError) and "--skip-invalid" in str(refused.exception)
    assert "conversation system: the chat template refuses it (Roles must alternate)" in str(
        refused.exception
    )
    shutil.rmtree(out.with_name(out.name + ".parts"), ignore_errors=True)
    for _ in range(2):  # the same when the command is given again
        done = CliRunner().invoke(app, [*command, "--skip-invalid"])
        assert done.exit_code == 0, (done.output, done.exception)
        named = [line for line in done.stderr.splitlines() if line.startswith("left out:")]
        assert [line.split(":")[1].split()[-1] for line in named] == ["system", "twice"][
            : 1 + (stage == "capture")
        ]
        if stage == "generate":  # which asks both questions of one after the other
            assert set(records(out)) == {"good", "twice", "long"}
        else:
            assert "2 samples" in done.output


def test_records_are_not_rendered_again(folder: Path, tmp_path: Path) -> None:
    turn = {"prompt_ids": [5, 6], "answer_ids": [7], "finish_reason": "stop"}
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"id": "a", "messages": ROWS["twice"], "answers": [turn]}) + "\n")
    shown, skipped = TemplateFormat(load_tokenizer(str(folder))), SkippedRows()
    assert len(list(learnt_ones(iterate_conversations([path]), shown, skipped))) == 1 and not skipped.count


def test_a_later_question_counts_too(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    middle = [*ROWS["good"], {"role": "system", "content": "Be short."}, {"role": "user", "content": "and?"}]
    path.write_text(json.dumps({"id": "middle", "messages": middle}) + "\n")
    shown, skipped = TemplateFormat(load_tokenizer(str(folder))), SkippedRows()
    assert not list(asked_ones(iterate_conversations([path]), shown, skipped))
    assert skipped.first == [
        "conversation middle: the chat template refuses it (Roles must alternate); change or remove it"
    ]
