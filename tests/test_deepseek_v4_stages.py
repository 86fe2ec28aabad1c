"""A DeepSeek-V4 target through every stage: captured, trained on, continued, evaluated, served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch
from typer.testing import CliRunner

from draftkit import LLM, SamplingParams, feature_stages, stages, train_stages
from draftkit.cli import app
from draftkit.config import Recipe, load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.decode import decode
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter
from draftkit.engine.settings import EngineSettings
from draftkit.errors import ConfigError, DataError, TargetError
from draftkit.handover.deepseek_v4 import write_bundled
from draftkit.ops.sampling import Sampling
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
from draftkit.target.loading import load_target
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.weights import TargetFiles
from draftkit.train.batches import BatchMaker, Cut, split_source
from draftkit.train.parallel import ALONE, ParallelDrafter
from draftkit.train.validation import validate
from support.browser import browsing, needs_browser
from support.deepseek_v4 import tiny_folder
from support.hidden_states_server import hidden_states_server
from support.records import records
from support.server import SERVE, Server, serving

SAID = [
    Conversation(
        str(i), "chat", (Message("user", f"Add {i} and {i}."), Message("assistant", "Step 1: 3 + 4 = 7." * 3))
    )
    for i in range(8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("v4") / "DeepSeek-V4-tiny")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    raw = json.loads((folder / "config.json").read_text())
    changes = ["train.steps=12", "train.batch_size=4", "train.anchors=6", "train.validation_share=0.3"]
    changes += ["train.decode_prompts=1", "capture.dtype=float32", f"target.path={folder}"]
    changes += [f"drafter.mask_token_id={raw['dspark_noise_token_id']}"]
    return load_recipe("tiny-deepseek-v4", changes)


def train(
    target: Any, tokenizer: Any, recipe: Recipe, run: Path, out: Path, start: Path | None = None
) -> None:
    features = feature_stages.open_features(recipe, target, tokenizer, [run / "features"])
    train_stages.run_train(
        target, tokenizer, recipe, features, out, lambda: stages.open_target(recipe)[0], start
    )


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    target, tokenizer = stages.open_target(recipe)
    feature_stages.run_capture(target, tokenizer, recipe, SAID, out / "features")
    train(TargetFiles(recipe.target.path), tokenizer, recipe, out, out / "a")
    return out


@pytest.mark.slow
def test_a_module_is_trained_and_reads_the_last_three_layers(recipe: Recipe, run: Path) -> None:
    drafter = open_drafter(run / "a" / "best", TargetFiles(recipe.target.path))
    assert isinstance(drafter, DeepseekV4Drafter)
    assert drafter.config.feature_layers == (2, 3, 4) and drafter.gamma == 5
    lines = [json.loads(line) for line in (run / "a" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and losses[-1] < losses[0]


def test_passes_in_half_precision_learn_too(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    """They go through FSDP2, as several processes do."""
    target, tokenizer = stages.open_target(recipe)
    changed = replace(recipe.train, steps=4, decode_prompts=0, dtype="bfloat16", shard=True)
    half = recipe.model_copy(update={"train": changed})
    train(target, tokenizer, half, run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert (
        len(losses) == 4 and all(0 < loss < 10 for loss in losses) and lines[-1]["validation"]["macro"] >= 1
    )


@pytest.mark.parametrize("source", ["own", "released"])
def test_training_goes_on_from_where_a_module_was(
    recipe: Recipe, run: Path, source: str, tmp_path: Path
) -> None:
    """Step 0 is worth what the module was worth: one that we trained, and the one of the target's
    checkpoint."""
    target, tokenizer = stages.open_target(recipe)
    start = run / "a" / "last" if source == "own" else Path(recipe.target.path)
    again = recipe.model_copy(update={"train": replace(recipe.train, steps=1, decode_prompts=0)})
    train(target, tokenizer, again, run, tmp_path, start)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first = lines[0]["validation"]["macro"]
    if source == "own":
        before = [json.loads(line) for line in (run / "a" / "log.jsonl").read_text().splitlines()]
        last = [line["validation"]["macro"] for line in before if "validation" in line][-1]
        assert first == pytest.approx(last, abs=0.02)  # it was saved in bfloat16
    assert first >= 1
    best = json.loads((tmp_path / "best" / "draftkit.json").read_text())
    assert best["validation"]["macro"] >= first - 1e-9


def test_a_module_that_was_put_into_the_checkpoint_goes_on_as_it_was(
    recipe: Recipe, run: Path, tmp_path: Path
) -> None:
    """Written under `mtp.*`, read back, trained on: step 0 has its own measured quality, to the last bit."""
    target, tokenizer = stages.open_target(recipe)
    folder = tmp_path / "checkpoint"
    shutil.copytree(recipe.target.path, folder)
    written = open_drafter(run / "a" / "last", target, torch.float32)
    write_bundled(cast(DeepseekV4Drafter, written), folder)
    untouched = Path(recipe.target.path)
    again = recipe.model_copy(update={"train": replace(recipe.train, steps=1, decode_prompts=0)})

    def first(start: Path, out: Path) -> dict[str, Any]:
        train(target, tokenizer, again, run, out, start)
        measured: dict[str, Any] = json.loads((out / "log.jsonl").read_text().splitlines()[0])["validation"]
        return measured

    own, back = first(run / "a" / "last", tmp_path / "own"), first(folder, tmp_path / "back")
    features = feature_stages.open_features(recipe, target, tokenizer, [run / "features"])
    held_out = split_source(features, recipe.train.validation_share, recipe.train.seed).validation
    cut = Cut(recipe.train.row_tokens, recipe.train.micro_batch_size)
    maker = BatchMaker(
        features, held_out, recipe.train.batch_size, recipe.train.anchors, recipe.train.seed, cut
    )
    parallel = ParallelDrafter(written, ALONE, False, torch.float32)
    assert own == back == validate(parallel, maker, recipe.train.loss)
    assert first(untouched, tmp_path / "released") != own


@pytest.mark.slow
def test_it_trains_on_what_a_vllm_server_reads(
    recipe: Recipe, run: Path, folder: Path, tmp_path: Path
) -> None:
    """The mean of the streams after the last three layers, live, on the answers' tokens alone; the released
    module goes on, and is validated on a store."""
    talk, shared = tmp_path / "talk.jsonl", tmp_path / "shared"
    shared.mkdir()
    rows = [{"id": c.id, "messages": [m.as_dict() for m in c.messages]} for c in SAID]
    talk.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [f"target.path={folder}", f"drafter.mask_token_id={recipe.drafter.mask_token_id}"]
    sets += ["train.loss.tv=0", "train.loss.confidence=0", "train.steps=6", "train.batch_size=4"]
    sets += ["train.anchors=6", "train.decode_prompts=0", "capture.dtype=float32"]
    words = ["train", "-r", "tiny-deepseek-v4", "-c", str(talk), "--start-from", str(folder)]
    words += [w for s in sets for w in ("--set", s)]

    def losses(out: Path, *more: str) -> list[float]:
        done = CliRunner().invoke(app, [*words, "-o", str(out), *more])
        assert done.exit_code == 0, done.output
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert lines[0]["validation"]["macro"] >= 1
        return [line["loss"] for line in lines if "loss" in line]

    held_out = ("--validation", str(run / "features"))
    target = stages.open_target(recipe)[0]
    with hidden_states_server(target, [3, 4, 5], shared) as url:
        theirs = losses(tmp_path / "theirs", "--from", f"vllm={url}", *held_out)
        refused = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "no"), "--from", f"vllm={url}"])
    assert isinstance(refused.exception, ConfigError) and "with --validation STORE" in str(refused.exception)
    assert theirs == pytest.approx(losses(tmp_path / "own", *held_out), abs=1e-4)
    assert len(theirs) == 6 and theirs[-1] != theirs[0]


def test_shapes_and_targets_that_do_not_go_together_are_refused(
    recipe: Recipe, run: Path, folder: Path, tmp_path: Path, target_folder: Path
) -> None:
    target, tokenizer = stages.open_target(recipe)
    longer = recipe.model_copy(update={"drafter": replace(recipe.drafter, block_size=7)})
    with pytest.raises(ConfigError, match="block_size is 5, the recipe has 7"):
        train(target, tokenizer, longer, run, tmp_path, folder)
    other = recipe.model_copy(update={"target": replace(recipe.target, path=str(target_folder))})
    plain, words = stages.open_target(other.model_copy(update={}))
    tokens_alone = replace(recipe.train, loss=replace(recipe.train.loss, tv=0.0, confidence=0.0))
    for train_settings, needed in ((recipe.train, False), (tokens_alone, True)):
        wanted = recipe.model_copy(update={"train": train_settings})
        with pytest.raises(ConfigError, match="no last hidden states: train on the answers' tokens alone"):
            feature_stages.server_reader(
                wanted, TargetFiles(str(folder)), "http://localhost:9", False, needed
            )
    with pytest.raises(ConfigError, match="dspark_v4 is for DeepSeek-V4, the target is qwen3"):
        train_stages.drafter_config(other, plain, words)
    templated = load_tokenizer(str(folder))
    templated.chat_template = "{{ messages }}"
    templated.save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text((folder / "config.json").read_text())
    for shard in folder.glob("*.safetensors"):
        (tmp_path / "t" / shard.name).symlink_to(shard)
    with pytest.raises(TargetError, match=r"through deepseek-recipe \(pip install 'draftkit\[deepseek\]'\)"):
        load_tokenizer(str(tmp_path / "t"))


def test_a_python_program_asks_it_as_any_other(folder: Path, run: Path) -> None:
    asked = [{"role": "user", "content": "Add 3 and 4. <think>"}]
    settings = EngineSettings(dtype="float32", plan="fixed")
    llm = LLM(str(folder), str(run / "a" / "best"), settings, template_switches={"thinking": False})
    [answer] = llm.chat(asked, SamplingParams(max_tokens=16, temperature=0))
    target, tokenizer = load_target(str(folder)), load_tokenizer(str(folder))
    prompt = DeepseekFormat(tokenizer, {"thinking": False}).prompt(asked)
    assert answer.prompt_token_ids == prompt
    begun: list[dict[str, Any]] = [{"role": "assistant", "content": "Step 1", "prefix": True}]
    task = [{"role": "user", "content": "Add 3.", "task": "query"}]
    for messages in (task, asked + begun):
        [made] = llm.chat(messages, SamplingParams(max_tokens=1, temperature=0))
        assert made.prompt_token_ids == DeepseekFormat(tokenizer, {"thinking": False}).prompt(messages)
    with pytest.raises(DataError, match="only the last message may have a task"):
        llm.chat(task + asked)
    alone = decode(target, None, prompt, Sampling(0.0), 16)
    assert answer.outputs[0].token_ids == alone.tokens
    assert answer.outputs[0].stats.drafted > 0
    with pytest.raises(ConfigError, match="DeepSeek-V4 has thinking"):
        LLM(str(folder), "none", settings, template_switches={"think": False})


def test_answers_are_generated_to_prompts_of_deepseeks_encoder(folder: Path, tmp_path: Path) -> None:
    """A record's ids are the encoder's prompt, in which the user's text is no special token, and what the
    target writes after it alone."""
    asked = [{"role": "user", "content": "Add 3 and 4. <｜Assistant｜></think>"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", "messages": asked}) + "\n")
    given = ["-r", "tiny-deepseek-v4", "--set", f"target.path={folder}", "--set", "generate.max_new_tokens=8"]
    given += ["--set", "generate.temperature=0", "--set", "target.template_switches={reasoning_effort: low}"]
    out = tmp_path / "answers.jsonl"
    done = CliRunner().invoke(app, ["generate", *given, "-p", str(tmp_path / "p.jsonl"), "-o", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    [record] = records(out).values()
    [answer] = record["answers"]
    shown = DeepseekFormat(load_tokenizer(str(folder)), {"reasoning_effort": "low"})
    assert tuple(answer["prompt_ids"]) == shown.prompt(asked)
    alone = decode(load_target(str(folder)), None, answer["prompt_ids"], Sampling(0.0), 8)
    assert tuple(answer["answer_ids"]) == alone.tokens


@pytest.mark.slow
def test_confidences_are_calibrated_and_evaluated_as_any_others(
    folder: Path, run: Path, recipe: Recipe, tmp_path: Path
) -> None:
    prompts = tmp_path / "p.jsonl"
    asked = [{"id": str(i), "messages": [{"role": "user", "content": f"Add {i}."}]} for i in range(2)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
    given = ["-d", str(run / "a" / "best"), "-p", str(prompts), "-r", "tiny-deepseek-v4"]
    given += ["--set", f"target.path={folder}", "--set", "evaluate.max_new_tokens=8"]
    done = CliRunner().invoke(app, ["calibrate", *given, "-o", str(tmp_path / "c"), "--json"])
    assert done.exit_code == 0, done.output
    file = next((tmp_path / "c").glob("*.json"))
    assert len(json.loads(file.read_text())["temperatures"]) == 5
    done = CliRunner().invoke(app, ["evaluate", *given, "-o", str(tmp_path / "e"), "--json"])
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "e").rglob("*.json"))


@pytest.fixture(scope="module")
def server(folder: Path, run: Path) -> Iterator[Server]:
    options = ("--target", str(folder), "--drafter", str(run / "a" / "best"))
    with serving(*options, command=SERVE) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


@pytest.mark.slow
@needs_browser
def test_the_pages_switch_says_how_to_think(server: Server, tmp_path: Path) -> None:
    """Non-think, High, Max, in a browser: what is sent, and how long the prompt that the model reads is."""
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('thinking-choice')?.hidden === false")
        options = "[...document.getElementById('thinking').options].map((o) => [o.value, o.textContent])"
        assert page.run(options) == [["none", "Non-think"], ["high", "High"], ["max", "Max"]]
        page.run(
            "var sent = [], real = window.fetch; window.fetch = (url, options) => "
            "{ if (options?.body) sent.push(options.body); return real(url, options); }"
        )
        page.set("max-tokens", "6")
        lengths = []
        for number, choice in enumerate(("none", "high", "max"), 1):
            before = server.metric("prompt_tokens_total")
            page.set("thinking", choice)
            page.click("clear")
            page.press_enter("Add 3 and 4.")
            page.wait(f"sent.length === {number}")
            page.wait("document.querySelectorAll('.assistant[data-done]').length === 1")
            assert page.run("JSON.parse(sent.at(-1)).reasoning_effort") == choice
            lengths.append(server.metric("prompt_tokens_total") - before)
        assert lengths[0] < lengths[1] < lengths[2], lengths
        assert not page.console, page.console


def test_the_server_takes_modes_and_gives_reasoning_apart(client: openai.OpenAI, recipe: Recipe) -> None:
    asked: Any = [{"role": "user", "content": "Add 3 and 4. <think>"}]

    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(
            model="", messages=asked, max_tokens=24, temperature=0, **fields
        )

    plain = ask(extra_body={"chat_template_kwargs": {"thinking": False}})
    thinking = ask(reasoning_effort="low")
    assert thinking.usage.prompt_tokens == plain.usage.prompt_tokens  # another token at the same place
    assert ask(reasoning_effort="max").usage.prompt_tokens > plain.usage.prompt_tokens + 50
    message = thinking.choices[0].message
    assert message.reasoning_content and not message.content
    assert plain.choices[0].message.content and not getattr(
        plain.choices[0].message, "reasoning_content", None
    )
    parts = [c.choices[0].delta for c in ask(reasoning_effort="low", stream=True) if c.choices]
    assert "".join(getattr(p, "reasoning_content", None) or "" for p in parts) == message.reasoning_content
    for fields, told in (
        ({"reasoning_effort": "enormous"}, "enormous"),
        ({"extra_body": {"chat_template_kwargs": {"think": True}}}, "DeepSeek-V4 has thinking"),
        ({"extra_body": {"documents": [{"text": "x"}]}}, "has no documents"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            ask(**fields)
    assert client.models.list().data[0].thinking == ["low", "high", "max"]  # type: ignore[attr-defined]
    asked[0] = {"role": "user", "content": "x", "task": "action"}  # after it nothing is thought
    for stream in (False, True):
        made = ask(reasoning_effort="low", stream=stream)
        said = [c.choices[0].delta for c in made if c.choices] if stream else [made.choices[0].message]
        assert "".join(one.content or "" for one in said)
        assert not any(getattr(one, "reasoning_content", None) for one in said)
    asked[0] = {"role": "user", "content": "x", "task": "translate"}
    with pytest.raises(openai.BadRequestError, match="task 'translate' is not known"):
        ask()
    begun: list[dict[str, Any]] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for last, told in (({}, "has no content"), ({"tool_calls": [called]}, "has tool_calls")):
        asked[:] = [begun[0], begun[1] | last]
        with pytest.raises(openai.BadRequestError, match=f"continue_final_message: the last message {told}"):
            ask(extra_body={"continue_final_message": True})
