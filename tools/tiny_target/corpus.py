"""The corpus of the embedded target: three domains, split by content into training and held-out
conversations."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from tools.tiny_target.corpus_math import math_problems
from tools.tiny_target.corpus_python import Example, python_examples

DOMAINS = ("code", "chat", "math")
HELD_OUT_PER_DOMAIN = 150
PROMPTS_PER_DOMAIN = 800  # training prompts that travel with the package, for drafters
MATH_EXAMPLES = 40_000
_MATH_SEED, _SPLIT_SEED = 11, 12


@dataclass(frozen=True)
class Corpus:
    """Training examples (all domains mixed) and held-out examples; no prompt and no answer is in both."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def build_corpus() -> Corpus:
    """Make the corpus. It depends on the version of Python only: the split is by a hash of the answer's
    text."""
    problems = math_problems(_MATH_SEED)
    math: dict[str, Example] = {}
    while len(math) < MATH_EXAMPLES:
        question, answer = next(problems)
        math.setdefault(question, Example("math", question, answer))
    examples = [*python_examples(), *math.values()]
    held_out: list[Example] = []
    rng = random.Random(_SPLIT_SEED)
    for domain in DOMAINS:
        candidates = [e for e in examples if e.domain == domain and _bucket(e) == 0]
        held_out += rng.sample(candidates, HELD_OUT_PER_DOMAIN)
    prompts, answers = {e.prompt for e in held_out}, {e.answer for e in held_out}
    train = [e for e in examples if e.prompt not in prompts and e.answer not in answers]
    rng.shuffle(train)
    return Corpus(tuple(train), tuple(held_out))


def _bucket(example: Example) -> int:
    return int.from_bytes(hashlib.sha256(example.answer.encode()).digest()[:4], "big") % 25


def write_prompts(corpus: Corpus, folder: Path) -> None:
    """Write `heldout.jsonl` (with reference answers) and `prompts.jsonl` (training prompts) as OpenAI
    messages."""
    rng = random.Random(_SPLIT_SEED)
    chosen = []
    for domain in DOMAINS:
        chosen += rng.sample([e for e in corpus.train if e.domain == domain], PROMPTS_PER_DOMAIN)
    rng.shuffle(chosen)
    _write(folder / "prompts.jsonl", chosen, with_answers=False)
    _write(folder / "heldout.jsonl", list(corpus.held_out), with_answers=True)


def _write(path: Path, examples: list[Example], with_answers: bool) -> None:
    counts = dict.fromkeys(DOMAINS, 0)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            row: dict[str, object] = {
                "id": f"{example.domain}-{counts[example.domain]:04d}",
                "domain": example.domain,
                "messages": [{"role": "user", "content": example.prompt}],
            }
            if with_answers:
                row["reference"] = example.answer
            counts[example.domain] += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
