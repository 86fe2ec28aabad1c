"""Folders of forms that others write, by hand from what their engines read: the same proposals as a plain
implementation makes of the folder's tensors; or a line that says what was found and what is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from draftkit.decode import decode
from draftkit.draft.checkpoint import load_drafter, new_drafter, read_config, save_drafter
from draftkit.draft.drafter import Drafter
from draftkit.engine.engine import Engine
from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import CheckpointError
from draftkit.handover.engines import ENGINES
from draftkit.handover.export import command_for
from draftkit.ops.sampling import Sampling
from draftkit.target.transformers import TransformersTarget
from support.drafters import BLOCK_CONFIG, EAGLE_CONFIG
from support.engine import PROMPTS, finish, small, tokens_of
from support.plain_forms import Block, block_proposal, eagle_proposal, xpress_proposal

SIZES: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 64,
    "vocab_size": 40,
    "num_target_layers": 4,
}
DFLASH = SIZES | {
    "architectures": ["DFlashDraftModel"],
    "block_size": 5,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2]},
}
EAGLE = SIZES | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "eagle_aux_hidden_state_layer_ids": [1, 3],
    "ttt_length": 4,
}
PARTS2 = {"conv_kernel_size": 2, "conv_group_size": 4, "selector_rank": 6, "selector_top_k": 5}
DFLASH2 = DFLASH | {
    "architectures": ["DFlash2DraftModel"],
    "dflash_config": {**DFLASH["dflash_config"], **PARTS2},
}
TYPES = ["sliding_attention", "full_attention"]


def nested(**more: Any) -> dict[str, Any]:
    return {"dflash_config": {**DFLASH["dflash_config"], **more}}


def written(folder: Path, config: dict[str, Any], bias: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A folder with random tensors of these sizes, by the names of the form; the tensors in float64."""
    torch.manual_seed(3)
    eagle = "Eagle3" in config["architectures"][0]
    h, width, inner = 16, 32 if eagle else 16, 24
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (40, h), "lm_head.weight": (40, h)}
    shapes |= {"fc.weight": (h, 32), "norm.weight": (h,)}
    prefixes = ["midlayer."] if eagle else ["layers.0.", "layers.1."]
    shapes |= {"midlayer.hidden_norm.weight": (h,)} if eagle else {"hidden_norm.weight": (h,)}
    shapes |= {"input_norm.weight": (32,)} if config.get("norm_before_fc") else {}
    shapes |= {f"fc_norm.{i}.weight": (h,) for i in range(2 if config.get("fc_norm") else 0)}
    taps = config.get("dflash_config", {}).get("conv_kernel_size", 0)
    for p in prefixes:
        rows = {"q_proj": (32, width), "k_proj": (16, width), "v_proj": (16, width), "o_proj": (h, 32)}
        shapes |= {f"{p}self_attn.{n}.weight": shape for n, shape in rows.items()}
        shapes |= {f"{p}self_attn.{n}.bias": rows[n][:1] for n in bias}
        shapes |= {} if eagle else {f"{p}self_attn.{n}.weight": (8,) for n in ("q_norm", "k_norm")}
        shapes |= {f"{p}mlp.{n}.weight": (inner, h) for n in ("gate_proj", "up_proj")}
        shapes |= {f"{p}mlp.down_proj.weight": (h, inner)}
        shapes |= {f"{p}{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
        for conv in ("attention_conv", "mlp_conv") if taps else ():
            shapes[f"{p}{conv}.base_kernel"] = (2, taps, h)
            shapes[f"{p}{conv}.kernel_projection.weight"] = (2 * taps * h // 4, h)
    if taps:
        shapes |= {f"candidate_selector.{n}_codebook": (40, 6) for n in ("predecessor", "successor")}
        shapes["candidate_selector.hidden_projection.weight"] = (6, h)
    if "xpress_rank" in config:
        x, rank, inner = "xpress_head.", config["xpress_rank"], config["xpress_mlp_hidden"]
        shapes |= {f"{x}{n}.weight": (40, rank) for n in ("w1", "w2")}
        shapes |= {f"{x}{n}.weight": (rank, h) for n in ("down_h", "down_g")}
        shapes |= {f"{x}mlp.{n}.weight": (inner, rank) for n in ("gate_proj", "up_proj")}
        shapes |= {f"{x}mlp.down_proj.weight": (rank, inner), f"{x}in_proj.weight": (rank, 3 * rank)}
        shapes[f"{x}mix.L"] = (rank, config["block_size"], config["block_size"])
    tensors = {name: torch.randn(shape) * (0.4 if len(shape) > 1 else 1.0) for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return {name: t.double() for name, t in tensors.items()}


def proposed(drafter: Drafter, features: Tensor, after: list[int]) -> list[int]:
    """The likeliest tokens after a context."""
    context = drafter.new_context()
    drafter.extend(context, features[None], torch.tensor([after]))
    uniforms = torch.zeros(1, drafter.gamma, dtype=torch.float64)
    anchor = torch.tensor(after[-1:])
    found: list[int] = drafter.propose(context, anchor, Sampling(0.0), uniforms).tokens_BG[0].tolist()
    return found


def distributions(drafter: Drafter, features: Tensor, after: list[int], wanted: list[int]) -> Tensor:
    """q at temperature 1 along the wanted tokens, [G, V]: uniforms are chosen so that these are drawn."""
    rows: list[Tensor] = []
    uniforms = torch.zeros(1, drafter.gamma, dtype=torch.float64)
    for k in range(drafter.gamma):
        context = drafter.new_context()
        drafter.extend(context, features[None], torch.tensor([after]))
        q = drafter.propose(context, torch.tensor(after[-1:]), Sampling(1.0), uniforms).probs_BGV[0, k]
        rows.append(q)
        cumulative = q.double().cumsum(0)
        low = cumulative[wanted[k] - 1] if wanted[k] else 0.0
        uniforms[0, k] = (low + cumulative[wanted[k]]) / 2
    return torch.stack(rows)


FULL, BOTH = (None, False), ("q_proj", "k_proj", "v_proj", "o_proj")
BLOCKS: dict[str, tuple[dict[str, Any], tuple[Any, ...], tuple[str, ...]]] = {
    "all full": ({}, (FULL, FULL), ()),
    "sliding by its type, causal": ({"layer_types": TYPES, "sliding_window": 4}, ((4, True), FULL), ()),
    "sliding and not causal": (
        {"layer_types": TYPES, "sliding_window": 4, "is_causal": False},
        ((4, False), FULL),
        (),
    ),
    "use_swa, its own window": (nested(use_swa=True, swa_window_size=3), ((3, False),) * 2, ()),
    "all causal": (nested(causal=True), ((None, True),) * 2, ()),
    "attention biases": ({"attention_bias": True}, (FULL, FULL), BOTH),
    "biases without the last": ({"attention_bias": True}, (FULL, FULL), BOTH[:3]),
    "DFlash2": (DFLASH2, (FULL, FULL), ()),
    "DFlash2, sliding and not causal": (
        {
            "architectures": ["DFlash2DraftModel"],
            "layer_types": ["sliding_attention"] * 2,
            "sliding_window": 4,
            "is_causal": False,
            **nested(**PARTS2, block_size=4),
        },
        ((4, False),) * 2,
        (),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_blocks_proposals_are_those_of_a_plain_implementation(name: str, tmp_path: Path) -> None:
    changes, layers, bias = BLOCKS[name]
    config = DFLASH | changes
    tensors = written(tmp_path / "drafter", config, bias)
    size = config["dflash_config"].get("block_size", 5)
    two = {"taps": 2, "group": 4, "candidates": 5} if "DFlash2" in name else {}
    block = Block(layers, 4, 2, 8, 3, size, **two)
    drafter = load_drafter(tmp_path / "drafter", torch.float64)
    features, after = torch.randn(9, 32, dtype=torch.float64), [5, 6, 7, 8, 9, 10, 11, 12, 13]
    tokens, rows = block_proposal(tensors, block, features, after[-1])
    assert proposed(drafter, features, after) == tokens and drafter.gamma == size - 1
    assert torch.allclose(distributions(drafter, features, after, tokens), torch.stack(rows), atol=1e-5)


XPRESS = DFLASH | {
    "architectures": ["Qwen3XPressModel"],
    "xpress_rank": 6,
    "xpress_mlp_hidden": 12,
    "xpress_num_passes": 2,
    "xpress_block_size": 5,
}
SPECULATORS_XPRESS = {  # the same drafter as speculators 0.9 writes it
    "architectures": ["XPressSpeculator"],
    "speculators_model_type": "xpress",
    "transformer_layer_config": SIZES,
    "num_target_layers": 4,
    "aux_hidden_state_layer_ids": [1, 3],
    "block_size": 5,
    "mask_token_id": 3,
    "draft_vocab_size": 40,
    "xpress_rank": 6,
    "xpress_mlp_ratio": 2,
    "num_jacobi_passes": 2,
}
REFINER = {
    "xpress_head.": "refiner_head.",
    "mix.L": "mix_l",
    "w1.": "token_embed.",
    "w2.": "readout.",
    "r_head.mlp.gate_proj": "r_head.mlp_gate",
    "r_head.mlp.up_proj": "r_head.mlp_up",
    "r_head.mlp.down_proj": "r_head.mlp_down",
}


@pytest.mark.parametrize("passes", [1, 2, 6])
@pytest.mark.parametrize("anchor", [False, True])
def test_xpress_drafts_as_a_plain_implementation_does(passes: int, anchor: bool, tmp_path: Path) -> None:
    config = XPRESS | {"xpress_num_passes": passes, "sample_from_anchor": anchor}
    tensors = written(tmp_path / "drafter", config)
    drafter, first = load_drafter(tmp_path / "drafter", torch.float64), 0 if anchor else 1
    features, after = torch.randn(9, 32, dtype=torch.float64), [5, 6, 7, 8, 9, 10, 11, 12, 13]
    block = Block((FULL, FULL), 4, 2, 8, 3, 5)
    plain = xpress_proposal(tensors, block, features, after[-1], passes, first, None)
    assert proposed(drafter, features, after) == plain[0] and drafter.gamma == 5 - first
    uniforms = torch.rand(1, drafter.gamma, dtype=torch.float64)
    tokens, rows = xpress_proposal(tensors, block, features, after[-1], passes, first, uniforms[0].tolist())
    context = drafter.new_context()
    drafter.extend(context, features[None], torch.tensor([after]))
    made = drafter.propose(context, torch.tensor(after[-1:]), Sampling(1.0), uniforms)
    assert made.tokens_BG[0].tolist() == tokens
    assert torch.allclose(made.probs_BGV[0].double(), torch.stack(rows), atol=1e-5)
    for k in range(drafter.gamma):  # a row does not depend on its own uniform number and later ones
        changed = uniforms.clone()
        changed[0, k:] = torch.rand(drafter.gamma - k, dtype=torch.float64)
        other = drafter.propose(context, torch.tensor(after[-1:]), Sampling(1.0), changed)
        torch.testing.assert_close(other.probs_BGV[:, : k + 1], made.probs_BGV[:, : k + 1])


def test_speculators_xpress_is_the_same_drafter(tmp_path: Path) -> None:
    tensors = written(tmp_path / "drafter", XPRESS)
    theirs = load_drafter(tmp_path / "drafter")
    for old, new in REFINER.items():
        tensors = {name.replace(old, new): t for name, t in tensors.items()}
    save_file({n: t.float() for n, t in tensors.items()}, tmp_path / "drafter" / "model.safetensors")
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(SPECULATORS_XPRESS))
    again = load_drafter(tmp_path / "drafter")
    assert again.config == theirs.config
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in theirs.state_dict().items())


EAGLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "3": ({}, ()),
    "3.1": ({"norm_before_fc": True, "fc_norm": True, "norm_output": True}, ()),
    "normed output alone": ({"norm_output": True, "norm_before_residual": True}, ()),
    "biases": ({"attention_bias": True}, BOTH[:3]),
}


@pytest.mark.parametrize("name", EAGLES)
def test_an_eagles_proposals_are_those_of_a_plain_implementation(name: str, tmp_path: Path) -> None:
    changes, bias = EAGLES[name]
    config = EAGLE | changes
    tensors = written(tmp_path / "drafter", config, bias)
    drafter = load_drafter(tmp_path / "drafter", torch.float64)
    features, after = torch.randn(7, 32, dtype=torch.float64), [5, 6, 7, 8, 9, 10, 11]
    tokens, rows = eagle_proposal(tensors, config, features, after, 4)
    assert proposed(drafter, features, after) == tokens
    assert torch.allclose(distributions(drafter, features, after, tokens), torch.stack(rows), atol=1e-5)


def test_eagle_31_is_written_and_read_again(tmp_path: Path) -> None:
    config = replace(EAGLE_CONFIG, norm_before_fc=True, fc_norm=True, norm_output=True)
    drafter = new_drafter(config, torch.randn(40, 16), torch.randn(40, 16))
    save_drafter(drafter, tmp_path / "drafter", {}, torch.float32)
    again = load_drafter(tmp_path / "drafter")
    assert again.config == config
    refusing = [name for name, engine in ENGINES.items() if any("norm" in r for r in engine.refusals(config))]
    assert refusing == ["sglang", "llama.cpp"]
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in drafter.state_dict().items())


SPECFORGE = SIZES | {
    "architectures": ["DSparkDraftModel"],
    "block_size": 4,
    "layer_types": ["full_attention"] * 2,
    "dflash_config": {
        "projector_type": "dspark",
        "mask_token_id": 3,
        "target_layer_ids": [0, 2],
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "confidence_head_alpha": 1.0,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "shift_label": True,
    },
}


def test_specforges_fields_lie_in_a_section(tmp_path: Path) -> None:
    """Its DSpark folder is the same drafter as with its fields at the top."""
    (tmp_path / "config.json").write_text(json.dumps(SPECFORGE))
    assert read_config(tmp_path) == BLOCK_CONFIG


def test_speculators_dflash2_is_the_same_drafter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DFLASH2))
    wanted = read_config(tmp_path)
    said = {
        "speculators_model_type": "dflash2",
        "architectures": ["DFlash2Speculator"],
        "num_target_layers": 4,
    }
    said |= {"transformer_layer_config": SIZES, "aux_hidden_state_layer_ids": [1, 3], **PARTS2}
    (tmp_path / "config.json").write_text(json.dumps(said | {"block_size": 5, "mask_token_id": 3}))
    assert read_config(tmp_path) == wanted


