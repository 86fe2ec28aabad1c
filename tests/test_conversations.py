"""Reading conversations: the three forms, every kind of bad line, and the loss mask over assistant turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken

from draftkit.data.conversations import Conversation, Message, read_conversations
from draftkit.data.template import RewrittenError, render_conversation, render_prompt
from draftkit.errors import DataError
from draftkit.target.tokenizer import load_tokenizer

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "a list holds values"},
    {"role": "user", "content": "and a list?"},
    {"role": "assistant", "content": "assistant"},
]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_three_forms_become_one(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.jsonl",
        {"messages": TURNS, "id": "a", "domain": "chat"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"turns": ["first", "second"]},
    )
    openai, sharegpt, turns = read_conversations([path])
    assert (openai.id, openai.domain, len(openai.messages)) == ("a", "chat", 5)
    assert sharegpt.messages == (Message("user", "Hi"), Message("assistant", "Ho"))
    assert [m.role for m in turns.messages] == ["user", "user"]
    assert turns.domain == "mixed"
    assert read_conversations([path])[1].id == sharegpt.id, "made-up ids are stable"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "holds no conversation"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n{"messages": [', ":2: is not JSON .* cut off"),
        (b'{"messages": \n', ":1: is not JSON"),
        (b'{"turns": ["\xff"]}\n', r":1: is not UTF-8 \(byte 12\)"),
        (b"[1, 2]\n", ":1: is a list, must be a JSON object"),
        (b'{"text": "x"}\n', "needs one of the keys"),
        (b'{"messages": "x"}\n', "messages must be a list"),
        (b'{"messages": []}\n', "messages must be a list with at least one turn"),
        (b'{"messages": [{"role": "boss", "content": "x"}]}\n', r"messages\[0\]: role 'boss' is not known"),
        (b'{"messages": [{"role": "user", "content": 3}]}\n', "content must be a non-empty string"),
        (b'{"messages": [{"role": "user", "content": ""}]}\n', "content must be a non-empty string"),
        (b'{"messages": ["x"]}\n', r"messages\[0\]: is a str, must be an object"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "has no user turn"),
        (
            b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}\n',
            "begins with assistant",
        ),
        (b'{"turns": ["x"], "id": [1]}\n', "id is a list"),
        (b'{"turns": ["a \\ud800"]}\n', r":1: holds half a character \('\\ud800'\)"),
        (b'{"turns": ["a"], "id": "\\udfff"}\n', ":1: holds half a character"),
        (b'{"turns": ["a"], "domain": "\\ud800"}\n', ":1: holds half a character"),
        (b'{"turns": ["x"], "id": ' + b"9" * 5000 + b"}\n", ":1: holds a number that is too long"),
        (b"[" * 10**5 + b"\n", ":1: is nested too deeply"),
        (b'{"turns": ["x"], "id": "a"}\n{"turns": ["y"], "id": "a"}\n', ":2: id 'a' was there before"),
    ],
)
def test_bad_lines_are_named(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read_conversations([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_conversations([tmp_path / "nothing.jsonl"])


# Templates as the families have them: ChatML (Qwen), header marks (Llama 3), turns with trimmed content (Gemma).
TEMPLATES = {
    "chatml": None,
    "headers": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|endoftext|>\n\n' + m.content | trim + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|endoftext|>\n\n' }}{% endif %}"
    ),
    "think": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_covers_what_the_assistant_writes_and_nothing_else(name: str, target_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(str(target_folder))
    if TEMPLATES[name]:
        tokenizer.chat_template = TEMPLATES[name]
    conversation = Conversation("x", "chat", tuple(Message(**m) for m in TURNS))
    rendered = render_conversation(tokenizer, conversation)
    written = tokenizer.decode([t for t, m in zip(rendered.tokens, rendered.loss_mask, strict=True) if m])
    assert written == "a list holds values<|im_end|>assistant<|im_end|>"
    whole = tokenizer(tokenizer.apply_chat_template(TURNS, tokenize=False), add_special_tokens=False)["input_ids"]
    assert list(rendered.tokens) == whole


QWEN3 = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.last = messages.index(m) -%}{%- endfor -%}
{%- for m in messages -%}
    {%- set content, thinking = m.content, '' -%}
    {%- if m.role == 'assistant' and '</think>' in content -%}
        {%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
        {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>' + m.role + '\n' -}}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thinking) -%}
        {{- '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
    {%- else -%}{{- content -}}{%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}"""  # what Qwen3's published template does to answers


