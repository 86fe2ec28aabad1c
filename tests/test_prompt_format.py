"""The prompt format: what a template writes, which tokens are the assistant's, and an answer taken apart
again."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken

from checks.chats import conversations
from draftkit.errors import ConfigError
from draftkit.target.prompt_format import RewrittenError, TemplateError
from draftkit.target.template_format import PARALLEL, TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from support.templates import FAMILIES, MARKS

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "a list holds values"},
    {"role": "user", "content": "and a list?"},
    {"role": "assistant", "content": "assistant"},
]
CHATML = FAMILIES["chatml"].template
QWEN3 = FAMILIES["qwen3"].template


@pytest.fixture(scope="module")
def folder(target_folder: Path) -> Path:
    return target_folder


def shown(folder: Path, template: str | None = None, **switches: Any) -> TemplateFormat:
    """The tiny tokenizer with the marks of all families as special tokens, and a template."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = template or tokenizer.chat_template
    return TemplateFormat(tokenizer, switches)


def written(told: TemplateFormat, messages: list[dict[str, Any]], **kwargs: Any) -> list[str]:
    return [told.tokenizer.decode(turn.answer_ids) for turn in told.turns(messages, **kwargs)]


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_conversations_are_rendered_as_the_template_does_and_the_answers_found(
    family: str, folder: Path
) -> None:
    """Token by token: each prompt is `apply_chat_template` of what came before, each answer what follows in
    the whole."""
    known = FAMILIES[family]
    told = shown(folder, known.template, **known.switches)
    apply = told.tokenizer.apply_chat_template
    for messages, tools in conversations(50, known.has_tools, known.has_reasoning, known.calls_at_once):
        plain = known.as_transformers_takes_it(messages)
        given = {"tools": tools or None, "tokenize": False} | known.switches
        assert told.text(messages, tools) == apply(plain, add_generation_prompt=True, **given)
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        turns = told.turns(messages, tools)
        assert len(turns) == len(places) > 0
        for place, turn in zip(places, turns, strict=True):
            prompt = apply(plain[:place], add_generation_prompt=True, **given)
            whole = apply(plain[: place + 1], add_generation_prompt=False, **given)
            assert turn.prompt_ids == told.encode(prompt)
            prompt = prompt.removesuffix(known.prompt_only)
            answer = told.tokenizer.decode(turn.answer_ids)
            assert whole.startswith(prompt), "these families write answers as their prompts begin them"
            assert whole[len(prompt) :].rstrip("\n") == answer
            assert answer.endswith(known.ends), "the end of the turn is the assistant's to write"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_taken_apart_into_what_was_said(family: str, folder: Path) -> None:
    known = FAMILIES[family]
    told = shown(folder, known.template, **known.switches)
    for messages, tools in conversations(50, known.has_tools, known.has_reasoning, known.calls_at_once):
        last = messages[-1]
        parts = told.parse(told.turns(messages, tools)[-1].answer_ids)
        assert parts.content.strip() == (last["content"] or "")
        thought = None if known.thinks_with_calls else last.get("reasoning_content")
        assert parts.reasoning == thought
        assert ("reasoning_content" in told.unshown(messages, tools)) == known.thinks_with_calls
        calls = [c["function"] for m in messages for c in m.get("tool_calls", ())]
        found = [
            c["function"] for t in told.turns(messages, tools) for c in told.parse(t.answer_ids).tool_calls
        ]
        assert found == calls


@pytest.mark.parametrize(
    ("answer", "learnt", "in_prompt"),
    [
        ("<think>\nadd\n</think>\n\na list", "<think>\nadd\n</think>\n\na list<|im_end|>", ""),
        ("<think>add</think>a list", "<think>\nadd\n</think>\n\na list<|im_end|>", ""),
        ("<think>\n\n</think>\n\na list", "<think>\n\n</think>\n\na list<|im_end|>", ""),
        # the template's own empty part: nobody wrote it
        ("a list", "a list<|im_end|>", "<think>\n\n</think>\n\n"),
    ],
)
def test_thinking_in_the_text_is_learnt_as_it_is_written(
    answer: str, learnt: str, in_prompt: str, folder: Path
) -> None:
    told = shown(folder, QWEN3)
    [turn] = told.turns([{"role": "user", "content": "what?"}, {"role": "assistant", "content": answer}])
    assert told.tokenizer.decode(turn.answer_ids) == learnt
    assert told.tokenizer.decode(turn.prompt_ids).endswith("<|im_start|>assistant\n" + in_prompt)


