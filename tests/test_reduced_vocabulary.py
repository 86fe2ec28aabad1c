"""Block drafters that draft from the most frequent tokens alone: trained against the target's whole
distribution, and exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftkit import feature_stages, stages, train_stages
from draftkit.config import load_recipe
from draftkit.data.conversations import Conversation, Message, read_conversations
from draftkit.decode import decode
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import new_drafter, open_drafter, save_drafter
from draftkit.draft.drafter import DraftContext, Drafter, TrainBatch
from draftkit.engine.engine import Engine
from draftkit.engine.request import SamplingParams
from draftkit.errors import ConfigError
from draftkit.features.draft_vocabulary import count_answer_tokens
from draftkit.features.store import FeatureStore
from draftkit.ops.sampling import Sampling
from draftkit.settings import LossSettings
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter
from support.engine import PROMPTS, finish, small, tokens_of


def reduced(target: TransformersTarget, ids: range, head: str = "markov") -> Drafter:
    """A drafter like `make_drafter`'s whose head has these tokens alone."""
    config = replace(make_drafter(target, head).config, draft_vocab_size=len(ids))
    torch.manual_seed(1)
    drafter = new_drafter(config, target.embedding_weight(), target.head_weight(), torch.tensor(ids))
    if isinstance(drafter, BlockDrafter) and drafter.markov_head is not None:
        torch.nn.init.normal_(drafter.markov_head.markov_w2.weight)
    return drafter.double().eval()


