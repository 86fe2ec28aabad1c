# ruff: noqa: E501  (templates are kept as they are written)
"""Chat templates of the families, written anew in a few lines from their documented formats."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

MARKS = (
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<start_of_turn>",
    ),
    *(
        "<end_of_turn>",
        "<|turn>",
        "<turn|>",
        "<|channel>",
        "<channel|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
    ),
    *(
        "<|channel|>",
        "<|return|>",
        "<|call|>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "</s>",
    ),
    *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[THINK]", "[/THINK]"),
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", '<|"|>'),
    *("<|think|>", "<|constrain|>"),
)


@dataclass(frozen=True)
class Family:
    """A template and what it can show; `reasoning_name` is the field in which it looks for thoughts."""

    template: str
    ends: tuple[str, ...]
    has_tools: bool = False
    has_reasoning: bool = False
    reasoning_name: str = "reasoning_content"
    switches: dict[str, Any] = field(default_factory=dict)
    calls_at_once: int = 2
    prompt_only: str = ""  # what the prompt alone ends with: history does not keep it
    thinks_with_calls: bool = False  # thoughts of other answers are not shown

    def as_transformers_takes_it(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """OpenAI's messages as the documentation of `apply_chat_template` wants them."""
        found = []
        for message in messages:
            plain = {**message, "content": message["content"] or ""}
            if "reasoning_content" in plain:
                plain[self.reasoning_name] = plain.pop("reasoning_content")
            if "tool_calls" in plain:
                calls = [
                    c | {"function": c["function"] | {"arguments": json.loads(c["function"]["arguments"])}}
                    for c in plain["tool_calls"]
                ]
                plain["tool_calls"] = calls
            found.append(plain)
        return found


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3_HEAD = """{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\n' }}{%- endfor %}
{{- 'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.last = messages.index(m) -%}{%- endfor -%}
{%- for m in messages -%}
    {%- set content, thinking = m.content, m.reasoning_content or '' -%}
    {%- if m.role == 'assistant' and not thinking and '</think>' in content -%}
        {%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
        {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if m.role == 'tool' -%}{{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response>' -}}
    {%- else -%}{{- '<|im_start|>' + m.role + '\n' -}}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thinking) -%}
        {{- '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
    {%- else -%}{{- content -}}{%- endif -%}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
        {{- ('\n' if content or not loop.first else '') + '<tool_call>\n{"name": "' + call.function.name -}}
        {{- '", "arguments": ' -}}
        {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
"""
_QWEN3_PROMPT = """{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"""
_QWEN3_ALWAYS = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
_LLAMA3 = """{%- for m in messages %}{%- if m.tool_calls %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + m.tool_calls[0].function.name }}
{{- '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}
{{- m.content | trim }}{{- '<|eot_id|>' }}{%- endif %}
{%- if loop.first and tools %}{{- tools | tojson }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
_MISTRAL = """{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}{%- if m.role == 'user' %}
{%- if tools and m == asked[-1] %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'system' %}{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}{{- '[TOOL_CALLS][' }}{%- for c in m.tool_calls %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
{{- '}' + ('' if loop.last else ', ') }}
{%- endfor %}{{- ']</s>' }}{%- else %}{{- m.content + '</s>' }}{%- endif %}{%- endfor %}"""
_GEMMA3 = """{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
# Calls and their results stand in one turn; thoughts are shown with calls alone, and after the last question.
_GEMMA4 = """{%- macro written(value) -%}
{%- if value is string %}{{- '<|"|>' + value + '<|"|>' }}
{%- elif value is mapping %}{{- '{' }}{%- for k, v in value | dictsort %}{{- k + ':' + written(v) }}
{{- '' if loop.last else ',' }}{%- endfor %}{{- '}' }}{%- else %}{{- value | tojson }}{%- endif %}{%- endmacro -%}
{%- set ns = namespace(last=-1, before='') -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.last = messages.index(m) -%}{%- endfor -%}
{%- if enable_thinking or tools or messages[0].role == 'system' %}{{- '<|turn>system\n' }}
{{- '<|think|>\n' if enable_thinking else '' }}
{{- messages[0].content | trim if messages[0].role == 'system' else '' }}
{%- for tool in tools or [] %}{{- '<|tool>declaration:' + tool.function.name + written(tool.function.parameters) }}
{{- '<tool|>' }}{%- endfor %}{{- '<turn|>\n' }}{%- endif %}
{%- for m in messages if m.role not in ('system', 'tool') %}
{%- if not (m.role == 'assistant' and ns.before == 'assistant') %}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{%- endif %}{%- set ns.before = m.role %}
{%- if m.reasoning and m.tool_calls and messages.index(m) > ns.last %}
{{- '<|channel>thought\n' + m.reasoning + '\n<channel|>' }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '<|tool_call>call:' + call.function.name + written(call.function.arguments) + '<tool_call|>' }}{%- endfor %}
{%- set results = namespace(open=true, found=false) %}
{%- for r in messages[messages.index(m) + 1:] %}{%- if r.role != 'tool' %}{%- set results.open = false %}{%- endif %}
{%- if m.tool_calls and results.open %}{%- set results.found = true %}
{{- '<|tool_response>response:' + m.tool_calls[0].function.name + '{value:' + written(r.content) + '}' }}
{{- '<tool_response|>' }}{%- endif %}{%- endfor %}
{{- m.content | trim }}
{%- if m.tool_calls and not results.found %}{{- '<|tool_response>' }}
{%- elif not (results.found and not m.content) %}{{- '<turn|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<|turn>model\n' }}
{{- '' if enable_thinking else '<|channel>thought\n<channel|>' }}{%- endif %}"""
_GPT_OSS = """{%- if tools %}{{- '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- if m.thinking and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{%- if m.tool_calls %}{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}
{{- '<|channel|>commentary json<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}{%- endif %}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

FAMILIES = {
    "chatml": Family(_CHATML, ("<|im_end|>",)),  # SmolLM2, and the embedded target's
    "qwen3": Family(_QWEN3_HEAD + _QWEN3_PROMPT, ("<|im_end|>",), True, True),
    "qwen3 without thinking": Family(
        _QWEN3_HEAD + _QWEN3_PROMPT, ("<|im_end|>",), True, switches={"enable_thinking": False}
    ),
    "qwen3 thinking only": Family(_QWEN3_HEAD + _QWEN3_ALWAYS, ("<|im_end|>",), True, True),
    "llama3": Family(_LLAMA3, ("<|eot_id|>",), True, calls_at_once=1),
    "mistral": Family(_MISTRAL, ("</s>",), True),
    "gemma3": Family(_GEMMA3, ("<end_of_turn>",)),
    "gemma4": Family(
        _GEMMA4, ("<turn|>", "<|tool_response>"), True, prompt_only="<|channel>thought\n<channel|>"
    ),
    "gemma4 thinking": Family(
        *(_GEMMA4, ("<turn|>", "<|tool_response>"), True, True, "reasoning", {"enable_thinking": True}),
        thinks_with_calls=True,
    ),
    "gpt-oss": Family(_GPT_OSS, ("<|return|>", "<|call|>"), True, True, "thinking", calls_at_once=1),
}
