"""From a finished training to the asset folder: bfloat16 weights, tokenizer, prompts, model card."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from draftkit.errors import CheckpointError
from draftkit.train.folder import read_folder
from tools.tiny_target.corpus import DOMAINS, Corpus, write_prompts
from tools.tiny_target.model import new_model
from tools.tiny_target.tokenizer import CHAT_TEMPLATE

CARD = """\
---
license: mit
language: en
library_name: transformers
---
# The embedded target of draftkit

A deep and narrow `Qwen3ForCausalLM` ({layers} layers, hidden size {hidden}, {parameters:,} parameters,
bfloat16) with its own byte-level BPE tokenizer ({vocab} entries) and a ChatML template. It exists so that
every stage of draftkit runs on two CPU cores in minutes. It writes text that looks like Python, Python
documentation and worked sums; it knows nothing, and its sums are often wrong. Do not use it for anything
else.

- **Made by** `python -m tools.tiny_target {arguments}` with Python {python}, then `--publish`.
- **Data**: functions of the Python standard library with an instruction in front (code), docstrings and the
  `pydoc_data` topics as questions and answers (chat): Python Software Foundation License 2; multi-step word
  problems with worked answers that draftkit's own code makes (math): MIT. Mixture by tokens: {mixture}.
- **Tokens seen**: {tokens:,} in {steps:,} steps of {rows} rows of {row_length} tokens. Rows are
  {row_length} tokens long, so answers beyond that length are extrapolation.
- **Held-out loss**, nats per assistant token: {losses}.
- **Prompts**: `heldout.jsonl` ({held_out} per domain, with reference answers, never trained on),
  `prompts.jsonl` ({prompts} per domain, from the training side, for drafters).
- **Mask token**: `<|mask|>` is never seen in training.
- **sha256** of `model.safetensors`: `{sha256}`
"""


def publish(run: Path, corpus: Corpus, folder: Path) -> None:
    """Write the asset folder from a finished run. Raises CheckpointError when it is not finished, or its
    state is damaged."""
    from tools.tiny_target.corpus import HELD_OUT_PER_DOMAIN, PROMPTS_PER_DOMAIN
    from tools.tiny_target.rows import MIXTURE, ROW_LENGTH

    state = read_folder(run / "state")
    if state is None or not (run / "result.json").exists():
        raise CheckpointError(
            f"{run}: training has not finished; run `python -m tools.tiny_target --out {run}` again"
        )
    result = json.loads((run / "result.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "tokenizer")
    model: Any = new_model(tokenizer, 0)
    model.load_state_dict({k[6:]: v for k, v in state[0].items() if k.startswith("model.")}, strict=False)
    model.tie_weights()
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    write_prompts(corpus, folder)
    settings = result["settings"]
    card = CARD.format(
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        parameters=sum(p.numel() for p in model.parameters()),
        vocab=len(tokenizer),
        arguments=f"--steps {settings['steps']} --rows {settings['rows']} --seed {settings['seed']}",
        python=platform.python_version(),
        mixture=", ".join(f"{d} {MIXTURE[d]:.0%}" for d in DOMAINS),
        tokens=result["tokens_seen"],
        steps=result["steps"],
        rows=settings["rows"],
        row_length=ROW_LENGTH,
        losses=", ".join(f"{d} {result['held_out_loss'][d]:.2f}" for d in DOMAINS),
        held_out=HELD_OUT_PER_DOMAIN,
        prompts=PROMPTS_PER_DOMAIN,
        sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
