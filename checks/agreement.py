"""Greedy answers with a drafter against the target's own `generate`: mismatches, each explained by its
top-two gap.

    python -m checks.agreement runs/quickstart/drafter/best --prompts 300 --dtype float64
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.progress import track

from draftkit.data.conversations import read_conversations
from draftkit.decode import decode
from draftkit.draft.checkpoint import load_drafter
from draftkit.ops.sampling import Sampling
from draftkit.stages import TINY_HELD_OUT
from draftkit.target.loading import load_target
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import DTYPES, TransformersTarget

NOISE = {"float32": 1e-3, "float64": 0.0, "bfloat16": 0.25}  # a top-two gap below this can be rounding


def top_two_gap(target: TransformersTarget, tokens: list[int]) -> float:
    """Difference of the two largest logits after `tokens`."""
    logits = target.logits(target.forward(torch.tensor([tokens]), None).last_hidden_BTH[0, -1])
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


def main() -> None:
    """Compare and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    options = parser.parse_args()
    target, tokenizer = load_target(options.target, dtype=options.dtype), load_tokenizer(options.target)
    drafter = load_drafter(options.drafter, DTYPES[options.dtype], target)
    conversations = read_conversations([TINY_HELD_OUT])
    count = min(options.prompts, len(conversations))
    chosen = [conversations[i * len(conversations) // count] for i in range(count)]  # evenly over the domains
    gaps, tokens = [], 0
    for conversation in track(chosen, "comparing"):
        prompt = list(TemplateFormat(tokenizer).prompt(conversation.as_dicts()))
        own = target.model.generate(
            torch.tensor([prompt]), max_new_tokens=options.new_tokens, do_sample=False
        )
        own = own[0, len(prompt) :].tolist()
        ours = list(decode(target, drafter, prompt, Sampling(0.0), options.new_tokens).tokens)
        tokens += len(own)
        if ours != own:
            first = next(i for i, (a, b) in enumerate(zip([*ours, -1], [*own, -2], strict=False)) if a != b)
            gaps.append(top_two_gap(target, prompt + own[:first]))
    print(
        json.dumps(
            {
                "dtype": options.dtype,
                "prompts": len(chosen),
                "tokens": tokens,
                "mismatching_answers": len(gaps),
                "top_two_gaps": gaps,
                "unexplained": sum(g > NOISE[options.dtype] for g in gaps),
            }
        )
    )


if __name__ == "__main__":
    main()