def test_earlier_thoughts_are_learnt_where_they_were_thought_and_missing_where_history_drops_them(
    folder: Path,
) -> None:
    told = shown(folder, QWEN3)
    think = "<think>\n{}\n</think>\n\n{}"
    messages = [
        m
        for i in "ab"
        for m in (
            {"role": "user", "content": i},
            {"role": "assistant", "content": i * 2, "reasoning_content": f"over {i}"},
        )
    ]
    first, second = told.turns(messages)
    decode = told.tokenizer.decode
    assert [decode(t.answer_ids) for t in (first, second)] == [
        think.format("over a", "aa") + "<|im_end|>",
        think.format("over b", "bb") + "<|im_end|>",
    ]
    assert "over a" not in decode(second.prompt_ids) and "aa" in decode(second.prompt_ids)


def test_a_switch_changes_the_prompt_and_an_answer_of_the_other_mode_is_refused(folder: Path) -> None:
    told = shown(folder, QWEN3, enable_thinking=False)
    asked = [{"role": "user", "content": "what?"}]
    assert told.text(asked).endswith("<think>\n\n</think>\n\n")
    assert written(told, [*asked, {"role": "assistant", "content": "a list"}]) == ["a list<|im_end|>"]
    with pytest.raises(RewrittenError, match="another way than its prompt begins one"):
        told.turns([*asked, {"role": "assistant", "content": "a list", "reasoning_content": "hm"}])


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "add_generation_prompt"])
def test_switches_that_the_template_does_not_know_are_refused(name: str, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"template switch {name}: .*(never mentions it|is set by draftkit)"
    ):
        shown(folder, QWEN3, **{name: True})


# What only the prompt holds (public reports: Nemotron 3, DeepSeek-R1, Gemma 4 with thinking off).
OPENED = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n{}{% endif %}")


@pytest.mark.parametrize("opened", ["<think>\n", "<|channel>thought\n<channel|>"])
def test_the_text_to_learn_begins_as_the_prompt_does(opened: str, folder: Path) -> None:
    told = shown(folder, OPENED.replace("{}", opened))
    closed = "\n</think>\nFour." if "think>" in opened else ""
    [turn] = told.turns(
        [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": f"Two and two.{closed}"}]
    )
    assert told.tokenizer.decode(turn.prompt_ids).endswith(opened)
    assert told.tokenizer.decode(turn.answer_ids) == f"Two and two.{closed}<|im_end|>"


R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ "
    "m.content.split('</think>')[-1] }}"
    "<|im_end|>{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_thoughts_that_a_template_drops_are_learnt_where_the_prompt_opens_them(folder: Path) -> None:
    told = shown(folder, R1)
    asked = {"role": "user", "content": "2+2?"}
    for said in (
        {"content": "Two and two.\n</think>\n\nFour."},
        {"content": "Four.", "reasoning_content": "Two and two."},
    ):
        assert written(told, [asked, {"role": "assistant", **said}]) == [
            "Two and two.\n</think>\n\nFour.<|im_end|>"
        ]
    with pytest.raises(RewrittenError, match="opens a thinking part, and the answer has none"):
        told.turns([asked, {"role": "assistant", "content": "Four."}])


def test_a_cut_answer_learns_no_end_of_turn(folder: Path) -> None:
    told = shown(folder, CHATML)
    assert written(told, TURNS, cut=True) == ["a list holds values<|im_end|>", "assistant"]


def test_what_is_context_only(folder: Path) -> None:
    told = shown(folder, CHATML)
    messages = [
        {"role": "assistant", "content": "Hello."},  # nobody asked
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "bad", "weight": 0},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "good", "weight": 1},
        {"role": "assistant", "content": "and more"},
    ]
    assert written(told, messages) == ["good<|im_end|>", "and more<|im_end|>"]
    assert told.unshown(messages, [{"function": {"name": "f"}}]) == ("tool_calls", "tools")


def test_the_end_of_a_turn_is_learnt_also_where_its_token_has_no_name(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(str(folder))
    tokenizer.add_tokens(AddedToken("<end_of_turn>", special=True), special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert "<end_of_turn>" not in tokenizer.all_special_tokens
    assert written(
        TemplateFormat(tokenizer), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ) == ["b<end_of_turn>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{% for m in messages %}{{ m.x", "unexpected end of template"),
        ("{{ messages[0] + 1 }}", "unsupported operand"),
    ],
)
def test_what_a_template_raises_is_told(template: str, reason: str, folder: Path) -> None:
    told = shown(folder, template)
    for render in (lambda: told.turns(TURNS), lambda: told.prompt(TURNS[:2])):
        with pytest.raises(TemplateError, match=f"^the chat template refuses it \\({reason}") as error:
            render()
        assert "\n" not in str(error.value)


