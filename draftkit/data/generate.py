"""The target answers prompts, in batches, into a JSONL file that can be continued after any interruption.

Randomness is seeded per prompt, and batches are the same on every run, so an interrupted run that is started again ends
with the very records that an uninterrupted run gives.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from draftkit.data.conversations import Conversation
from draftkit.data.template import render_prompt
from draftkit.errors import DataError
from draftkit.ops.sampling import Sampling, processed_probs, request_generator, sample
from draftkit.output import only_writer, write_text
from draftkit.target.tokenizer import template_hash, tokenizer_hash
from draftkit.target.transformers import TransformersTarget

GROUP_BATCHES = 8  # batches whose answers are written together: enough to keep a batch full, little to lose
TOO_LONG = "too_long"
MADE_WITH = {  # what a manifest says, and what it means when it differs
    "target": "another target",
    "template": "another chat template",
    "tokenizer": "another tokenizer",
    "stop_token_ids": "other stop tokens",
    "settings": "other settings",
}
COMPACT_AT = 0.25  # share of finished rows at which a batch drops them


@dataclass(frozen=True)
class GenerateSettings:
    """How answers are made."""

    sampling: Sampling = Sampling(temperature=1.0)
    max_new_tokens: int = 256
    batch_size: int = 48  # answers that are made at the same time
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """Generated tokens (the stop token included) and "stop" or "length". No tokens: the prompt leaves no room for any."""

    tokens: tuple[int, ...]
    finish_reason: str


NO_ROOM = Answer((), "length")

# From prompts (token ids) and the seed of each to their answers.
Answerer = Callable[[Sequence[Sequence[int]], Sequence[tuple[int, int]], GenerateSettings], list[Answer]]


def generate_file(
    target: TransformersTarget,
    tokenizer: Any,
    prompts: Sequence[Conversation],
    out: Path,
    settings: GenerateSettings,
    answer: Answerer,
    tick: Callable[[int, int], None] = lambda answers, tokens: None,
) -> int:
    """Answer all prompts into `out` by `answer`; returns how many records it holds in the end.

    Records are OpenAI messages with id, domain, finish_reason, seed and token count. The reason "length" marks a truncated
    answer, or a conversation that filled the context before its last turn, "too_long" a prompt that leaves no room for an
    answer; a line on standard error counts these. `tick(answers, tokens)` is called as groups of batches finish. Raises
    DataError when `out` was begun with other settings, holds answers to other prompts of the same ids, or something else,
    when another run is writing it, and when the chat template refuses a prompt.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(out), out.open("a", encoding="utf-8") as file:
        _check_manifest(out, target, tokenizer, settings)
        done = _recover(out)
        other = next((p.id for p in prompts if p.id in done and not done[p.id].answers(p)), None)
        if other is not None:
            raise DataError(f"{out}: holds an answer to another prompt of id {other!r}; choose another file or remove it")
        indexed = [(i, p.prompt(), _first_length(tokenizer, p)) for i, p in enumerate(prompts)]
        indexed.sort(key=lambda item: (item[2], item[0]))
        size = GROUP_BATCHES * settings.batch_size
        for start in range(0, len(indexed), size):
            batch = [(i, p) for i, p, _ in indexed[start : start + size]]
            missing = [p.id for _, p in batch if p.id not in done]
            tokens = 0
            if missing:
                for record in _answer_conversations(answer, tokenizer, batch, settings):
                    if record["id"] in missing:
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
                        tokens += record["completion_tokens"]
                file.flush()
                os.fsync(file.fileno())
            tick(len(batch), tokens)
    too_long = [name for name, answered in _recover(out).items() if answered.reason == TOO_LONG]
    if too_long:
        line = f"{len(too_long)} of {len(indexed)} prompts leave no room for an answer, {too_long[0]!r} first"
        print(f"{out}: {line}; their records say finish_reason {TOO_LONG!r}", file=sys.stderr)
    return len(indexed)


def _first_length(tokenizer: Any, prompt: Conversation) -> int:
    """Tokens of the first turn: the others cannot be rendered before it is answered."""
    return len(render_prompt(tokenizer, prompt.first_turn().as_dicts(), prompt.id))


def _answer_conversations(
    answer_all: Answerer, tokenizer: Any, batch: Sequence[tuple[int, Conversation]], settings: GenerateSettings
) -> Iterable[dict[str, Any]]:
    """Records of a batch; a prompt with several user turns is answered turn by turn."""
    histories: list[list[dict[str, str]]] = [[] for _ in batch]
    waiting = [[{"role": m.role, "content": m.content} for m in p.messages] for _, p in batch]
    reasons = ["stop"] * len(batch)
    counts = [0] * len(batch)
    turn = 0
    while open_rows := [r for r in range(len(batch)) if waiting[r] and reasons[r] == "stop"]:
        for r in open_rows:
            while waiting[r]:
                histories[r].append(waiting[r].pop(0))
                if histories[r][-1]["role"] == "user":
                    break
        prompts = [render_prompt(tokenizer, histories[r], batch[r][1].id) for r in open_rows]
        seeds = [(settings.seed, batch[r][0] * 64 + turn) for r in open_rows]
        for r, answer in zip(open_rows, answer_all(prompts, seeds, settings), strict=True):
            if answer == NO_ROOM:
                reasons[r] = "length" if turn else TOO_LONG
                while turn and histories[r][-1]["role"] != "assistant":  # it ends with its last answer
                    histories[r].pop()
                continue
            content = tokenizer.decode(answer.tokens, skip_special_tokens=True)
            reasons[r] = answer.finish_reason if content else "empty"
            counts[r] += len(answer.tokens)
            if content:
                histories[r].append({"role": "assistant", "content": content})
        turn += 1
    for r, (index, prompt) in enumerate(batch):
        yield {
            "id": prompt.id,
            "domain": prompt.domain,
            "messages": histories[r],
            "finish_reason": reasons[r],
            "seed": [settings.seed, index],
            "completion_tokens": counts[r],
        }


