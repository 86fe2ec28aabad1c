"""Request fields that would change the answer and that this server does not have.

Unknown fields are ignored, so these must be known in order to refuse them: an answer that looks right and is
another one than was asked for is worse than a 400.
"""

from __future__ import annotations

from typing import Any

from draftkit.serve.problem import Refusal

_FORM = "; use structured_outputs"
# OpenAI's, vLLM's and SGLang's names, and what to do instead.
_REFUSED = {
    "audio": "; this server answers with text",
    "chat_template": "; the target's own template is used",
    "custom_logit_processor": "",
    "ebnf": _FORM,
    "function_call": "; use tools",
    "functions": "; use tools",
    "guided_choice": _FORM,
    "guided_grammar": _FORM,
    "guided_json": _FORM,
    "guided_regex": _FORM,
    "input_ids": "; give token ids as the prompt of /v1/completions",
    "json_schema": _FORM,
    "logits_processors": "",
    "logprob_token_ids": "",
    "lora_path": "",
    "no_stop_trim": "; use include_stop_str_in_output",
    "prompt_embeds": "",
    "regex": _FORM,
    "repetition_detection": "",
    "stop_regex": "; use stop",
    "structural_tag": _FORM,
    "suffix": "",
    "thinking_token_budget": "",
    "use_beam_search": "",
}
UNSUPPORTED = frozenset({*_REFUSED, "modalities"})


def refuse_unsupported(body: dict[str, Any]) -> None:
    """Raises Refusal for the first field of a request that would have to be ignored. Values that ask for
    nothing pass: false, "", [], {}."""
    for name, advice in _REFUSED.items():
        if name in body and _asks(name, body[name]):
            raise Refusal(name, f"{name} is not supported by this server{advice or '; leave it out'}")
    if body.get("modalities") not in (None, [], ["text"]):
        raise Refusal(
            "modalities", 'modalities: this server answers with text only; give ["text"] or leave it out'
        )


def _asks(name: str, value: Any) -> bool:
    """Whether this value asks for anything; 0 does."""
    if name == "function_call" and value == "none":
        return False
    return value is not False and value not in ("", [], {})
