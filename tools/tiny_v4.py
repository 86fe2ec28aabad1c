"""A tiny DeepSeek-V4: configuration, tokenizer, random or trained weights, checkpoints with DeepSeek's names.

`python -m tools.tiny_v4 FOLDER [MINUTES]` trains one for two minutes on the text in the package and writes
its checkpoint, with a random draft module: a target to try every stage with on a CPU."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

from draftkit.progress import doing
from draftkit.target.deepseek_v4 import place_of
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
from draftkit.target.deepseek_v4_tensors import checkpoint_tensors
from draftkit.target.fp8_fp4 import quantise_fp4, quantise_fp8
from draftkit.target.place import EMBEDDED
from tools.tiny_target.tokenizer import train_tokenizer
from tools.v4_configs import TINY

HELD_OUT = 24  # conversations
SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
SPECIAL += [
    f"<｜{name}｜>" for name in ("latest_reminder", "action", "query", "title", "extracted_url", "read_url")
]
MARKUP = ["<think>", "</think>", "｜DSML｜"]


def v4_tokenizer(
    texts: Iterable[str], name: str = "deepseek-ai/DeepSeek-V4-Flash-0731"
) -> PreTrainedTokenizerFast:
    """Byte-level, so that every text comes back; without a chat template."""
    tokenizer = train_tokenizer(texts)
    tokenizer.add_special_tokens({"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]})
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL[2:]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    tokenizer.chat_template = None
    tokenizer.name_or_path = name
    return tokenizer


def tiny_model(heavy: int = 128, seed: int = 0, **changes: Any) -> Any:
    """A random `DeepseekV4ForCausalLM` whose next tokens differ from place to place; its heavily compressed
    layers make one entry of `heavy` tokens."""
    torch.manual_seed(seed)
    config = DeepseekV4Config(
        **({"initializer_range": 0.15} | TINY | changes),
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": heavy},
    )
    model = DeepseekV4ForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.rand(len(buffer), config.n_routed_experts).argsort(-1)[:, :2])
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model


def write_checkpoint(
    folder: Path, model: Any, raw: dict[str, Any] = TINY, quantised: bool = False, shards: int = 2
) -> Path:
    """`model` and a random DSpark module as DeepSeek writes them: its names, in shards with an index; FP8 and
    FP4 where `quantised`."""
    folder.mkdir(parents=True, exist_ok=True)
    specs, state = checkpoint_tensors(raw), model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if name.endswith(".scale"):
            continue
        if name.startswith("mtp."):
            wide = spec.dtype == "I8"
            shape = (spec.shape[0], 2 * spec.shape[1]) if wide else spec.shape
            value = torch.randn(shape) * 0.15 + float(name.endswith("norm.weight"))
        else:
            place = place_of(name)
            value = place.part_of(state[place.name]).clone()
        scale = name.removesuffix("weight") + "scale"
        if quantised and spec.dtype in ("I8", "F8_E4M3"):
            quantise = quantise_fp4 if spec.dtype == "I8" else quantise_fp8
            tensors[name], tensors[scale] = quantise(value)
        else:
            tensors[name] = value.contiguous()
    names = sorted(tensors)
    cut = -(-len(names) // shards)
    places: dict[str, str] = {}
    for number in range(shards):
        part = names[number * cut : (number + 1) * cut]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    more = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(raw | (more if quantised else {})))
    return folder


def packaged_answers() -> list[dict[str, Any]]:
    """The arithmetic problems in the package, with their answers, as conversations."""
    rows = [json.loads(line) for line in (EMBEDDED / "heldout.jsonl").read_text("utf-8").splitlines()]
    return [
        {
            "id": row["id"],
            "domain": row["domain"],
            "messages": [*row["messages"], {"role": "assistant", "content": row["reference"]}],
        }
        for row in rows
        if row["domain"] == "math"
    ]


def train(model: Any, texts: Sequence[Sequence[int]], seconds: float, seed: int = 0) -> float:
    """Next-token training for a while; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    numbers, began, loss = random.Random(seed), time.monotonic(), torch.zeros(())
    model.train()
    while (share := (time.monotonic() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 2 * (1 - share))
        batch = numbers.sample(list(texts), 12)
        longest = max(map(len, batch))
        tokens = torch.tensor([[*t, *[-100] * (longest - len(t))] for t in batch])
        logits = model(tokens.clamp_min(0)).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return loss.item()


def make(folder: Path, seconds: float) -> None:
    """Train a tiny V4 and write its folder: checkpoint, tokenizer, `conversations.jsonl` to go on with, and
    `heldout.jsonl`, which it has not seen."""
    rows = packaged_answers()
    tokenizer = v4_tokenizer([m["content"] for row in rows for m in row["messages"]])
    raw = TINY | {
        "vocab_size": len(tokenizer) + 1,
        "dspark_noise_token_id": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    seen, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    shown = DeepseekFormat(tokenizer, {"thinking": False})
    turns = [turn for row in seen for turn in shown.turns(row["messages"])]
    model = tiny_model(**raw | {"initializer_range": 0.02})
    with doing("training a tiny DeepSeek-V4"):
        loss = train(model, [t.prompt_ids + t.answer_ids for t in turns], seconds)
    print(f"{len(turns)} answers, {sum(p.numel() for p in model.parameters()):,} parameters, loss {loss:.3f}")
    write_checkpoint(folder, model, raw)
    tokenizer.save_pretrained(folder)
    for name, part in (("conversations", seen), ("heldout", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]), 60 * float(sys.argv[2]) if len(sys.argv) > 2 else 120.0)