def test_a_template_that_rewrites_answers_is_refused(folder: Path) -> None:
    rewriting = (
        "{% for m in messages %}{{ m.role + (m.content | upper if loop.last else m.content) }}{% endfor %}"
    )
    told = shown(folder, rewriting + "{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(RewrittenError, match="another way"):
        told.turns([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


# gpt-oss: thoughts before calls are dropped once there is an answer; Mistral: the system's message stands in
# the last question alone, and is dropped once that is answered
DROPS_THOUGHTS = """{% for m in messages %}<|start|>{{ m.role }}
{%- if m.thinking and (loop.last or messages[-1].role != 'assistant') %}<|channel|>analysis<|message|>
{{- m.thinking }}{% endif %}<|message|>{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}
{{- '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
DROPS_SYSTEM = """{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]
{{- messages[0].content + '/' if loop.last and messages[0].role == 'system' else '' }}{{ m.content }}[/INST]
{%- else %}{{ m.content }}</s>{% endif %}{% endfor %}"""
WORKING: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "look",
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "so"},
]


@pytest.mark.parametrize(
    ("template", "messages", "prompt_has", "answer"),
    [
        (DROPS_THOUGHTS, WORKING, "look", "<|channel|>analysis<|message|>so<|message|>b<|end|>"),
        (DROPS_SYSTEM, [*WORKING[:2], {"role": "assistant", "content": "b"}], "[INST]Be short./a", "b</s>"),
    ],
    ids=["gpt-oss", "Mistral"],
)
def test_an_answer_that_changes_what_was_before_it_is_learnt_after_its_own_prompt(
    template: str, messages: list[dict[str, Any]], prompt_has: str, answer: str, folder: Path
) -> None:
    """Published templates of agents: each conversation with tools was left out as rewritten."""
    told = shown(folder, template)
    turn = told.turns(messages)[-1]
    assert told.tokenizer.decode(turn.answer_ids) == answer
    assert turn.prompt_ids == told.prompt(messages[:-1]) and prompt_has in told.tokenizer.decode(
        turn.prompt_ids
    )
    assert prompt_has not in told.text(messages, generation_prompt=False)


def test_thoughts_are_blocks_of_the_content_where_the_template_wants_them_so(folder: Path) -> None:
    blocks = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}"
        "{{ '[THINK]' + b.thinking + '[/THINK]' if b['type'] == 'thinking' else b.text }}{% endfor %}"
        "{% endif %}</s>{% endfor %}"
    )
    told = shown(folder, blocks)
    [turn] = told.turns([{"role": "user", "content": "a"}, WORKING[-1]])
    assert told.tokenizer.decode(turn.answer_ids) == "[THINK]so[/THINK]b</s>"
    parts = told.parse(turn.answer_ids)
    assert (parts.reasoning, parts.content) == ("so", "b")


@pytest.mark.parametrize(("family", "unshown"), [("gpt-oss", (PARALLEL,)), ("qwen3", ())])
def test_calls_beside_the_first_one_are_named_where_a_template_drops_them(
    family: str, unshown: tuple[str, ...], folder: Path
) -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in "fg"]
    messages = [WORKING[1], {"role": "assistant", "content": None, "tool_calls": calls}]
    assert shown(folder, FAMILIES[family].template).unshown(messages) == unshown


def test_a_template_that_prints_the_date_gets_the_day_of_the_run(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(str(folder))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    asked = [{"role": "user", "content": "a"}]
    assert TemplateFormat(tokenizer, today=date(2026, 11, 29)).text(asked).startswith("29 Nov 2026")
    assert TemplateFormat(tokenizer).text(asked).startswith(date.today().strftime("%d %b %Y"))


def test_parts_developers_and_images(folder: Path) -> None:
    told = shown(folder, CHATML)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "system\nBe brief.<|im_end|>" in told.text([{"role": "developer", "content": "Be brief."}])
    assert "user\none\ntwo<|im_end|>" in told.text([{"role": "user", "content": parts}])
    with pytest.raises(TemplateError, match="content part of type 'image_url'"):
        told.text([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