@pytest.mark.parametrize(
    ("answers", "written"),
    [
        (["<think>\nadd\n</think>\n\na list"], "<think>\nadd\n</think>\n\na list<|im_end|>"),
        (["<think>add</think>a list"], "<think>\nadd\n</think>\n\na list<|im_end|>"),
        (["add\n</think>\n\na list"], "add\n</think>\n\na list<|im_end|>"),  # the prompt ended with <think>
        (["<think>\n\n</think>\n\na list"], "<think>\n\n</think>\n\na list<|im_end|>"),
        (["a list"], "a list<|im_end|>"),
        (["\na list"], "a list<|im_end|>"),
        (["<think>\nadd\n</think>\n\na", "<think>\nadd\n</think>\n\nb"], "a<|im_end|><think>\nadd\n</think>\n\nb<|im_end|>"),
    ],
)
def test_thinking_is_learnt_where_the_template_leaves_it(answers: list[str], written: str, target_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(str(target_folder))
    tokenizer.chat_template = QWEN3
    turns = [m for i, a in enumerate(answers) for m in (Message("user", f"{i}"), Message("assistant", a))]
    rendered = render_conversation(tokenizer, Conversation("x", "chat", tuple(turns)))
    assert tokenizer.decode([t for t, m in zip(rendered.tokens, rendered.loss_mask, strict=True) if m]) == written


def test_the_end_of_a_turn_is_learnt_also_where_its_token_has_no_name(target_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(str(target_folder))
    tokenizer.add_tokens(AddedToken("<end_of_turn>", special=True), special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '<end_of_turn>\n' }}{% endfor %}"
    assert "<end_of_turn>" not in tokenizer.all_special_tokens
    rendered = render_conversation(tokenizer, Conversation("x", "chat", (Message("user", "a"), Message("assistant", "b"))))
    learnt = [t for t, m in zip(rendered.tokens, rendered.loss_mask, strict=True) if m]
    assert tokenizer.decode(learnt) == "b<end_of_turn>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{% for m in messages %}{{ m.x", "unexpected end of template"),
        ("{{ messages[0] + 1 }}", "unsupported operand"),
    ],
)
def test_what_a_template_raises_names_the_conversation(template: str, reason: str, target_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(str(target_folder))
    tokenizer.chat_template = template
    for render in (
        lambda: render_conversation(tokenizer, Conversation("x-7", "chat", (Message("user", "a"),))),
        lambda: render_prompt(tokenizer, TURNS[:2], "x-7"),
    ):
        with pytest.raises(DataError, match=f"^conversation x-7: the chat template refuses it \\({reason}") as error:
            render()
        assert type(error.value) is DataError, "capture ends, it does not leave it out"
        assert "\n" not in str(error.value)


def test_a_template_that_rewrites_contents_is_refused(target_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(str(target_folder))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content | upper }}{% endfor %}"
    with pytest.raises(RewrittenError, match="rewrites the content of message 0"):
        render_conversation(tokenizer, Conversation("x", "chat", tuple(Message(**m) for m in TURNS)))


def test_a_prompt_ends_where_the_assistant_begins(target_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(str(target_folder))
    prompt = render_prompt(tokenizer, TURNS[:2])
    whole = render_conversation(tokenizer, Conversation("x", "c", tuple(Message(**m) for m in TURNS[:3])))
    assert whole.tokens[: len(prompt)] == prompt
    assert whole.loss_mask.index(True) == len(prompt)
