"""Training of the embedded target (`python -m tools.tiny_target`): resumable, on CPU or GPU."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from draftkit.errors import CheckpointError, ConfigError
from draftkit.train.folder import read_folder, write_folder
from tools.tiny_target.corpus import DOMAINS, Corpus, build_corpus
from tools.tiny_target.corpus_python import Example
from tools.tiny_target.model import new_model
from tools.tiny_target.muon import Muon
from tools.tiny_target.rows import ROW_LENGTH, RowSampler, encode
from tools.tiny_target.tokenizer import train_tokenizer


@dataclass(frozen=True)
class TinySettings:
    """How the embedded target is trained. The learning rate warms up, stays, and falls to zero over `decay`
    of all steps."""

    steps: int = 1600
    rows: int = 16
    lr_muon: float = 4e-3
    lr_adam: float = 4e-3
    warmup: int = 50
    decay: float = 0.35
    weight_decay: float = 0.1
    seed: int = 7
    save_every: int = 100
    compile: bool = False

    def lr_scale(self, step: int) -> float:
        """Warm-up, plateau, linear decay: one number in (0, 1]."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return max(1e-3, min(1.0, (step + 1) / self.warmup, left))


@dataclass(frozen=True)
class TinyResult:
    """What the model card says about the training."""

    steps: int
    tokens_seen: int
    seconds: float
    held_out_loss: dict[str, float]  # nats per assistant token, by domain


def tokenizer_for(corpus: Corpus) -> PreTrainedTokenizerFast:
    """The tokenizer trained on code and chat and on about as much math as there is chat."""
    math = [e for e in corpus.train if e.domain == "math"][:9000]
    texts = [e for e in corpus.train if e.domain != "math"] + math
    return train_tokenizer(text for e in texts for text in (e.prompt, e.answer))


def train_tiny_target(
    out: Path,
    settings: TinySettings,
    device: str = "cpu",
    before_step: Callable[[int], None] = lambda step: None,
) -> TinyResult:
    """Train (or go on training) in `out`; leaves `out/state` for resuming and the tokenizer in
    `out/tokenizer`.

    `before_step` is called with the number of each step. Raises CheckpointError when `out/state` is damaged
    or was made with another model shape or other settings, and ConfigError for a device that is not there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {device} cannot be used ({line}); give cpu, or cuda where there is a GPU"
        ) from error
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    earlier, start, seconds = _read_state(out / "state", settings)
    corpus = build_corpus()
    tokenizer = tokenizer_for(corpus)
    tokenizer.save_pretrained(out / "tokenizer")
    sampler = RowSampler(corpus.train, tokenizer, settings.seed)
    model: Any = new_model(tokenizer, settings.seed)
    model.to(device)
    optimizers = _optimizers(model, settings)
    if earlier:
        _restore(out / "state", earlier, model, optimizers)
    forward = torch.compile(model.model) if settings.compile else model.model
    log = (out / "log.jsonl").open("a", encoding="utf-8")
    columns = (
        TextColumn("tiny target"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), disable=not os.isatty(2)) as progress, log:
        bar = progress.add_task("train", total=settings.steps, completed=start, note="")
        for step in range(start, settings.steps):
            before_step(step)
            began = time.perf_counter()
            ids, weights = (t.to(device) for t in sampler.batch(step, settings.rows))
            loss = _step(forward, model, optimizers, settings, step, ids, weights)
            seconds += time.perf_counter() - began
            rate = settings.rows * ROW_LENGTH / (time.perf_counter() - began)
            progress.update(bar, advance=1, note=f"loss {loss:.3f}  {rate:,.0f} tokens/s")
            record: dict[str, object] = {"step": step, "loss": round(loss, 4), "tokens_per_s": round(rate)}
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                record["held_out"] = held_out_loss(model, tokenizer, _some(corpus.held_out, 40), device)
                _save_state(out / "state", model, optimizers, settings, step + 1, seconds)
            log.write(json.dumps(record) + "\n")
            log.flush()
    final = held_out_loss(model, tokenizer, corpus.held_out, device)
    result = TinyResult(settings.steps, settings.steps * settings.rows * ROW_LENGTH, seconds, final)
    (out / "result.json").write_text(json.dumps(asdict(result) | {"settings": asdict(settings)}, indent=1))
    return result


def _some(examples: Sequence[Example], per_domain: int) -> list[Example]:
    return [e for d in DOMAINS for e in [x for x in examples if x.domain == d][:per_domain]]


def _step(
    forward: Callable[..., Any],
    model: Qwen3ForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    settings: TinySettings,
    step: int,
    ids: Tensor,
    weights: Tensor,
) -> float:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=_has_bfloat16(ids.device)):
        hidden = forward(input_ids=ids[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden)
    token_loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    loss = (token_loss * weight).sum() / weight.sum()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * settings.lr_scale(step)
        optimizer.step()
        optimizer.zero_grad()
    return float((token_loss.detach() * (weight == 1)).sum() / (weight == 1).sum())


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 numbers itself: a CPU that emulates it takes many times
    longer."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@torch.no_grad()
def held_out_loss(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    device: str = "cpu",
) -> dict[str, float]:
    """Mean loss in nats per assistant token, by domain; each conversation alone in its row."""
    losses = {}
    for domain in DOMAINS:
        turns = encode([e for e in examples if e.domain == domain], tokenizer)
        total, count = 0.0, 0
        for turn in turns:
            ids = torch.tensor([turn.ids[:2048]], device=device)
            answer = torch.tensor(turn.weights[: ids.shape[1]], device=device)[1:] == 1
            logits = model(input_ids=ids[:, :-1]).logits[0, answer].float()
            total += float(F.cross_entropy(logits, ids[0, 1:][answer], reduction="sum"))
            count += int(answer.sum())
        losses[domain] = round(total / count, 4)
    return losses


def _optimizers(model: Qwen3ForCausalLM, settings: TinySettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, settings.lr_muon, settings.weight_decay)
    adam = torch.optim.AdamW(others, lr=settings.lr_adam, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def _save_state(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    settings: TinySettings,
    step: int,
    seconds: float,
) -> None:
    """Weights, optimizer moments and position."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for index, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optim.{index}.{key}.{n}": torch.as_tensor(v) for n, v in state.items()}
    write_folder(folder, tensors, {"step": step, "seconds": seconds, "settings": _deciding(settings)})


def _deciding(settings: TinySettings) -> dict[str, Any]:
    """The settings that decide the steps, by name."""
    return {name: value for name, value in asdict(settings).items() if name not in ("save_every", "compile")}


def _read_state(folder: Path, settings: TinySettings) -> tuple[dict[str, Tensor], int, float]:
    """Tensors, step and seconds of an earlier run, none where there was none. Raises CheckpointError when its
    state is damaged or of other settings."""
    found = read_folder(folder)
    if found is None:
        return {}, 0, 0.0
    tensors, note = found
    begun, wanted = note.get("settings", {}), _deciding(settings)
    others = [
        f"{name} {begun.get(name)} (given {value})"
        for name, value in wanted.items()
        if begun.get(name) != value
    ]
    if others:
        raise CheckpointError(
            f"{folder}: was begun with {', '.join(others)}; give the same again, or choose another --out"
        )
    return tensors, note["step"], note["seconds"]


def _restore(
    folder: Path, tensors: dict[str, Tensor], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: weights do not fit this model; remove the folder to start anew"
        ) from error
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise CheckpointError(f"{folder}: weights do not fit this model; remove the folder to start anew")
    for index, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optim.{index}."):
                _, _, parameter, name = key.split(".", 3)
                state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