def answer_in_batches(
    target: TransformersTarget,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[tuple[int, int]],
    settings: GenerateSettings,
) -> list[Answer]:
    """Answer prompts (token ids) in order, `batch_size` of them at a time; NO_ROOM where a prompt leaves none."""
    fitting = [i for i, p in enumerate(prompts) if answer_limit(target.info.max_length, len(p), settings)]
    answers = [NO_ROOM] * len(prompts)
    for start in range(0, len(fitting), settings.batch_size):
        part = fitting[start : start + settings.batch_size]
        made = answer_batch(target, [prompts[i] for i in part], [seeds[i] for i in part], settings)
        for i, answer in zip(part, made, strict=True):
            answers[i] = answer
    return answers


@torch.inference_mode()
def answer_batch(
    target: TransformersTarget,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[tuple[int, int]],
    settings: GenerateSettings,
) -> list[Answer]:
    """Answer prompts (token ids) that leave room together, padded on the left; finished rows are dropped as it goes."""
    longest = max(map(len, prompts))
    limits = torch.tensor([answer_limit(target.info.max_length, len(p), settings) for p in prompts])
    limit = int(limits.max())
    pad = target.info.stop_token_ids[0] if target.info.stop_token_ids else 0
    device = target.device
    tokens_BT = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    uniforms = torch.stack([torch.rand(limit, generator=request_generator(*s), dtype=torch.float64) for s in seeds])
    stops = torch.tensor(target.info.stop_token_ids, dtype=torch.int64, device=device)
    rows = torch.arange(len(prompts))  # row of the batch -> prompt
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    cache = target.new_cache()
    for step in range(limit):
        last = target.info.max_length - 1  # rows that filled the context stay for a while; nothing is read behind it
        positions = (mask_BS.cumsum(-1) - 1).clamp(0, last)[:, -tokens_BT.shape[1] :]
        output = target.forward(tokens_BT, cache, (), mask_BS, positions)
        probs = processed_probs(target.logits(output.last_hidden_BTH[:, -1]), settings.sampling)
        drawn_B = sample(probs, uniforms[rows, step])
        for row, prompt, token in zip(range(len(rows)), rows.tolist(), drawn_B.tolist(), strict=True):
            if not finished[row]:
                answers[prompt].append(token)
        finished |= torch.isin(drawn_B, stops) | (limits[rows] == step + 1).to(device)
        if finished.all():
            break
        tokens_BT, mask_BS = drawn_B[:, None], torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], 1)
        if finished.float().mean() >= COMPACT_AT:
            keep = (~finished).nonzero().squeeze(-1)
            cache.select(keep)
            tokens_BT, mask_BS, rows, finished = tokens_BT[keep], mask_BS[keep], rows[keep.cpu()], finished[keep]
    stop_ids = set(target.info.stop_token_ids)
    return [Answer(tuple(a), "stop" if a[-1] in stop_ids else "length") for a in answers]


def answer_limit(max_length: int, prompt_tokens: int, settings: GenerateSettings) -> int:
    """The most tokens that an answer may have where prompt and answer may have `max_length`; 0 when there is no room."""
    return max(0, min(settings.max_new_tokens, max_length - prompt_tokens))


def _check_manifest(out: Path, target: TransformersTarget, tokenizer: Any, settings: GenerateSettings) -> None:
    manifest = out.with_suffix(".manifest.json")
    made_with = {
        "target": target.info.fingerprint,
        "template": template_hash(tokenizer),
        "tokenizer": tokenizer_hash(tokenizer),
        "stop_token_ids": target.info.stop_token_ids,
        "settings": asdict(settings),
    }
    wanted = json.loads(json.dumps(made_with))
    if not out.stat().st_size:
        write_text(manifest, json.dumps(wanted, indent=1) + "\n")
        return
    if not manifest.exists():
        raise DataError(f"{out}: is there, and no {manifest.name} that says what it was made from; choose another file")
    try:
        found = dict(json.loads(manifest.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{manifest}: is damaged ({error}); choose another file or remove both") from error
    for name, value in wanted.items():
        if found.get(name) != value:
            what = MADE_WITH[name] if name in found else "another version of draftkit"
            raise DataError(f"{out}: was begun with {what}; choose another file or remove it")


@dataclass(frozen=True)
class _Answered:
    """What a record answers: the turns of the user's side, the first ones only where the reason is not "stop"."""

    asked: list[dict[str, str]]
    reason: str

    def answers(self, prompt: Conversation) -> bool:
        """Whether it is this very prompt."""
        wanted = prompt.prompt().as_dicts()
        return self.asked == (wanted if self.reason == "stop" else wanted[: len(self.asked)])


def _recover(out: Path) -> dict[str, _Answered]:
    """What is answered already, by id; a last line that was torn by a crash is cut off."""
    raw = out.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        twice = [name for name, count in Counter(r["id"] for r in records).items() if count > 1]
        if twice:
            raise DataError(f"{out}: holds {len(twice)} answers twice, {twice[0]!r} first; remove the file to start anew")
        asked = [[m for m in r["messages"] if m["role"] != "assistant"] for r in records]
        return {r["id"]: _Answered(a, r["finish_reason"]) for r, a in zip(records, asked, strict=True)}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out}: a line is not a record of answers ({error}); remove the file to start anew") from error
