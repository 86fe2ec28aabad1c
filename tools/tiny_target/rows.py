"""Training rows of the embedded target: rendered conversations packed into rows of a fixed length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tools.tiny_target.corpus import DOMAINS
from tools.tiny_target.corpus_python import Example

ROW_LENGTH = 512
MIXTURE = {"code": 0.46, "chat": 0.30, "math": 0.24}  # share of the conversations' tokens
SECOND_TURN = 0.15  # share of conversations with a second question of the same domain
PROMPT_WEIGHT = 0.1  # of a token that the assistant does not write, in the loss


@dataclass(frozen=True)
class Turn:
    """Token ids of one rendered question and answer, and the loss weight of each token."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[Turn]:
    """Render each example with the chat markup and tokenise question and answer apart: their border is a
    special token."""
    questions = tokenizer(
        [f"<|im_start|>user\n{e.prompt}<|im_end|>\n<|im_start|>assistant\n" for e in examples]
    )
    answers = tokenizer([f"{e.answer}<|im_end|>" for e in examples])
    newline = tokenizer("\n")["input_ids"]
    turns = []
    for question, answer in zip(questions["input_ids"], answers["input_ids"], strict=True):
        weights = [PROMPT_WEIGHT] * len(question) + [1.0] * len(answer) + [PROMPT_WEIGHT] * len(newline)
        turns.append(Turn((*question, *answer, *newline), tuple(weights)))
    return turns


class RowSampler:
    """Draws batches of packed rows; batch `step` is a function of the seed and `step` alone, so training can
    resume."""

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.turns = {d: encode([e for e in examples if e.domain == d], tokenizer) for d in DOMAINS}
        mean = {d: sum(len(t.ids) for t in turns) / len(turns) for d, turns in self.turns.items()}
        self.domain_weights = [MIXTURE[d] / mean[d] for d in DOMAINS]
        self.seed = seed

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """(ids int64, weights float32), both [rows, ROW_LENGTH + 1]; every row begins with a conversation."""
        rng = random.Random(self.seed * 1_000_003 + step)
        ids, weights = [], []
        for _ in range(rows):
            row_ids: list[int] = []
            row_weights: list[float] = []
            while len(row_ids) <= ROW_LENGTH:
                (domain,) = rng.choices(DOMAINS, self.domain_weights)
                for _ in range(2 if rng.random() < SECOND_TURN else 1):
                    turn = rng.choice(self.turns[domain])
                    row_ids += turn.ids
                    row_weights += turn.weights
            ids.append(row_ids[: ROW_LENGTH + 1])
            weights.append(row_weights[: ROW_LENGTH + 1])
        return torch.tensor(ids), torch.tensor(weights)
