"""`LLM`: the engine for Python programs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_decode import make_drafter
from test_engine import small

from draftkit import LLM, SamplingParams
from draftkit.draft.checkpoint import save_drafter
from draftkit.errors import DataError
from draftkit.target.transformers import TransformersTarget

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
TALK = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def llm(target: TransformersTarget, target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("drafter")
    save_drafter(make_drafter(target), folder, {}, torch.float64)
    return LLM(str(target_folder), str(folder), small())


def test_importing_draftkit_imports_no_torch() -> None:
    check = "import draftkit, sys; assert 'torch' not in sys.modules; from draftkit import SamplingParams; SamplingParams()"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_texts_are_the_decoded_tokens_of_plain_greedy_decoding(llm: LLM, target: TransformersTarget) -> None:
    prompts = ["def add(a, b):", "Step 1: 3"]
    answers = llm.generate(prompts, GREEDY)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([llm.tokenizer(prompt)["input_ids"]])
        own = target.model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :].tolist()
        [output] = answer.outputs
        assert list(output.token_ids) == own and answer.prompt_token_ids == tuple(ids[0].tolist())
        assert output.text == llm.tokenizer.decode(own, skip_special_tokens=True) and output.finish_reason == "length"
        assert output.stats.drafted > 0


def test_chat_uses_the_template_and_n_answers_have_seeds_in_a_row(llm: LLM) -> None:
    [three] = llm.chat(TALK, SamplingParams(n=3, max_tokens=12, seed=5))
    rendered = llm.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert list(three.prompt_token_ids) == llm.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    alone = [llm.chat([TALK], SamplingParams(max_tokens=12, seed=seed))[0].outputs[0].text for seed in (5, 6, 7)]
    assert [o.text for o in three.outputs] == alone
    assert len(set(alone)) > 1


def test_a_stop_string_ends_the_text_and_frees_the_engine(llm: LLM) -> None:
    whole = llm.generate("def add(a, b):", GREEDY)[0].outputs[0].text
    stop = whole[len(whole) // 2 :][:3]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, stop=(stop,))
    output = llm.generate("def add(a, b):", params)[0].outputs[0]
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert not llm.engine.has_work() and llm.engine.metrics.kv_used == 0


def test_streams_run_beside_each_other_and_end_when_they_are_closed(llm: LLM) -> None:
    async def read(text: str, most: int) -> str:
        stream, pieces = llm.stream(text, GREEDY), []
        async for piece in stream:
            pieces.append(piece.text)
            if len(pieces) == most:
                break
        await stream.aclose()
        return "".join(pieces)

    async def everything() -> list[str]:
        return list(await asyncio.gather(read("def add", 99), read("Step 1", 99), read("What is", 2)))

    first, second, cut = asyncio.run(everything())
    wanted = [g.outputs[0].text for g in llm.generate(["def add", "Step 1", "What is"], GREEDY)]
    assert [first, second] == wanted[:2]
    assert wanted[2].startswith(cut) and cut != wanted[2]
    assert not llm.engine.has_work()


def test_threads_may_ask_at_the_same_time(llm: LLM) -> None:
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: llm.generate(f"Step {i}", GREEDY)[0].outputs[0].text}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: llm.generate(f"Step {i}", GREEDY)[0].outputs[0].text for i in range(4)}


def test_wrong_requests_are_refused_and_leave_nothing_behind(llm: LLM) -> None:
    with pytest.raises(DataError, match="context is 256"):
        llm.generate(["short", [1] * 300], GREEDY)
    with pytest.raises(DataError, match="2 sampling parameters for 1"):
        llm.generate("x", [GREEDY, GREEDY])
    with pytest.raises(DataError, match="chat template"):
        llm.chat([{"role": 5}], GREEDY)
    assert not llm.engine.has_work()