@pytest.mark.parametrize("head", ["markov", "rnn"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_the_reference_loop(
    target: TransformersTarget, temperature: float, head: str
) -> None:
    drafter = reduced(target, range(0, target.info.vocab_size, 2), head)
    engine = Engine(target, drafter, small())
    for name, prompt in enumerate(PROMPTS[:3]):
        params = SamplingParams(
            max_tokens=20, temperature=temperature, seed=name, ignore_eos=temperature == 0
        )
        engine.add_request(str(name), prompt, params)
    outputs = finish(engine)
    for name, prompt in enumerate(PROMPTS[:3]):
        wanted = decode(target, drafter, prompt, Sampling(temperature), 20, seed=name)
        assert tokens_of(outputs[str(name)])[: len(wanted.tokens)] == list(wanted.tokens)
        plain = decode(target, None, prompt, Sampling(temperature), 20, seed=name)
        assert temperature > 0 or wanted.tokens == plain.tokens


@pytest.mark.parametrize("rows", [False, True])
def test_a_borrowed_head_is_taken_from_the_target_again(
    target: TransformersTarget, tmp_path: Path, rows: bool
) -> None:
    drafter = reduced(target, range(0, target.info.vocab_size, 2))
    save_drafter(drafter, tmp_path, {}, torch.float64, lender=target, lend_rows=rows)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not rows
    loaded = open_drafter(tmp_path, target, torch.float64)
    for name, weight in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_a_bias_on_tokens_that_cannot_be_drafted_is_kept(target: TransformersTarget) -> None:
    """The request's own settings see the whole vocabulary, the drafter's head only a part of it."""
    answers = []
    for drafter in (None, reduced(target, range(0, target.info.vocab_size, 2))):
        engine = Engine(target, drafter, small())
        params = SamplingParams(
            max_tokens=12, temperature=0, logit_bias={9: 30.0, 12: 30.0}, frequency_penalty=1.5
        )
        engine.add_request("a", PROMPTS[0], params)
        answers.append(tokens_of(finish(engine)["a"]))
    assert answers[0] == answers[1] and {9, 12} <= set(answers[0])


def test_the_recipe_trains_one_and_it_comes_back(target_folder: Path, tmp_path: Path) -> None:
    """From prompts to a drafter on disk: the vocabulary is the answers' most frequent tokens."""
    sizes = [
        "drafter.num_features=2",
        "drafter.draft_vocab_size=60",
        "generate.max_new_tokens=24",
        "train.steps=3",
    ]
    recipe = load_recipe("tiny-dspark", [f"target.path={target_folder}", *sizes, "train.batch_size=4"])
    target, tokenizer = stages.open_target(recipe)
    prompts = [Conversation(f"p{i}", "chat", (Message("user", f"What is a list? {i}"),)) for i in range(8)]
    stages.run_generate(target, tokenizer, recipe, lambda first: prompts[first:], tmp_path / "answers.jsonl")
    answers = read_conversations([tmp_path / "answers.jsonl"])
    feature_stages.run_capture(target, tokenizer, recipe, answers, tmp_path / "features")
    source = feature_stages.open_features(recipe, target, tokenizer, [tmp_path / "features"])
    report = train_stages.run_train(target, tokenizer, recipe, source, tmp_path / "drafter")
    assert report.steps == 3 and report.accepted_len["macro"] > 1
    drafter = open_drafter(tmp_path / "drafter" / "best", target)
    assert drafter.draft_ids_W is not None
    counts = count_answer_tokens(FeatureStore(tmp_path / "features"), target.info.vocab_size)
    assert int(counts[drafter.draft_ids_W].sum()) == int(counts.topk(60).values.sum())
    plain = decode(target, None, [4, 20, 31, 7], Sampling(0.0), 16)
    assert decode(target, drafter, [4, 20, 31, 7], Sampling(0.0), 16).tokens == plain.tokens


@pytest.mark.parametrize("head", ["none", "markov", "gated"])
def test_its_loss_counts_the_targets_mass_outside(target: TransformersTarget, head: str) -> None:
    """Acceptance is sum min(p, q) over the whole vocabulary: that of a whole head with -infinity outside."""
    drafter, batch = reduced(target, range(0, target.info.vocab_size, 2), head).train(), some_batch(target)
    report = drafter.loss(batch, LossSettings(ce=0.0, tv=1.0, confidence=0.0))
    report.loss_sum.backward()
    assert float(drafter.fc.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    head_VH = target.head_weight().double()
    places = [(int(batch.anchors_BA[0, 0]) + 1 + k) for k in range(4)]
    p_GV = torch.softmax(batch.last_hidden_BTH[0, [i - 1 for i in places]] @ head_VH.T, -1)
    odd = p_GV[:, 1::2].sum(-1)
    assert (report.accept_N[:4] <= 1 - odd + 1e-9).all()
    whole = drafter.eval().propose(
        context_of(drafter, batch), batch.tokens_BT[:1, 6], Sampling(1.0), torch.zeros(1, 4)
    )
    first = torch.minimum(whole.probs_BGV[0, 0], p_GV[0]).sum()
    assert float(report.accept_N[0]) == pytest.approx(float(first), abs=1e-6)
    drafter.choose_vocabulary(drafter.draft_ids_W, None)
    with pytest.raises(ConfigError, match="together with its target"):
        drafter.train().loss(batch, LossSettings())


def some_batch(target: TransformersTarget) -> TrainBatch:
    """One document of 24 random tokens, with one anchor at place 6."""
    torch.manual_seed(4)
    tokens, hidden = torch.randint(target.info.vocab_size, (1, 24)), target.info.hidden_size
    ones, zeros = torch.ones(1, 24, dtype=torch.bool), torch.zeros(1, 24, dtype=torch.int64)
    anchors = torch.tensor([[6]])
    features, last = torch.randn(1, 24, 2 * hidden).double(), torch.randn(1, 24, hidden).double()
    one = torch.ones(1, 1, dtype=torch.bool)
    return TrainBatch(
        tokens, ones, features, last, zeros, torch.arange(24)[None], anchors, one, zeros[:, :1], ("x",)
    )


def context_of(drafter: Drafter, batch: TrainBatch) -> DraftContext:
    """What the drafter knows before the batch's anchor."""
    context = drafter.new_context()
    drafter.extend(context, batch.features_BTF[:, :6], batch.tokens_BT[:, 1:7])
    return context
