"""Phi-3's rotary angles change with the length of what is read: a target is served, and right, up to
there."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from draftkit.target.loading import LONGROPE_SPARE, load_target
from support.targets import SIZES, TEXTS
from tools.tiny_target.tokenizer import train_tokenizer

CHANGES_AT = 160


def test_a_long_prompt_in_pieces_is_what_transformers_reads_at_once(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS)
    torch.manual_seed(0)
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 8.0, 16.0]}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": CHANGES_AT,
        **factors,
    }
    sizes = {**SIZES, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = Phi3Config(**{**sizes, "max_position_embeddings": 1024}, rope_parameters=rope)
    config.original_max_position_embeddings = CHANGES_AT
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    target = load_target(str(tmp_path))
    assert target.info.max_length == CHANGES_AT - LONGROPE_SPARE
    ids = torch.randint(5, 60, (1, target.info.max_length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = target.model(ids).logits
    cache = target.new_cache()
    pieces = [target.logits(target.forward(piece, cache).last_hidden_BTH) for piece in ids.split(40, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # and this is why: beyond, the same tokens in pieces are something else
        longer = torch.cat([ids, ids], 1)
        at_once = target.model(longer).logits
    cache = target.new_cache()
    pieces = [target.logits(target.forward(piece, cache).last_hidden_BTH) for piece in longer.split(40, 1)]
    assert not torch.allclose(torch.cat(pieces, 1), at_once, atol=1e-3)
