"""The token that stands for what a block drafter drafts: which one is chosen, and who needs one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftkit import feature_stages, stages, train_stages
from draftkit.config import Recipe, load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.data.mask_token import choose_mask_token
from draftkit.draft.checkpoint import load_drafter, save_drafter
from draftkit.errors import ConfigError
from draftkit.features.store import FeatureStore
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from support.targets import make_target_folder

VOCAB = 40


class Tokenizer:
    """A tokenizer with special tokens of these names at the end of a vocabulary of 40, and no mask token."""

    mask_token_id: int | None = None
    chat_template = "<|user|>{{ messages }}<|end|>"

    def __init__(self, *special: str, size: int = VOCAB, named: tuple[int, ...] = ()) -> None:
        self.all_special_ids = list(named)
        first = size - len(special)
        self.added_tokens_decoder = {first + i: AddedToken(name) for i, name in enumerate(special)}
        self._size = size

    def __len__(self) -> int:
        return self._size


class AddedToken(str):
    special = True


def counts(*used: int) -> Tensor:
    found_V = torch.zeros(VOCAB, dtype=torch.int64)
    found_V[list(used)] = 3
    return found_V


def never() -> Tensor:
    raise AssertionError("the data need not be read")


def test_the_tokenizers_own_mask_or_an_unused_row_comes_first() -> None:
    own = Tokenizer("<|pad|>")
    own.mask_token_id = 7
    assert choose_mask_token(own, VOCAB, None, never) == 7
    assert choose_mask_token(Tokenizer("<|pad|>", size=VOCAB - 2), VOCAB, None, never) == VOCAB - 2


@pytest.mark.parametrize(
    ("special", "used", "named", "chosen"),
    [
        (("<|user|>", "<|tool|>", "<|reserved_1|>", "<|file|>"), (), (), 38),  # reserved before the highest
        # the data uses the reserved one
        (("<|user|>", "<|tool|>", "<|reserved_1|>", "<|file|>"), (38,), (), 39),
        (("<|user|>", "<|tool|>", "<|reserved_1|>", "<|file|>"), (38, 39), (), 37),
        # the last one is the tokenizer's end of text, say
        (("<|user|>", "<|tool|>", "<|file|>"), (), (39,), 38),
    ],
)
def test_else_a_special_token_that_neither_template_nor_data_uses(
    special: tuple[str, ...], used: tuple[int, ...], named: tuple[int, ...], chosen: int
) -> None:
    assert choose_mask_token(Tokenizer(*special, named=named), VOCAB, None, lambda: counts(*used)) == chosen


def test_when_every_token_is_used_it_says_what_to_do() -> None:
    with pytest.raises(
        ConfigError, match=r"no mask token, .* no unused row.* give a token that no text holds, from 0 to 39"
    ):
        choose_mask_token(Tokenizer("<|user|>", "<|file|>"), VOCAB, None, lambda: counts(39))


def test_one_that_is_asked_for_must_be_in_the_vocabulary_and_not_in_the_data() -> None:
    assert choose_mask_token(Tokenizer(), VOCAB, 12, lambda: counts(11)) == 12
    with pytest.raises(ConfigError, match=r"mask_token_id: 40 must lie between 0 and the target's 39$"):
        choose_mask_token(Tokenizer(), VOCAB, 40, never)
    with pytest.raises(
        ConfigError, match=r"mask_token_id: 11 stands 3 times in the training data; give a token"
    ):
        choose_mask_token(Tokenizer(), VOCAB, 11, lambda: counts(11))


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> tuple[TransformersTarget, Any]:
    """As SmolLM2: as many tokens as the embedding has rows, no mask token, a special one that nothing
    uses."""
    folder = make_target_folder(tmp_path_factory.mktemp("no-mask"))
    raw = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    raw.pop("mask_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(raw), "utf-8")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.mask_token = None
    from draftkit.target.loading import load_target

    target = load_target(str(folder))
    assert len(tokenizer) == target.info.vocab_size
    return target, tokenizer


def recipe(*changes: str) -> Recipe:
    return load_recipe("tiny-dspark", ["drafter.num_features=2", "drafter.markov_rank=4", *changes])


def test_only_training_needs_one_and_it_stays_in_the_checkpoint(
    llama_like: tuple[TransformersTarget, Any], tmp_path: Path
) -> None:
    target, tokenizer = llama_like
    talk = Conversation("a", "code", (Message("user", "one plus one"), Message("assistant", "two")))
    everything = recipe("generate.max_new_tokens=4")
    assert (
        stages.run_generate(
            target, tokenizer, everything, lambda first: [talk.prompt()][first:], tmp_path / "a.jsonl"
        ).records
        == 1
    )
    assert (
        feature_stages.run_capture(target, tokenizer, everything, [talk], tmp_path / "features").samples == 1
    )
    drafter = train_stages.new_drafter_for(everything, target, tokenizer, FeatureStore(tmp_path / "features"))
    chosen = drafter.config.mask_token_id  # type: ignore[attr-defined]
    assert str(tokenizer.added_tokens_decoder[chosen]) not in tokenizer.chat_template
    save_drafter(drafter, tmp_path / "drafter", {}, torch.float32)
    assert load_drafter(tmp_path / "drafter").config.mask_token_id == chosen  # type: ignore[attr-defined]


def test_eagle3_needs_none(llama_like: tuple[TransformersTarget, Any]) -> None:
    target, tokenizer = llama_like
    bare = copy.deepcopy(tokenizer)
    eagle = recipe("drafter.algorithm=eagle3", "drafter.num_layers=1")
    train_stages.drafter_config(eagle, target, bare)
