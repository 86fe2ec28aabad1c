"""The embedded target: its corpus, its training, and the asset that the package carries."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from draftkit.decode import decode
from draftkit.draft.checkpoint import open_drafter
from draftkit.errors import CheckpointError, ConfigError
from draftkit.ops.sampling import Sampling
from draftkit.target.loading import load_target
from draftkit.target.template_format import TemplateFormat
from tools.tiny_target.corpus import DOMAINS, Corpus, build_corpus
from tools.tiny_target.publish import publish
from tools.tiny_target.rows import ROW_LENGTH, RowSampler
from tools.tiny_target.train import TinySettings, _save_state, train_tiny_target

ASSET = Path(__file__).parents[1] / "draftkit" / "assets" / "tiny"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus()


@pytest.fixture(scope="module")
def few(corpus: Corpus) -> Corpus:
    """A fiftieth, for trainings of a few steps."""
    return replace(corpus, train=corpus.train[::50], held_out=corpus.held_out[::50])


def rows_of(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (ASSET / name).read_text("utf-8").splitlines()]


def prompt_of(row: dict[str, object]) -> str:
    return row["messages"][0]["content"]  # type: ignore[index]


@pytest.mark.slow
def test_the_corpus_is_the_same_every_time_and_its_halves_share_nothing(corpus: Corpus) -> None:
    assert build_corpus() == corpus
    for field in ("prompt", "answer"):
        assert not {getattr(e, field) for e in corpus.train} & {getattr(e, field) for e in corpus.held_out}
    assert all(sum(e.domain == d for e in corpus.held_out) >= 120 for d in DOMAINS)


def test_held_out_prompts_of_the_asset_are_never_trained_on(corpus: Corpus) -> None:
    """Whatever Python runs this: neither the training text nor the drafters' prompts hold a held-out prompt
    or answer.

    The asset was made with one version of Python; another version's library differs, so only the asset's own
    training prompts and, where the held-out set is the same, the training corpus are compared.
    """
    held_out = rows_of("heldout.jsonl")
    prompts = {prompt_of(r) for r in held_out}
    assert all(sum(r["domain"] == d for r in held_out) >= 120 for d in DOMAINS)
    assert not prompts & {prompt_of(r) for r in rows_of("prompts.jsonl")}
    if prompts == {e.prompt for e in corpus.held_out}:
        assert not prompts & {e.prompt for e in corpus.train}
        assert not {r["reference"] for r in held_out} & {e.answer for e in corpus.train}


def test_the_asset_loads_with_plain_transformers_and_is_what_its_card_says() -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSET)
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    weights = (ASSET / "model.safetensors").read_bytes()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.num_hidden_layers >= 12
    assert len(weights) <= 14 * 2**20
    assert sum(p.stat().st_size for p in ASSET.rglob("*") if p.is_file()) <= 16 * 2**20
    assert hashlib.sha256(weights).hexdigest() in (ASSET / "README.md").read_text()
    assert tokenizer.mask_token_id is not None and len(tokenizer) == model.config.vocab_size
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Solve for x: 3x + 4 = 19."}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    answer = model.generate(**text, max_new_tokens=80, do_sample=False)[0, text["input_ids"].shape[1] :]
    assert "The answer is" in tokenizer.decode(answer), "the embedded target has not learnt to answer"


def test_rows_begin_with_a_conversation_and_depend_on_the_step_alone(corpus: Corpus) -> None:
    sampler = RowSampler(corpus.train[:2000], AutoTokenizer.from_pretrained(ASSET), seed=3)
    ids, weights = sampler.batch(5, 4)
    again, _ = sampler.batch(5, 4)
    other, _ = sampler.batch(6, 4)
    assert ids.shape == weights.shape == (4, ROW_LENGTH + 1)
    assert torch.equal(ids, again) and not torch.equal(ids, other)
    assert (ids[:, 0] == ids[0, 0]).all()


def test_a_device_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--device tpu cannot be used .* give cpu"):
        train_tiny_target(tmp_path, TinySettings(steps=1), "tpu")
    assert not list(tmp_path.iterdir())


def test_a_state_of_other_settings_is_refused_at_once(
    tmp_path: Path, few: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.tiny_target.train.build_corpus", lambda: few)
    begun = TinySettings(steps=4, rows=2)
    _save_state(tmp_path / "state", torch.nn.Linear(1, 1), [], begun, 1, 0.0)
    with pytest.raises(
        CheckpointError, match=r"state: was begun with steps 4 \(given 5\), seed 7 \(given 8\); give the same"
    ):
        train_tiny_target(tmp_path, replace(begun, steps=5, seed=8))
    with pytest.raises(CheckpointError, match="weights do not fit this model"):
        # decides no step: it goes on to the weights
        train_tiny_target(tmp_path, replace(begun, save_every=1))


@pytest.mark.slow
def test_training_goes_on_exactly_where_it_stopped(
    tmp_path: Path, corpus: Corpus, few: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps in one go, and two runs of which the first is taken away after one step: the same losses,
    the last of which tells the optimizers' moments. A fiftieth of the corpus will do."""
    monkeypatch.setattr("tools.tiny_target.train.build_corpus", lambda: few)
    settings = TinySettings(steps=3, rows=1, save_every=1, warmup=1)
    train_tiny_target(tmp_path / "whole", settings)
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]

    class Stopped(Exception):
        pass

    def stop(step: int) -> None:
        if step == 1:
            raise Stopped

    with pytest.raises(Stopped):
        train_tiny_target(tmp_path / "parts", settings, before_step=stop)
    with pytest.raises(CheckpointError, match="not finished"):
        publish(tmp_path / "parts", corpus, tmp_path / "asset")
    train_tiny_target(tmp_path / "parts", settings)
    parts = [json.loads(line)["loss"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert parts == losses


@pytest.mark.slow
def test_the_drafter_beside_the_target_fits_it_and_its_guesses_are_taken() -> None:
    """Three prompts, greedy: the same tokens as plain decoding, and more than one of them per round."""
    target, tokenizer = load_target("tiny"), AutoTokenizer.from_pretrained(ASSET)
    drafter = open_drafter(ASSET / "drafter", target)
    rounds = tokens = 0
    for row in rows_of("heldout.jsonl")[::150]:  # one of each domain
        prompt = TemplateFormat(tokenizer).prompt(row["messages"])  # type: ignore[arg-type]
        drafted = decode(target, drafter, prompt, Sampling(0.0), 48)
        assert drafted.tokens == decode(target, None, prompt, Sampling(0.0), 48).tokens
        rounds, tokens = rounds + len(drafted.rounds), tokens + sum(r.emitted for r in drafted.rounds)
    assert tokens / rounds > 1.5
