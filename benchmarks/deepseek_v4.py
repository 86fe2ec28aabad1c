"""A tiny DeepSeek-V4: are its answers its own with a draft module, and what is a trained module worth beside
an untrained one and an n-gram look-up of the same length?

    python -m tools.tiny_v4 tiny-v4                      # two minutes; docs/deepseek-v4.md goes on from there
    python -m benchmarks.deepseek_v4 lossless tiny-v4 --drafter run/best
    python -m benchmarks.deepseek_v4 worth tiny-v4 --drafter run/best
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, quantiles
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
from draftkit.progress import progress_bar
from draftkit.target.formats import format_of
from draftkit.target.loading import load_target
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget

PROMPT, LIMIT = 24, 64  # tokens of a prompt, at most, and of its answer
NOISE = 2e-3  # of a logit: what float32 makes of passes of other shapes
GREEDY = Sampling(0.0)
ARMS = ("trained, loop", "trained, engine", "random, loop", "random, engine")  # the module, and who answers


class NGram(Drafter):
    """Proposes what followed the last three tokens where they stood before in the text, or the last two, or
    the last one."""

    def __init__(self, like: Drafter, prompt: Sequence[int]) -> None:
        super().__init__()
        self.config, self._text = like.config, list(prompt[:1])

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
        probs_BGV = torch.nn.functional.one_hot(tokens_BG, self.config.vocab_size).float()
        return Proposal(tokens_BG, probs_BGV, None)


class _NoContext:
    length = 0

    def crop(self, length: int) -> None:
        """Nothing is kept."""


def _following(text: list[int]) -> int:
    for size in (3, 2, 1):
        ending = text[-size:]
        for at in range(len(text) - size - 1, -1, -1):
            if text[at : at + size] == ending:
                return text[at + size]
    return text[-1]


def read_prompts(folder: Path, name: str) -> list[list[int]]:
    """The questions of a file beside the target."""
    shown = format_of(load_tokenizer(str(folder)), {"thinking": False})
    rows = map(json.loads, (folder / name).read_text("utf-8").splitlines())
    return [list(shown.prompt(row["messages"][:-1])) for row in rows]


def lossless(folder: Path, drafter: Path, count: int, chosen_arms: Sequence[str] = ARMS) -> dict[str, Any]:
    """Greedy answers of the reference loop and of the engine, with the trained module and the random one in
    the checkpoint, against those of the target alone; where they part, the distance of the two logits."""
    target = load_target(str(folder))
    texts = read_prompts(folder, "conversations.jsonl")
    parts = [p[at : at + PROMPT] for p in texts for at in range(len(p) - PROMPT + 1)]  # of one length
    chosen = parts[:: max(1, len(parts) // count)][:count]
    alone = greedy(target, torch.tensor(chosen))
    arms, began = {}, time.perf_counter()
    for name in chosen_arms:
        module = open_drafter(drafter if name.startswith("trained") else folder, target)
        answer = by_loop if name.endswith("loop") else by_engine
        with progress_bar(f"module: {name}", len(chosen)) as bar:
            answers = answer(target, module, chosen, lambda bar=bar: bar.update(1))
        rows = zip(chosen, answers, alone, strict=True)
        gaps = [gap(target, p, got.tokens, wanted) for p, got, wanted in rows if got.tokens != wanted]
        arms[name] = {
            "parted": len(gaps),
            "largest_gap": max(gaps, default=0.0),
            "accepted_length": round(mean(map(accepted_length, answers)), 3),
        }
        print(f"{name}: {arms[name]}", file=sys.stderr, flush=True)
    return {
        "prompts": len(chosen),
        "tokens": sum(map(len, alone)),
        "arms": arms,
        "allowed_gap": NOISE,
        "lossless": all(arm["largest_gap"] <= NOISE for arm in arms.values()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def by_loop(
    target: TransformersTarget, module: Drafter, prompts: Sequence[list[int]], tick: Callable[[], None]
) -> list[Decoded]:
    """Greedy answers of the reference loop, one after the other."""
    found = []
    for prompt in prompts:
        found.append(decode(target, module, prompt, GREEDY, LIMIT))
        tick()
    return found


def by_engine(
    target: TransformersTarget, module: Drafter, prompts: Sequence[list[int]], tick: Callable[[], None]
) -> list[Decoded]:
    """Greedy answers of the engine, eight requests at a time, every proposal verified in full."""
    settings = EngineSettings(plan="fixed", dtype="float32", device="cpu", max_running=8, prefix_reuse=False)
    asked = [(prompt, sampling_params(GREEDY, LIMIT, 0)) for prompt in prompts]
    return decode_all(Engine(target, module, settings), asked, tick)


@torch.inference_mode()
def greedy(target: TransformersTarget, prompts_BT: Tensor) -> list[tuple[int, ...]]:
    """The target's own greedy answers to prompts of one length, side by side."""
    cache, made, tokens_BT = target.new_cache(), [], prompts_BT
    with progress_bar("target alone", LIMIT) as bar:
        for _ in range(LIMIT):
            read = target.forward(tokens_BT, cache)
            tokens_BT = target.logits(read.last_hidden_BTH[:, -1]).argmax(-1)[:, None]
            made.append(tokens_BT)
            bar.update(1)
    answers, stops = torch.cat(made, 1).tolist(), set(target.info.stop_token_ids)
    return [tuple(a[: next((i + 1 for i, t in enumerate(a) if t in stops), LIMIT)]) for a in answers]


