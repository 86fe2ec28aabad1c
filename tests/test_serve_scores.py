"""Log probabilities of prompts over HTTP and from Python, as evaluation tools ask for them: what plain
Transformers says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from draftkit import LLM, SamplingParams
from support.server import ASSET, SERVE, Server, serving

TEXT = "def add(a, b):\n    return a + b  # naïve\n\n\ndef mul(a, b):\n"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(command=SERVE) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def wanted_TV(tokenizer: Any) -> torch.Tensor:
    """Log probabilities after each token of TEXT, [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(**tokenizer(TEXT, return_tensors="pt")).logits[0].float(), -1)


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"prompt": TEXT, "temperature": 0, "max_tokens": 3, **fields}
    answer = server.http.post(
        fields.pop("path", COMPLETIONS), json={k: v for k, v in body.items() if k != "path"}
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_an_evaluation_harness_gets_the_log_likelihood_of_its_prompts(
    server: Server, tokenizer: Any, wanted_TV: torch.Tensor
) -> None:
    """The request that lm-evaluation-harness sends for each choice of a question, as token ids."""
    ids = tokenizer(TEXT)["input_ids"]
    [choice] = ask(server, prompt=[ids], echo=True, logprobs=1, max_tokens=1, seed=1234)["choices"]
    told = choice["logprobs"]
    lists = [told[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")]
    assert [len(found) for found in lists] == [len(ids) + 1] * 4
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    own_T = wanted_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert told["token_logprobs"][1:-1] == pytest.approx(own_T.tolist(), abs=2e-3)
    greedy_T = wanted_TV[:-1].argmax(-1) == torch.tensor(ids[1:])
    said = [
        max(top, key=top.get) == name
        for name, top in zip(told["tokens"], told["top_logprobs"], strict=True)
        if top
    ]
    assert said[:-1] == greedy_T.tolist() and 0 < sum(greedy_T) < len(greedy_T)
    assert choice["text"].startswith(TEXT) and told["text_offset"][:3] == [0, 3, 7]
    pairs = zip(told["text_offset"], told["tokens"], strict=True)
    assert all(
        choice["text"].startswith(name, at) for at, name in pairs if "\ufffd" not in name and name.isascii()
    )


def test_a_stream_begins_with_the_scored_prompt(server: Server) -> None:
    fields = {"echo": True, "logprobs": 2, "n": 2, "max_tokens": 9}
    whole = ask(server, **fields)["choices"]
    with server.http.stream(
        "POST", COMPLETIONS, json={"prompt": TEXT, "temperature": 0, "stream": True, **fields}
    ) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    for index in (0, 1):
        chunks = [c for line in lines for c in json.loads(line)["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in chunks) == whole[index]["text"]
        for name, values in whole[index]["logprobs"].items():
            assert [v for c in chunks if c["logprobs"] for v in c["logprobs"][name]] == values


def test_the_prompt_alone(server: Server) -> None:
    told = ask(server, echo=True, logprobs=0, max_tokens=0)
    [choice] = told["choices"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "length"
    assert (
        len(choice["logprobs"]["tokens"]) == told["usage"]["prompt_tokens"]
        and told["usage"]["completion_tokens"] == 0
    )
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * (
        told["usage"]["prompt_tokens"] - 1
    )
    assert ask(server, echo=True, max_tokens=0)["choices"][0]["text"] == TEXT


def test_prompt_logprobs_have_vllms_form(server: Server, tokenizer: Any, wanted_TV: torch.Tensor) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    for choice in ask(server, prompt_logprobs=3, n=2, temperature=1)["choices"]:
        assert "logprobs" in choice and choice["logprobs"] is None
        none, *rest = choice["prompt_logprobs"]
        assert none is None and len(rest) == len(ids) - 1
        for place, (token, told) in enumerate(zip(ids[1:], rest, strict=True)):
            own, best = told[str(token)], wanted_TV[place].topk(3)
            assert own["logprob"] == pytest.approx(float(wanted_TV[place, token]), abs=2e-3)
            assert own["decoded_token"] in TEXT or "\ufffd" in own["decoded_token"]
            assert set(told) == {str(token), *map(str, best.indices.tolist())}
            ranks = {entry["rank"]: entry["logprob"] for entry in told.values()}
            assert [ranks[k] for k in (1, 2, 3)] == pytest.approx(best.values.tolist(), abs=2e-3)
            assert own["rank"] == int((wanted_TV[place] > wanted_TV[place, token]).sum()) + 1


def test_chats_have_them_beside_their_choices(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    told = server.http.post("/v1/chat/completions", json=body).json()
    none, *rest = told["prompt_logprobs"]
    assert none is None and [list(entry) for entry in rest] == [
        [str(i)] for i in told["prompt_token_ids"][1:]
    ]
    assert "prompt_logprobs" not in told["choices"][0]


def test_python_gets_them_with_the_answers(tokenizer: Any, wanted_TV: torch.Tensor) -> None:
    [scored, plain] = LLM("tiny").generate(
        [TEXT, TEXT], [SamplingParams(max_tokens=2, prompt_logprobs=1), SamplingParams(max_tokens=2)]
    )
    assert plain.prompt_logprobs is None and scored.prompt_logprobs is not None
    ids = tokenizer(TEXT)["input_ids"]
    assert [t.token_id for t in scored.prompt_logprobs] == ids[1:]
    own_T = wanted_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert [t.logprob for t in scored.prompt_logprobs] == pytest.approx(own_T.tolist(), abs=2e-3)
