"""Drafter folders: every form is read as what it is and written as other engines expect it; mistakes are
named."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from draftkit import cli
from draftkit.decode import decode
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import load_drafter, new_drafter, open_drafter, read_config, save_drafter
from draftkit.draft.checkpoint_files import read_provenance
from draftkit.draft.drafter import DrafterShape
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.errors import CheckpointError, ConfigError
from draftkit.ops.sampling import Sampling
from draftkit.output import write_text
from draftkit.schedule.traces import save_traces
from draftkit.target.transformers import TransformersTarget
from draftkit.train.folder import write_folder
from support.drafters import BLOCK_CONFIG as BLOCK
from support.drafters import EAGLE_CONFIG as EAGLE
from support.drafters import GEMMA, eagle_for
from support.traces import made_traces

DFLASH: dict[str, Any] = {
    "head": "none",
    "markov_rank": 0,
    "confidence": False,
    "confidence_with_markov": False,
}
SHAPES: dict[str, DrafterShape] = {
    "dspark": BLOCK,
    "gated": replace(BLOCK, head="gated", confidence_with_markov=False),
    "dspark 1+N": replace(BLOCK, head="rnn", layout="one_plus_n"),
    "dflash": replace(BLOCK, **DFLASH),
    "dflash 1+N": replace(BLOCK, **DFLASH, layout="one_plus_n"),
    "dflash 1+N capped": replace(BLOCK, **DFLASH, layout="one_plus_n", soft_cap=30.0, window=9),
    "dspark reduced": replace(BLOCK, draft_vocab_size=12),
    "gemma4": replace(BLOCK, **GEMMA),
    "llama": replace(BLOCK, style="llama", window=12, logit_scale=0.5),
    "eagle3": EAGLE,
    "eagle3 gemma4": replace(EAGLE, **GEMMA),
    "eagle3 with norms": replace(EAGLE, style="qwen3", block_size=5),
    "eagle3 reduced": replace(EAGLE, draft_vocab_size=12, norm_before_residual=True),
}


def drafter_for(target: TransformersTarget, shape: DrafterShape) -> BlockDrafter | EagleDrafter:
    torch.manual_seed(2)
    shape = replace(shape, hidden_size=32, vocab_size=target.info.vocab_size, num_target_layers=4)
    size = getattr(shape, "draft_vocab_size", None)
    ids = torch.arange(1, 3 * size, 3) if size else None
    drafter = new_drafter(shape, target.embedding_weight(), target.head_weight(), ids)
    for parameter in drafter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return drafter.eval()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit(folder: Path, **changes: Any) -> dict[str, Any]:
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {k: v for k, v in fields.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "draftkit.json").unlink(missing_ok=True)  # which would find it
    return fields


@pytest.mark.parametrize("lend", [False, True], ids=["whole", "borrowed"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_drafter_comes_back_as_it_was(
    name: str, lend: bool, target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, SHAPES[name])
    save_drafter(drafter, tmp_path, {}, torch.float32, lender=target if lend else None)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
    assert ("embed_tokens.weight" in names) is not (lend or "dflash 1+N" in name)
    again = load_drafter(tmp_path, target=target)
    assert again.config == drafter.config
    assert same(again, drafter)
    if (
        isinstance(again, EagleDrafter)
        and isinstance(drafter, EagleDrafter)
        and drafter.draft_ids_W is not None
    ):
        assert torch.equal(again.draft_ids_W, drafter.draft_ids_W)  # type: ignore[arg-type]


def test_a_folder_without_embedding_needs_its_target(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(drafter_for(target, BLOCK), tmp_path, {}, torch.float32, lender=target)
    with pytest.raises(
        CheckpointError, match=r"no embed_tokens\.weight, which is its target's; give the target too"
    ):
        load_drafter(tmp_path)
    other = drafter_for(target, BLOCK)
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the one of"):
        save_drafter(other, tmp_path, {}, torch.float32, lender=target)


@pytest.mark.parametrize("lend", [False, True], ids=["whole", "borrowed"])
def test_embedding_and_head_of_an_opened_drafter_are_the_targets_tensors(
    lend: bool, target: TransformersTarget, tmp_path: Path
) -> None:
    save_drafter(
        drafter_for(target, BLOCK).double(), tmp_path, {}, torch.float64, lender=target if lend else None
    )
    drafter = open_drafter(tmp_path, target)
    assert drafter.embed_tokens.weight.data_ptr() == target.embedding_weight().data_ptr()
    assert drafter.lm_head.weight.data_ptr() == target.head_weight().data_ptr()
    drafter.to(torch.bfloat16)
    # the drafter's own parameter was moved, not the target's
    assert target.head_weight().dtype == torch.float64


def test_zlabs_dflash_is_written_as_their_loaders_expect(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(drafter_for(target, SHAPES["dflash 1+N"]), tmp_path, {}, torch.bfloat16)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["DFlashDraftModel"]
    assert fields["model_type"] == "qwen3"
    assert (fields["block_size"], fields["dflash_config"]) == (
        4,
        {"mask_token_id": 3, "target_layer_ids": [0, 2]},
    )
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "model.safetensors").items()}
    assert "embed_tokens.weight" not in shapes
    assert shapes["fc.weight"] == (32, 64)
    assert {"hidden_norm.weight", "norm.weight", "layers.1.self_attn.q_norm.weight"} <= shapes.keys()


def test_gemma4_folders_have_the_fields_of_their_family(target: TransformersTarget, tmp_path: Path) -> None:
    drafter = drafter_for(target, SHAPES["gemma4"])
    save_drafter(drafter, tmp_path, {}, torch.float32)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["architectures"], fields["model_type"]) == (["Gemma4DSparkModel"], "gemma4_text")
    assert (fields["global_head_dim"], fields["num_global_key_value_heads"], fields["attention_k_eq_v"]) == (
        8,
        2,
        True,
    )
    rope = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10_000.0}
    assert fields["rope_parameters"]["full_attention"] == rope
    assert fields["final_logit_softcapping"] == 5.0
    assert not {"layers.0.self_attn.v_proj.weight"} & load_file(tmp_path / "model.safetensors").keys()
    wide = {"head_dim": 8, "num_key_value_heads": 2}  # as newer Transformers write it
    edit(
        tmp_path,
        global_head_dim=None,
        num_global_key_value_heads=None,
        head_dim=4,
        per_layer_config={"0": wide},
    )
    assert read_config(tmp_path) == drafter.config


def test_zlabs_nested_block_size_is_read(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(drafter_for(target, SHAPES["dflash 1+N"]), tmp_path, {}, torch.float32)
    nested = {"block_size": 6, "mask_token_id": 3, "target_layer_ids": [0, 2]}
    edit(tmp_path, block_size=None, dflash_config=nested)
    assert read_config(tmp_path).block_size == 6
    edit(tmp_path, dflash_config=nested | {"final_logit_softcapping": 20.0})
    assert read_config(tmp_path).soft_cap == 20.0
    edit(tmp_path, dflash_config=nested | {"attention_sink_bias": True})
    with pytest.raises(CheckpointError, match="field 'attention_sink_bias' is True; draftkit runs False"):
        load_drafter(tmp_path, target=target)


def test_portable_eagle3_has_the_layer_ids_of_every_engine(
    target: TransformersTarget, tmp_path: Path
) -> None:
    save_drafter(drafter_for(target, SHAPES["eagle3 reduced"]), tmp_path, {}, torch.bfloat16)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (fields["model_type"], fields["num_hidden_layers"], fields["draft_vocab_size"]) == ("llama", 1, 12)
    assert fields["eagle_aux_hidden_state_layer_ids"] == [1, 3]  # vLLM, llama.cpp: indices of hidden_states
    assert fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2]  # SGLang: outputs
    assert fields["norm_before_residual"] is True
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["lm_head.weight"].shape == (12, 32)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert (tensors["d2t"] + torch.arange(12)).tolist() == list(range(1, 36, 3))
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].nonzero().squeeze(-1).tolist() == list(range(1, 36, 3))
    assert not [n for n in tensors if "q_norm" in n or n.startswith("model.")]


def test_eagle3_with_norms_is_vllms_class_and_deepspecs_on_request(
    target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, SHAPES["eagle3 with norms"])
    save_drafter(drafter, tmp_path / "a", {}, torch.float32)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == [
        "Eagle3Qwen3ForCausalLM"
    ]
    save_drafter(drafter, tmp_path / "b", {}, torch.float32, form="deepspec")
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3Eagle3Model"]
    assert (fields["target_layer_ids"], fields["ttt_length"]) == ([0, 2], 5)
    assert "layers.0.self_attn.k_norm.weight" in load_file(tmp_path / "b" / "model.safetensors")
    again = load_drafter(tmp_path / "b")
    assert again.config == drafter.config
    assert same(again, drafter)


def test_a_reduced_block_drafter_is_what_vllm_reads_and_no_other_form_takes_it(
    target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, SHAPES["dspark reduced"])
    save_drafter(drafter, tmp_path, {}, torch.float32)
    fields, tensors = (
        json.loads((tmp_path / "config.json").read_text()),
        load_file(tmp_path / "model.safetensors"),
    )
    assert (fields["architectures"], fields["draft_vocab_size"]) == (["Qwen3DSparkModel"], 12)
    assert tensors["lm_head.weight"].shape == (12, 32) and tensors["markov_head.markov_w2.weight"].shape == (
        12,
        6,
    )
    assert tensors["markov_head.markov_w1.weight"].shape == (target.info.vocab_size, 6)
    assert (tensors["d2t"] + torch.arange(12)).tolist() == list(range(1, 36, 3))
    with pytest.raises(CheckpointError, match="DeepSpec drafts from the whole vocabulary"):
        save_drafter(drafter, tmp_path / "other", {}, torch.float32, form="deepspec")
    with pytest.raises(ConfigError, match="no engine loads a gemma4 block drafter of a reduced vocabulary"):
        replace(BLOCK, **GEMMA, draft_vocab_size=12)
    one_plus_n = drafter_for(target, replace(BLOCK, **DFLASH, layout="one_plus_n", draft_vocab_size=12))
    save_drafter(one_plus_n, tmp_path / "dflash", {}, torch.float32)  # z-lab's form has no head of its own
    assert json.loads((tmp_path / "dflash" / "config.json").read_text())["architectures"] == [
        "Qwen3DSparkModel"
    ]


@pytest.mark.parametrize("name", ["eagle3", "eagle3 reduced", "dspark reduced", "dflash 1+N"])
def test_a_form_that_cannot_hold_the_drafter_says_so(
    name: str, target: TransformersTarget, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="DeepSpec"):
        save_drafter(drafter_for(target, SHAPES[name]), tmp_path, {}, torch.float32, form="deepspec")
    with pytest.raises(CheckpointError, match="choose one of portable, deepspec"):
        save_drafter(drafter_for(target, SHAPES[name]), tmp_path, {}, torch.float32, form="gguf")
    assert not list(tmp_path.iterdir())


def test_eagle3_layers_come_from_wherever_they_are_named(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(drafter_for(target, EAGLE), tmp_path, {}, torch.float32)
    edit(tmp_path, eagle_aux_hidden_state_layer_ids=None)
    assert read_config(tmp_path).feature_layers == (0, 2)
    edit(tmp_path, eagle_config=None, num_target_layers=36, ttt_length=None)
    assert read_config(tmp_path).feature_layers == (1, 17, 32)  # hidden states 2, n // 2, n - 3
    assert read_config(tmp_path).block_size == 7
    edit(tmp_path, num_target_layers=None)
    with pytest.raises(CheckpointError, match="'num_target_layers'; give its target too"):
        read_config(tmp_path)
    assert read_config(tmp_path, 12).feature_layers == (1, 5, 8)


def test_layer_names_of_both_kinds_and_shards_are_read(target: TransformersTarget, tmp_path: Path) -> None:
    drafter = drafter_for(target, SHAPES["eagle3 reduced"])
    save_drafter(drafter, tmp_path, {}, torch.float32)
    tensors = {
        k.replace("midlayer.", "layers.0."): v for k, v in load_file(tmp_path / "model.safetensors").items()
    }
    (tmp_path / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, half in zip(files, halves, strict=True):
        save_file(half, tmp_path / name)
    places = {k: name for name, half in zip(files, halves, strict=True) for k in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(load_drafter(tmp_path), drafter)
    save_file(dict(list(halves[1].items())[1:]), tmp_path / files[1])
    with pytest.raises(CheckpointError, match=f"the shards lack {next(iter(halves[1]))}"):
        load_drafter(tmp_path)
    (tmp_path / files[0]).unlink()
    with pytest.raises(
        CheckpointError, match=r"names model-00001-of-00002\.safetensors, which is not in the folder"
    ):
        load_drafter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "field 'hidden_act' is 'gelu'; draftkit runs 'silu'"),
        ({"attention_bias": True}, "missing midlayer.self_attn.k_proj.bias"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is None"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not known for drafters"),
        ({"norm_before_fc": True}, "missing input_norm.weight"),
        ({"target_hidden_size": 64}, "'target_hidden_size' is 64"),
        ({"hidden_size": "big"}, "'hidden_size' is 'big', must be of type int"),
        ({"intermediate_size": None}, "field 'intermediate_size' is missing"),
        ({"eagle_aux_hidden_state_layer_ids": ["1"]}, "must be a list of integers"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not known; known are Qwen3DSparkModel",
        ),
        ({"speculators_model_type": "mtp"}, "speculators_model_type 'mtp' is not known; known are dspark"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"its weights are quantised \(gptq\)"),
        ({"num_hidden_layers": 2}, "1 layer"),
        ({"draft_vocab_size": 13}, r"d2t is \(12,\); draft_vocab_size 13"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(
    changes: dict[str, Any], message: str, target: TransformersTarget, tmp_path: Path
) -> None:
    save_drafter(drafter_for(target, SHAPES["eagle3 reduced"]), tmp_path, {}, torch.float32)
    edit(tmp_path, **changes)
    with pytest.raises(Exception, match=message) as caught:
        load_drafter(tmp_path)
    assert caught.type.__module__ == "draftkit.errors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 10**6}, r"mask_token_id: 1000000 must lie between 0 and the target's \d+$"),
        ({"mask_token_id": -1}, "mask_token_id: -1 must lie"),
        (
            {"target_layer_ids": [0, 3]},
            r"feature_layers: \[0, 3\] must be ascending and distinct, from 0 to 2",
        ),
        ({"target_layer_ids": [-1, 2]}, r"feature_layers: \[-1, 2\]"),
        ({"num_key_value_heads": 0}, "num_kv_heads: 0 must be 1 or more"),
    ],
)
def test_a_number_outside_its_range_is_named_with_the_file(
    changes: dict[str, Any], message: str, target: TransformersTarget, tmp_path: Path
) -> None:
    """Ids that nothing refuses reach C++, where they are addresses."""
    save_drafter(drafter_for(target, BLOCK), tmp_path, {}, torch.float32)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path / 'config.json'}: drafter\.{message}"):
        read_config(tmp_path)


def test_missing_unknown_and_pickled_weights_are_named(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(drafter_for(target, SHAPES["eagle3 reduced"]), tmp_path, {}, torch.float32)
    (tmp_path / "draftkit.json").unlink()  # as in folders of others, which say no sha256
    path, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != "d2t"}, "d2t is missing"),
        (
            tensors | {"midlayer.self_attn.q_norm.weight": torch.ones(8)},
            r"unknown midlayer\.self_attn\.q_norm\.weight",
        ),
        ({k: v for k, v in tensors.items() if k != "norm.weight"}, r"missing norm\.weight"),
        (tensors | {"d2t": tensors["d2t"] + 10**6}, "distinct ids below"),
    ):
        save_file(changed, path)
        with pytest.raises(Exception, match=message) as caught:
            load_drafter(tmp_path)
        assert caught.type.__module__ == "draftkit.errors"
    (tmp_path / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="mask_embedding"):
        load_drafter(tmp_path)
    (tmp_path / "mask_embedding.pt").unlink()
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled; convert them to safetensors"):
        load_drafter(tmp_path)


def test_a_head_that_is_not_the_targets_is_trained_against_the_targets(
    target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, EAGLE)
    save_drafter(drafter, tmp_path / "same", {}, torch.float32)
    drafter.lm_head.weight.data[0, 0] += 1
    save_drafter(drafter, tmp_path / "other", {}, torch.float32)
    same, other = (load_drafter(tmp_path / name, target=target) for name in ("same", "other"))
    assert isinstance(same, EagleDrafter) and isinstance(other, EagleDrafter)
    assert same.target_head_VH is None
    assert other.target_head_VH is not None
    assert torch.equal(other.target_head_VH, target.head_weight().float())


def test_a_drafter_drafts_the_same_after_a_trip_through_its_folder(
    target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = eagle_for(target, draft_vocab_size=100)
    save_drafter(drafter, tmp_path, {}, torch.float64, lender=target)
    again = load_drafter(tmp_path, torch.float64, target)
    for sampling in (Sampling(0.0), Sampling(1.0)):
        one, other = (decode(target, d, [9, 9, 9], sampling, 20, seed=3) for d in (drafter, again))
        assert one.rounds == other.rounds
        assert one.tokens == other.tokens


def test_weights_with_a_flipped_bit_are_refused_by_their_sha256(
    target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, SHAPES["eagle3"])
    save_drafter(drafter, tmp_path, {}, torch.float32)
    weights, good = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    weights.write_bytes(good[:-3] + bytes([good[-3] ^ 4]) + good[-2:])
    with pytest.raises(CheckpointError, match=rf"^{weights}: is damaged \(another sha256"):
        load_drafter(tmp_path)
    (tmp_path / "draftkit.json").unlink()  # as in folders of others
    load_drafter(tmp_path)
    save_drafter(drafter, tmp_path, {}, torch.bfloat16)  # weights that are written anew bring their own
    load_drafter(tmp_path)


def test_provenance_is_json_also_when_a_number_is_none(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(
        drafter_for(target, BLOCK), tmp_path, {"validation": {"decoded": float("nan")}}, torch.float32
    )
    assert "NaN" not in (tmp_path / "draftkit.json").read_text()
    assert read_provenance(tmp_path)["validation"] == {"decoded": None}


def test_a_disk_that_does_not_take_a_file_is_one_line_with_its_name(
    target: TransformersTarget, tmp_path: Path
) -> None:
    """A limit on the size of files is to a writer what a full disk is."""
    drafter, traces = drafter_for(target, BLOCK), made_traces()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in (
        ("model.safetensors.partial", lambda: save_drafter(drafter, tmp_path, {}, torch.float32)),
        (
            "state.new/state.safetensors",
            lambda: write_folder(tmp_path / "state", {"x": torch.zeros(10_000)}, {}),
        ),
        ("traces.partial", lambda: save_traces(traces, tmp_path / "traces")),
        ("text", lambda: write_text(tmp_path / "text", "x" * 10_000)),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            with pytest.raises(
                OSError, match=rf"^{tmp_path / name}: cannot be written \(.*; make room"
            ) as caught:
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(str(caught.value).splitlines()) == 1


def test_export_writes_another_form_dtype_and_size(
    target_folder: Path, target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, SHAPES["eagle3 with norms"])
    save_drafter(drafter, tmp_path / "a", {"target_fingerprint": target.info.fingerprint}, torch.float32)
    save_drafter(drafter, tmp_path / "b16", {}, torch.bfloat16)
    runner, base = CliRunner(), ["export", "-d", str(tmp_path / "a")]
    done = runner.invoke(
        cli.app, [*base, "-o", str(tmp_path / "b"), "--form", "deepspec", "--dtype", "float32"]
    )
    assert done.exit_code == 0, done.output
    assert same(load_drafter(tmp_path / "b"), drafter)
    done = runner.invoke(
        cli.app, [*base, "-o", str(tmp_path / "c"), "--target", str(target_folder), "--borrow"]
    )
    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    assert not {"embed_tokens.weight", "lm_head.weight"} & tensors.keys()
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    note = json.loads((tmp_path / "c" / "draftkit.json").read_text())
    assert (note["algorithm"], note["target_fingerprint"]) == ("eagle3", target.info.fingerprint)
    # a target of more bits than the drafter saved
    lent = ["--target", str(target_folder), "--borrow", "--dtype", "float32"]
    again = runner.invoke(cli.app, ["export", "-d", str(tmp_path / "b16"), "-o", str(tmp_path / "e"), *lent])
    assert again.exit_code == 0, again.output or again.exception
    assert (
        not {"embed_tokens.weight", "lm_head.weight"} & load_file(tmp_path / "e" / "model.safetensors").keys()
    )
    weights = tmp_path / "b" / "model.safetensors"
    before = weights.read_bytes()
    for arguments, message in (
        (["-o", str(tmp_path / "b")], f"{weights} is there; choose another place, or give --overwrite"),
        (["-o", str(tmp_path / "a")], "the drafter's own folder"),
        (["-o", str(tmp_path / "d"), "--borrow"], "needs the --target"),
        (["-o", str(tmp_path / "d"), "--dtype", "int8"], "choose one of float32"),
        (["-o", str(tmp_path / "d"), "--form", "gguf"], "choose one of portable"),
    ):
        assert message in str(runner.invoke(cli.app, [*base, *arguments]).exception)
    assert not list((tmp_path / "d").glob("*")) and weights.read_bytes() == before
    done = runner.invoke(cli.app, [*base, "-o", str(tmp_path / "b"), "--overwrite"])
    assert done.exit_code == 0 and weights.read_bytes() != before