def gap(
    target: TransformersTarget, prompt: Sequence[int], got: Sequence[int], wanted: Sequence[int]
) -> float:
    """How far apart the target finds the two tokens at which two answers part."""
    at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
    read = target.forward(torch.tensor([[*prompt, *wanted[:at]]]), None)
    logits = target.logits(read.last_hidden_BTH[0, -1])
    return abs(float(logits[got[at]] - logits[wanted[at]]))


def worth(folder: Path, drafter: Path, count: int) -> dict[str, Any]:
    """Accepted length of greedy answers to questions that neither model has seen: this module, the untrained
    one in the checkpoint, n-grams; and what this one wins, prompt by prompt."""
    target = load_target(str(folder))
    chosen = read_prompts(folder, "heldout.jsonl")[:count]
    trained, untrained = open_drafter(drafter, target), open_drafter(folder, target)
    found: dict[str, list[float]] = {"trained": [], "untrained": [], "n-gram": []}
    with progress_bar("prompts", len(chosen)) as bar:
        for prompt in chosen:
            for name, module in zip(found, (trained, untrained, NGram(trained, prompt)), strict=True):
                found[name].append(accepted_length(decode(target, module, prompt, GREEDY, LIMIT)))
            bar.update(1)
    return {
        "prompts": len(chosen),
        "gamma": trained.gamma,
        "accepted_length": {name: spread(values) for name, values in found.items()},
        "trained_over": {
            name: spread([a / b for a, b in zip(found["trained"], found[name], strict=True)])
            for name in ("untrained", "n-gram")
        },
    }


def accepted_length(answer: Decoded) -> float:
    """Tokens of a round, bonus included; 1 for an answer without a round."""
    return mean([r.accepted + 1 for r in answer.rounds] or [1])


def spread(values: list[float]) -> dict[str, float]:
    """Mean, and the quarters between which half of the values lie."""
    low, median, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    named = {"mean": mean(values), "low": low, "median": median, "high": high}
    return {name: round(value, 3) for name, value in named.items()}


def main() -> None:
    """Print one JSON object; exit code 1 when an answer is not the target's own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["lossless", "worth"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=int, help="lossless: 200, worth: 24")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="of lossless; all of them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "lossless":
        told = lossless(given.folder, given.drafter, given.prompts or 200, given.arms)
    else:
        told = worth(given.folder, given.drafter, given.prompts or 24)
    print(json.dumps(told, indent=1))
    if not told.get("lossless", True):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
