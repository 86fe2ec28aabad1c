"""A tiny DeepSeek-V4 (`python -m tools.tiny_v4 FOLDER`): are its answers its own with a draft module, and
what is a trained module worth beside an untrained one and an n-gram look-up of the same length?

    python -m benchmarks.deepseek_v4 lossless FOLDER --drafter run/best --prompts 200 --first 0
    python -m benchmarks.deepseek_v4 worth FOLDER --drafter run/best --prompts 24
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from draftkit.decode import Decoded, decode
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import DraftContext, Drafter, Proposal
from draftkit.engine.answers import decode_all, sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.ops.sampling import Sampling
from draftkit.target.formats import format_of
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget, load_target

SWITCHES, PROMPT, LIMIT, NOISE = {"thinking": False}, 40, 64, 2e-3


class NGram(Drafter):
    """Proposes what followed the last two tokens, or the last one, where they stood before in the text."""

    def __init__(self, like: Drafter, prompt: list[int]) -> None:
        super().__init__()
        self.config, self._text = like.config, prompt[:1]

    def new_context(self, batch: int = 1) -> DraftContext:
        """None is needed: the text is kept here."""
        return _NoContext()

    def extend(self, context: DraftContext, features_BTF: Tensor, next_tokens_BT: Tensor) -> None:
        """Keep the tokens."""
        self._text += next_tokens_BT[0].tolist()

    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        """A look-up for each token after the other."""
        text, made = list(self._text), []
        for _ in range(self.gamma):
            made.append(_following(text))
            text.append(made[-1])
        tokens_BG = torch.tensor([made])
        return Proposal(
            tokens_BG, torch.nn.functional.one_hot(tokens_BG, self.config.vocab_size).float(), None
        )


class _NoContext:
    length = 0

    def crop(self, length: int) -> None:
        """Nothing is kept."""


def _following(text: list[int]) -> int:
    for size in (2, 1):
        ending = text[-size:]
        for at in range(len(text) - size - 1, -1, -1):
            if text[at : at + size] == ending:
                return text[at + size]
    return text[-1]


def open_pair(folder: str, drafter: str) -> tuple[TransformersTarget, Drafter, list[list[int]]]:
    """Target, module, and the prompts beside the target."""
    target, tokenizer = load_target(folder), load_tokenizer(folder)
    shown = format_of(tokenizer, SWITCHES)
    rows = [
        json.loads(line) for line in (Path(folder) / "conversations.jsonl").read_text("utf-8").splitlines()
    ]
    prompts = [list(shown.prompt(row["messages"][:-1])) for row in rows]
    return target, open_drafter(Path(drafter), target), prompts


def lossless(folder: str, drafter: str, first: int, count: int) -> dict[str, Any]:
    """Greedy answers of the reference loop and of the engine against those of the target alone; where they
    part, the distance of the two logits."""
    target, opened, prompts = open_pair(folder, drafter)
    texts = [p for p in prompts if len(p) >= PROMPT + 8]
    chosen = [texts[i % len(texts)][i // len(texts) :][:PROMPT] for i in range(first, first + count)]
    greedy, gaps, began = Sampling(0.0), {"loop": [], "engine": []}, time.perf_counter()
    alone = _greedy(target, torch.tensor(chosen))
    engine = Engine(
        target, opened, EngineSettings(plan="fixed", dtype="float32", device="cpu", max_running=8)
    )
    served = decode_all(engine, [(p, sampling_params(greedy, LIMIT, 0)) for p in chosen])
    for prompt, wanted, by_engine in zip(chosen, alone, served, strict=True):
        by_loop = decode(target, opened, prompt, greedy, LIMIT)
        for name, got in (("loop", by_loop.tokens), ("engine", by_engine.tokens)):
            if got != wanted:
                gaps[name].append(_gap(target, prompt, got, wanted))
    tokens = sum(map(len, alone))
    return {
        "prompts": count,
        "tokens": tokens,
        **{f"{name}_parted": len(found) for name, found in gaps.items()},
        "largest_gap": max([0.0, *gaps["loop"], *gaps["engine"]]),
        "allowed_gap": NOISE,
        "seconds": round(time.perf_counter() - began, 1),
    }


@torch.inference_mode()
def _greedy(target: TransformersTarget, prompts_BT: Tensor) -> list[tuple[int, ...]]:
    """The target's own greedy answers to prompts of one length, side by side."""
    cache, made = target.new_cache(), []
    tokens_BT = prompts_BT
    for _ in range(LIMIT):
        read = target.forward(tokens_BT, cache)
        tokens_BT = target.logits(read.last_hidden_BTH[:, -1]).argmax(-1)[:, None]
        made.append(tokens_BT)
    answers = torch.cat(made, 1).tolist()
    stops = set(target.info.stop_token_ids)
    return [tuple(a[: next((i + 1 for i, t in enumerate(a) if t in stops), LIMIT)]) for a in answers]


def _gap(
    target: TransformersTarget, prompt: list[int], got: tuple[int, ...], wanted: tuple[int, ...]
) -> float:
    at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    read = target.forward(torch.tensor([[*prompt, *wanted[:at]]]), None)
    logits = target.logits(read.last_hidden_BTH[0, -1])
    return abs(float(logits[got[at]] - logits[wanted[at]]))


def worth(folder: str, drafter: str, count: int) -> dict[str, Any]:
    """Accepted length (bonus included) of greedy answers: this module, the untrained one in the checkpoint,
    n-grams."""
    target, opened, prompts = open_pair(folder, drafter)
    chosen = prompts[-count:]
    untrained = open_drafter(Path(folder), target)
    arms: dict[str, Any] = {
        "trained": lambda prompt: opened,
        "untrained": lambda prompt: untrained,
        "n-gram": lambda prompt: NGram(opened, prompt),
    }
    found = {}
    for name, arm in arms.items():
        answers = [decode(target, arm(p), p, Sampling(0.0), LIMIT) for p in chosen]
        lengths = [_accepted(a) for a in answers if a.rounds]
        found[name] = round(mean(lengths), 3)
    return {"prompts": count, "gamma": opened.gamma, "accepted_length": found}


def _accepted(answer: Decoded) -> float:
    return mean(r.accepted + 1 for r in answer.rounds)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["lossless", "worth"])
    parser.add_argument("folder")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "lossless":
        print(json.dumps(lossless(given.folder, given.drafter, given.first, given.prompts)))
    else:
        print(json.dumps(worth(given.folder, given.drafter, given.prompts)))


if __name__ == "__main__":
    main()
