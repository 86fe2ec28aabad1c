"""Keys of messages that have the names of DeepSeek-V4's fields where the target is another, or not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from draftkit.data.conversations import iterate_conversations, read_conversations
from draftkit.errors import DataError
from draftkit.settings import TargetSettings
from draftkit.target.deepseek_v4_messages import FIELDS
from draftkit.target.place import deepseek_v4_switches
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from support.server import serving


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


OTHERS: dict[str, list[dict[str, Any]]] = {  # keys of other programs that have the names of V4's fields
    "task": [user("x", task="math")],
    "nothing": [user("x", task="", prefix="")],
    "number": [user("x", prefix=0)],
    "text": [user("x", prefix="Once")],
    "empty": [user("x", response_format={})],
}


@pytest.mark.parametrize("name", OTHERS)
def test_keys_of_other_programs_mean_nothing_to_other_targets(name: str, tmp_path: Path) -> None:
    row = OTHERS[name]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"messages": [*row, said("a", task="math")]}) + "\n")
    [read] = read_conversations([file])
    assert read.as_dicts() == [user("x"), said("a")]
    spoken = [{"from": "human", "value": "x"} | {k: v for k, v in row[0].items() if k in FIELDS}]
    file.write_text(json.dumps({"conversations": spoken}) + "\n")
    assert read_conversations([file])[0].as_dicts() == [user("x")]
    with pytest.raises(DataError, match=r"DeepSeek-V4's .*remove it"):
        list(iterate_conversations([file], None, {}))
    tokenizer = load_tokenizer("tiny")
    assert TemplateFormat(tokenizer).prompt(row) == TemplateFormat(tokenizer).prompt([user("x")])


def test_a_target_is_known_by_its_configuration_in_the_hubs_cache_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v4"}')
    switches = {"thinking": False}
    assert deepseek_v4_switches(TargetSettings(path=str(tmp_path), template_switches=switches)) == switches
    assert deepseek_v4_switches(TargetSettings()) is None
    assert deepseek_v4_switches(TargetSettings(path="/there/is/none")) is None
    cached = {"deepseek-ai/DeepSeek-V4-Flash": str(tmp_path / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, *_, **__: cached.get(name))
    assert deepseek_v4_switches(TargetSettings(path="deepseek-ai/DeepSeek-V4-Flash")) == {}
    assert deepseek_v4_switches(TargetSettings(path="other/model")) is None


def test_a_server_of_another_target_ignores_them_and_refuses_deepseeks_own() -> None:
    with serving() as server:

        def ask(**more: Any) -> httpx.Response:
            body = {"messages": [user("x"), said("a"), user("y", **more)], "max_tokens": 2}
            return server.http.post("/v1/chat/completions", json=body)

        plain = ask().json()["usage"]["prompt_tokens"]
        for more in ({"task": "chat-123"}, {"prefix": ""}, {"response_format": {}}, {"prefix": False}):
            answer = ask(**more)
            assert (answer.status_code, answer.json()["usage"]["prompt_tokens"]) == (200, plain), more
        own: tuple[dict[str, Any], ...] = (
            {"task": "query"},
            {"prefix": True},
            {"response_format": {"type": "object"}},
        )
        for more in own:
            answer = ask(**more)
            told = f"{next(iter(more))} is a field of DeepSeek-V4's"
            assert answer.status_code == 400 and told in answer.json()["error"]["message"], more
