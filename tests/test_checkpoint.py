"""Drafter folders: what is saved comes back as it was, and mistakes are named."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftkit.decode import decode
from draftkit.draft.checkpoint import load_drafter, open_drafter, read_config, save_drafter
from draftkit.draft.checkpoint_files import read_provenance
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.errors import CheckpointError
from draftkit.ops.sampling import Sampling
from draftkit.output import write_text
from draftkit.schedule.traces import save_traces
from draftkit.target.transformers import TransformersTarget
from draftkit.train.folder import write_folder
from support.checkpoints import SHAPES, drafter_for, edit, same
from support.drafters import BLOCK_CONFIG as BLOCK
from support.drafters import EAGLE_CONFIG as EAGLE
from support.drafters import eagle_for
from support.traces import made_traces


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
