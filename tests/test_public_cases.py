"""Cases of public reports in which a drafter learnt what its target never wrote, each in a few lines of
our own."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from draftkit import stages
from draftkit.cli import app
from draftkit.data.conversations import iterate_conversations
from draftkit.data.samples import Sample, SampleCounts, samples_of
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from support.templates import FAMILIES, MARKS

ASKED = {"role": "user", "content": "What is 2+2?"}
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% else %}<|im_start|>user\n{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def learnt(
    folder: Path, template: str, row: dict[str, Any], tmp_path: Path
) -> tuple[list[Sample], Any, SampleCounts]:
    """What a row becomes under a template, and the tokenizer."""
    tokenizer: Any = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = template
    path, counts = tmp_path / "row.jsonl", SampleCounts()
    path.write_text(json.dumps(row) + "\n")
    found = samples_of(iterate_conversations([path]), TemplateFormat(tokenizer), len(tokenizer), counts)
    return list(found), tokenizer, counts


def said(sample: Sample, tokenizer: Any) -> str:
    return str(tokenizer.decode([t for t, own in zip(sample.tokens, sample.loss_mask, strict=True) if own]))


def record(tokenizer: Any, prompt: str, answer: str, reason: str, content: str) -> dict[str, Any]:
    """A row as `generate` writes it."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    turn = {"prompt_ids": ids[0], "answer_ids": ids[1], "finish_reason": reason}
    messages = [ASKED, {"role": "assistant", "content": content}]
    return {"id": "a", "messages": messages, "finish_reason": reason, "answers": [turn]}


def test_thoughts_that_history_drops_are_all_learnt_from_a_record(
    target_folder: Path, tmp_path: Path
) -> None:
    """DeepSeek-R1: 22 tokens written, 5 learnt."""
    plain = load_tokenizer(str(target_folder))
    answer = "Two and two are added.\n</think>\n\nFour.<|im_end|>"
    row = record(plain, "<|im_start|>user\n2+2?<|im_start|>assistant\n<think>\n", answer, "stop", "Four.")
    [sample], tokenizer, _ = learnt(target_folder, R1, row, tmp_path)
    assert said(sample, tokenizer) == answer


def test_channels_are_learnt_with_their_marks(target_folder: Path, tmp_path: Path) -> None:
    """gpt-oss: the marks were stripped, and the parts glued together."""
    row = {"messages": [ASKED, {"role": "assistant", "content": "Four.", "reasoning_content": "Add."}]}
    [sample], tokenizer, _ = learnt(target_folder, FAMILIES["gpt-oss"].template, row, tmp_path)
    assert said(sample, tokenizer) == (
        "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
    )


@pytest.mark.parametrize("opened", ["<think>\n", "<|channel>thought\n<channel|>"])
def test_what_the_prompt_alone_opens_is_in_the_context(
    opened: str, target_folder: Path, tmp_path: Path
) -> None:
    """Nemotron 3, Gemma 4: training text that does not begin as the prompt does."""
    template = FAMILIES["chatml"].template.replace(
        "assistant\n{% endif %}", f"assistant\n{opened}{{% endif %}}"
    )
    content = "Add.\n</think>\nFour." if "think>" in opened else "Four."
    row = {"messages": [ASKED, {"role": "assistant", "content": content}]}
    [sample], tokenizer, _ = learnt(target_folder, template, row, tmp_path)
    whole = tokenizer.decode(list(sample.tokens))
    assert whole.endswith(f"<|im_start|>assistant\n{opened}{content}<|im_end|>")
    assert said(sample, tokenizer) == f"{content}<|im_end|>"


def test_a_text_that_was_cut_in_its_thinking_is_left_out_and_counted(
    target_folder: Path, tmp_path: Path
) -> None:
    """Qwen3: it was stored after an empty thought. The record's own ids are learnt as they are."""
    content = "<think>\nTwo and two are"
    row = {"messages": [ASKED, {"role": "assistant", "content": content}], "finish_reason": "length"}
    found, tokenizer, counts = learnt(target_folder, FAMILIES["qwen3"].template, row, tmp_path)
    assert (found, counts.rewritten) == ([], 1)
    row = record(tokenizer, "<|im_start|>assistant\n", content, "length", content)
    [sample], tokenizer, counts = learnt(target_folder, FAMILIES["qwen3"].template, row, tmp_path)
    assert (said(sample, tokenizer), counts.cut) == (content, 1)


def test_a_cut_answer_learns_what_was_written_and_no_end(target_folder: Path, tmp_path: Path) -> None:
    """64 tokens written, 72 learnt."""
    row = {"messages": [ASKED, {"role": "assistant", "content": "Two and"}], "finish_reason": "length"}
    [sample], tokenizer, counts = learnt(target_folder, FAMILIES["chatml"].template, row, tmp_path)
    assert (said(sample, tokenizer), counts.cut) == ("Two and", 1)


def test_tools_calls_and_thoughts_of_a_row_are_shown_or_named(target_folder: Path, tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    row = {
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Look."},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
            {"role": "assistant", "content": "Sunny.", "reasoning_content": "So."},
        ],
    }
    found, tokenizer, counts = learnt(target_folder, FAMILIES["qwen3"].template, row, tmp_path)
    text = "".join(said(sample, tokenizer) for sample in found)
    assert (
        "<think>\nLook.\n</think>" in text and '"arguments": {"city": "Bern"}' in text and not counts.unshown
    )
    assert '"name": "weather"' in tokenizer.decode(list(found[0].tokens)), "tools are in the prompt"
    *_, counts = learnt(target_folder, FAMILIES["chatml"].template, row, tmp_path)
    assert set(counts.unshown) == {"tools", "tool_calls", "reasoning_content"}


def test_a_capture_that_goes_on_the_next_day_renders_the_day_of_its_beginning(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that prints the date: the same command was "other conversations" after midnight."""
    folder, rows = tmp_path / "target", tmp_path / "rows.jsonl"
    shutil.copytree(target_folder, folder)
    dated = "{{ strftime_now('%d %b %Y') }}" + FAMILIES["chatml"].template
    (folder / "chat_template.jinja").write_text(dated)
    rows.write_text(json.dumps({"messages": [ASKED, {"role": "assistant", "content": "Four."}]}) + "\n")
    small = ["--set", f"target.path={folder}", "--set", "drafter.num_features=2"]
    for day in (1, 2):
        today = type("Day", (date,), {"today": classmethod(lambda cls, day=day: date(2026, 12, day))})
        monkeypatch.setattr(stages, "date", today)
        out = tmp_path / "features"
        done = CliRunner().invoke(app, ["capture", "-c", str(rows), "-o", str(out), *small])
        assert done.exit_code == 0, (done.output, done.exception)
