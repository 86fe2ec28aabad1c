"""Folders as the speculators library writes them, by hand from its documentation: the same proposals as of
the drafter whose weights they hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from draftkit.draft.checkpoint import load_drafter, new_drafter
from draftkit.draft.drafter import Drafter, DrafterConfig
from draftkit.errors import CheckpointError
from draftkit.ops.sampling import Sampling
from support.drafters import BLOCK_CONFIG, EAGLE_CONFIG

IDS = torch.arange(1, 40, 2)
LAYER = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
VERIFIER = {"name_or_path": "some/target", "architectures": ["Qwen3ForCausalLM"]}


def config_of(kind: str, architecture: str, drafted: int, layers: int, **fields: Any) -> dict[str, Any]:
    """`config.json` with the fields that every speculators model has."""
    return {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafted}],
            "verifier": VERIFIER,
        },
        "transformer_layer_config": LAYER | {"num_hidden_layers": layers},
        "num_target_layers": 4,
        **fields,
    }


DSPARK = {
    "block_size": 4,
    "mask_token_id": 3,
    "aux_hidden_state_layer_ids": [1, 3],  # outputs 0 and 2
    "markov_rank": 6,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "sample_from_anchor": True,
}
DFLASH = {"block_size": 4, "mask_token_id": 3, "aux_hidden_state_layer_ids": [1, 3]}
EAGLE = {
    "eagle_aux_hidden_state_layer_ids": [1, 3],
    "norm_before_residual": True,
    "embed_requires_grad": False,
}
NO_HEADS = {"head": "none", "markov_rank": 0, "confidence": False, "confidence_with_markov": False}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dspark": (BLOCK_CONFIG, config_of("dspark", "DSparkSpeculator", 4, 2, **DSPARK)),
    "dspark, 1 + N": (
        replace(BLOCK_CONFIG, layout="one_plus_n"),
        config_of("dspark", "DSparkDraftModel", 3, 2, **DSPARK | {"sample_from_anchor": False}),
    ),
    "dspark, reduced": (
        replace(BLOCK_CONFIG, draft_vocab_size=len(IDS)),
        config_of("dspark", "DSparkSpeculator", 4, 2, **DSPARK, draft_vocab_size=len(IDS)),
    ),
    "dflash, reduced": (
        replace(BLOCK_CONFIG, layout="one_plus_n", draft_vocab_size=len(IDS), **NO_HEADS),
        config_of("dflash", "DFlashSpeculator", 3, 2, **DFLASH, draft_vocab_size=len(IDS)),
    ),
    "eagle3 of Llama's block": (
        replace(EAGLE_CONFIG, norm_before_residual=True, draft_vocab_size=len(IDS)),
        config_of("eagle3", "Eagle3Speculator", 4, 1, **EAGLE, draft_vocab_size=len(IDS))
        | {"transformer_layer_config": LAYER | {"num_hidden_layers": 1, "model_type": "llama"}},
    ),
    "eagle3 of Qwen3's block, old residual": (
        replace(EAGLE_CONFIG, style="qwen3"),
        config_of("eagle3", "Eagle3DraftModel", 4, 1, **EAGLE | {"norm_before_residual": False}),
    ),
    "eagle3, the residual not said": (
        replace(EAGLE_CONFIG, style="qwen3", norm_before_residual=True),
        config_of("eagle3", "Eagle3DraftModel", 4, 1, eagle_aux_hidden_state_layer_ids=[1, 3]),
    ),
}


def drafter_of(shape: Any) -> Drafter:
    torch.manual_seed(1)
    ids = IDS if shape.draft_vocab_size else None
    drafter = new_drafter(shape, torch.randn(40, 16), torch.randn(40, 16), ids)
    for parameter in drafter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return drafter.eval()


def written(folder: Path, drafter: Drafter, config: dict[str, Any]) -> Path:
    """Tensors under speculators' names: layers.0 for EAGLE-3, d2t as offsets and t2d beside it."""
    tensors = {n.replace("midlayer.", "layers.0."): t.clone() for n, t in drafter.state_dict().items()}
    if drafter.draft_ids_W is not None:
        tensors["d2t"] = drafter.draft_ids_W - torch.arange(len(drafter.draft_ids_W))
        tensors["t2d"] = torch.zeros(40, dtype=torch.bool).index_fill_(0, drafter.draft_ids_W, True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def proposals(drafter: Drafter) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    context, tokens = drafter.new_context(), torch.randint(0, 40, (1, 9))
    drafter.extend(context, torch.randn(1, 9, 32), tokens)
    uniforms = torch.full((1, drafter.gamma), 0.4, dtype=torch.float64)
    made = drafter.propose(context, tokens[:, -1], Sampling(1.0), uniforms)
    return made.tokens_BG, made.probs_BGV


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_speculators_drafts_the_same(tmp_path: Path, case: str) -> None:
    shape, config = CASES[case]
    drafter = drafter_of(shape)
    read = load_drafter(written(tmp_path / "folder", drafter, config))
    assert read.config.gamma == shape.gamma
    tokens, probs = proposals(drafter)
    own_tokens, own_probs = proposals(read)
    assert torch.equal(own_tokens, tokens)
    torch.testing.assert_close(own_probs, probs, rtol=0, atol=1e-5)


def test_a_layout_that_is_not_said_is_no_guess(tmp_path: Path) -> None:
    """vLLM takes false, the library wrote true: acceptance would depend on who reads it."""
    config = {k: v for k, v in CASES["dspark"][1].items() if k != "sample_from_anchor"}
    with pytest.raises(CheckpointError, match="field 'sample_from_anchor' is missing"):
        load_drafter(written(tmp_path / "folder", drafter_of(BLOCK_CONFIG), config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"speculators_model_type": "peagle"},
            "'peagle' is not known; known are dspark, dflash, dflash2, xpress, eagle3",
        ),
        ({"transformer_layer_config": None}, "field 'transformer_layer_config' is missing"),
        ({"aux_hidden_state_layer_ids": None}, "field 'aux_hidden_state_layer_ids' is missing"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantised .compressed-tensors."),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = written(tmp_path / "folder", drafter_of(BLOCK_CONFIG), CASES["dspark"][1] | changes)
    with pytest.raises(CheckpointError, match=said):
        load_drafter(folder)


def test_sliding_layers_are_causal_where_the_folder_says_so(tmp_path: Path) -> None:
    shape, config = CASES["dflash, reduced"]
    layer = config["transformer_layer_config"] | {"layer_types": ["sliding_attention"] * 2}
    folder = written(tmp_path / "folder", drafter_of(shape), config | {"transformer_layer_config": layer})
    with pytest.raises(CheckpointError, match="field 'swa_window_size' is missing"):
        load_drafter(folder)
    layer |= {"sliding_window": 6}
    for said, causal in (({}, False), ({"sliding_window_non_causal": False}, True)):
        (folder / "config.json").write_text(
            json.dumps(config | {"transformer_layer_config": layer} | said), "utf-8"
        )
        found = load_drafter(folder).config
        assert isinstance(found, DrafterConfig) and found.layer_attention == ((6, causal),) * 2
