"""Answers in padded batches through the Transformers module, for families that the engine's lean forward does
not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from draftkit.data.answers import NO_ROOM, Answer, Answers, Question, answer_limit, sampling_of
from draftkit.ops.sampling import processed_probs, request_generator, sample
from draftkit.settings import GenerateSettings
from draftkit.target.transformers import TransformersTarget

COMPACT_AT = 0.25  # share of finished rows at which a batch drops them


class PaddedAnswers(Answers):
    """Answers `size` questions at a time; the next ones begin when all of these are finished."""

    def __init__(self, target: TransformersTarget, size: int) -> None:
        self._target, self._size = target, size
        self._waiting: list[tuple[Question, GenerateSettings]] = []

    @property
    def room(self) -> int:
        """How many questions more the next batch takes."""
        return self._size - len(self._waiting)

    def ask(self, question: Question, settings: GenerateSettings) -> None:
        """Take a question into the next batch."""
        self._waiting.append((question, settings))

    def finished(self) -> list[tuple[str, Answer]]:
        """Answer all that was asked."""
        waiting, self._waiting = self._waiting, []
        fitting = [
            (q, s) for q, s in waiting if answer_limit(self._target.info.max_length, len(q.prompt_ids), s)
        ]
        found = {q.key: NO_ROOM for q, _ in waiting}
        if fitting:
            questions = [q for q, _ in fitting]
            prompts, seeds = [q.prompt_ids for q in questions], [q.seed for q in questions]
            made = answer_batch(self._target, prompts, seeds, fitting[0][1], self.on_tokens)
            found |= {q.key: answer for q, answer in zip(questions, made, strict=True)}
        return list(found.items())


@torch.inference_mode()
def answer_batch(
    target: TransformersTarget,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[tuple[int, int]],
    settings: GenerateSettings,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answer prompts (token ids) that leave room together, padded on the left; finished rows are dropped as
    it goes. `on_tokens` is told the tokens of every step."""
    longest = max(map(len, prompts))
    limits = torch.tensor([answer_limit(target.info.max_length, len(p), settings) for p in prompts])
    limit = int(limits.max())
    pad = target.info.stop_token_ids[0] if target.info.stop_token_ids else 0
    device = target.device
    tokens_BT = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    uniforms = torch.stack(
        [torch.rand(limit, generator=request_generator(*s), dtype=torch.float64) for s in seeds]
    )
    stops = torch.tensor(target.info.stop_token_ids, dtype=torch.int64, device=device)
    rows = torch.arange(len(prompts))  # row of the batch -> prompt
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    cache = target.new_cache()
    for step in range(limit):
        # rows that filled the context stay for a while; nothing is read after it
        last = target.info.max_length - 1
        positions = (mask_BS.cumsum(-1) - 1).clamp(0, last)[:, -tokens_BT.shape[1] :]
        output = target.forward(tokens_BT, cache, (), mask_BS, positions)
        probs = processed_probs(target.logits(output.last_hidden_BTH[:, -1]), sampling_of(settings))
        drawn_B = sample(probs, uniforms[rows, step])
        for row, prompt, token in zip(range(len(rows)), rows.tolist(), drawn_B.tolist(), strict=True):
            if not finished[row]:
                answers[prompt].append(token)
        on_tokens(int((~finished).sum()))
        finished |= torch.isin(drawn_B, stops) | (limits[rows] == step + 1).to(device)
        if finished.all():
            break
        tokens_BT, mask_BS = drawn_B[:, None], torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], 1)
        if finished.float().mean() >= COMPACT_AT:
            keep = (~finished).nonzero().squeeze(-1)
            cache.select(keep)
            tokens_BT, mask_BS, rows, finished = (
                tokens_BT[keep],
                mask_BS[keep],
                rows[keep.cpu()],
                finished[keep],
            )
    stop_ids = set(target.info.stop_token_ids)
    return [Answer(tuple(a), "stop" if a[-1] in stop_ids else "length") for a in answers]