def test_an_eagle_by_the_name_of_its_target_is_told_by_its_draft_vocabulary(tmp_path: Path) -> None:
    """The authors' releases are called LlamaForCausalLM, and have scaled rotary embeddings."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32}
    config = EAGLE | {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 20, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_config(tmp_path)
    assert (found.algorithm, found.draft_vocab_size, found.style) == ("eagle3", 20, "llama")
    assert found.rope_scaling is not None and found.rope_scaling["rope_type"] == "llama3"
    (tmp_path / "config.json").write_text(json.dumps({**config, "draft_vocab_size": None}))
    with pytest.raises(CheckpointError, match="architecture LlamaForCausalLM is not known"):
        read_config(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "XPress of two sizes": (XPRESS | {"xpress_block_size": 8}, "block_size is 5 and xpress_block_size 8"),
    "XPress of a reduced vocabulary": (XPRESS | {"draft_vocab_size": 20}, "draft_vocab_size"),
    "XPress on DFlash2": (SPECULATORS_XPRESS | {"xpress_backbone": "dflash2"}, "xpress_backbone"),
    "XPress with a selector": (SPECULATORS_XPRESS | {"xpress_selector": True}, "xpress_selector"),
    "XPress without passes": (XPRESS | {"xpress_num_passes": 0}, "refiner_passes: 0 must lie between 1"),
    "LiLiCorr": (
        DFLASH | {"architectures": ["LiLiCorrDraftModel"]},
        "LiLiCorr .*known are .*DFlash2DraftModel, Qwen3XPressModel",
    ),
    "P-EAGLE": (EAGLE | {"architectures": ["PEagleDraftModel"]}, "P-EAGLE"),
    "Domino": (DFLASH | {"architectures": ["DominoDraftModel"]}, "Domino"),
    "Domino in DFlash's clothes": (DFLASH | nested(projector_type="domino"), "'projector_type' is 'domino'"),
    "sinks": (DFLASH | nested(attention_sink_bias=True), "attention_sink_bias"),
    "scaled values": (DFLASH | nested(attention_value_scale=0.5), "attention_value_scale"),
    "another layer type": (DFLASH | {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    "no window": (DFLASH | {"layer_types": TYPES}, "swa_window_size"),
    "sliding EAGLE": (EAGLE | {"layer_types": ["sliding_attention"]}, "sliding_attention"),
    "parallel EAGLE": (EAGLE | {"parallel_drafting": True}, "parallel_drafting"),
    "DFlash2 without its selector": (DFLASH | {"architectures": ["DFlash2DraftModel"]}, "conv_kernel_size"),
    "MLP biases": (DFLASH | {"mlp_bias": True}, "mlp_bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_run_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, told = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told):
        read_config(tmp_path)


def test_engines_take_dflash2_by_the_method_of_dflash(tmp_path: Path) -> None:
    """So says a model card of such a folder; XPress is refused where there is none."""
    (tmp_path / "config.json").write_text(json.dumps(DFLASH2))
    shape = read_config(tmp_path)
    assert '"method": "dflash"' in command_for("vllm", shape, "T", tmp_path)
    assert "--speculative-algorithm DFLASH " in command_for("sglang", shape, "T", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(XPRESS))
    shape = read_config(tmp_path)
    refusing = [name for name, e in ENGINES.items() if "it has no XPress" in e.refusals(shape)]
    assert refusing == ["sglang", "llama.cpp", "mlx"]


def test_what_is_only_run_is_not_written(tmp_path: Path) -> None:
    written(tmp_path / "drafter", DFLASH | {"attention_bias": True}, BOTH)
    drafter = load_drafter(tmp_path / "drafter")
    with pytest.raises(CheckpointError, match=r"attention biases: .*give its own folder on"):
        save_drafter(drafter, tmp_path / "out", {}, torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", [DFLASH2, XPRESS])
def test_the_engine_gives_the_targets_own_answers(
    config: dict[str, Any], target: TransformersTarget, tmp_path: Path
) -> None:
    """Through `propose`: greedy answers are the target's, sampled ones those of the reference loop."""
    written(tmp_path / "drafter", config)
    shape = replace(
        read_config(tmp_path / "drafter"),
        hidden_size=32,
        intermediate_size=48,
        vocab_size=target.info.vocab_size,
    )
    torch.manual_seed(1)
    drafter = new_drafter(shape, target.embedding_weight(), target.head_weight()).double().eval()
    engine = Engine(target, drafter, small(max_running=4))
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=16, temperature=0.0))
        engine.add_request(f"{index} sampled", prompt, SamplingParams(max_tokens=16, seed=index))
    outputs = finish(engine)
    for index, prompt in enumerate(PROMPTS):
        assert tokens_of(outputs[str(index)]) == list(decode(target, None, prompt, Sampling(0.0), 16).tokens)
        sampled = decode(target, drafter, prompt, Sampling(1.0), 16, index).tokens
        assert tokens_of(outputs[f"{index} sampled"]) == list(sampled)
    assert engine.metrics.drafted > 0
