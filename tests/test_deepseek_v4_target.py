"""DeepSeek-V4 as a target: logits, taps, memory, and checkpoints with DeepSeek's own names and
numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from draftkit.config import load_recipe
from draftkit.errors import TargetError
from draftkit.feature_stages import run_capture
from draftkit.target.check import check_target
from draftkit.target.deepseek_v4 import Shards, place_of
from draftkit.target.deepseek_v4_tensors import checkpoint_tensors, draft_tensors, total_bytes, total_weights
from draftkit.target.fp8_fp4 import FP4_VALUES, dequantise_fp4, dequantise_fp8, quantise_fp4, quantise_fp8
from draftkit.target.interface import TargetInfo
from draftkit.target.loading import load_target
from draftkit.target.shards import tensor_places
from draftkit.target.transformers import TransformersTarget, check_taps
from draftkit.target.weights import TargetFiles
from support.deepseek_v4 import tiny_target
from tools.tiny_v4 import tiny_model, write_checkpoint
from tools.v4_configs import FLASH, PRO, TINY

TOKENS = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(5))
LAST = (2, 3, 4)


def test_the_tensors_of_the_released_checkpoints_are_counted_from_their_configurations() -> None:
    for raw, count, billions, weights in ((FLASH, 72_317, 166.88, 19.85), (PRO, 149_782, 892.73, 77.50)):
        tensors = checkpoint_tensors(raw)
        assert len(tensors) == count
        assert round(total_bytes(tensors) / 1e9, 2) == billions
        assert round(total_weights(draft_tensors(raw)) / 1e9, 2) == weights
    assert checkpoint_tensors(FLASH)["mtp.0.main_proj.weight"].shape == (4096, 12288)
    assert checkpoint_tensors(PRO)["mtp.2.confidence_head.proj.weight"].shape == (1, 7680)
    preview = {k: v for k, v in FLASH.items() if not k.startswith("dspark_")}
    assert draft_tensors(preview) == {}


def test_logits_are_those_of_transformers_and_taps_the_mean_of_the_streams() -> None:
    target = tiny_target()
    check_target(target)
    read = target.forward(TOKENS, None, LAST)
    streams: dict[int, Tensor] = {}
    for layer in LAST:
        target.model.model.layers[layer].register_forward_hook(
            lambda module, inputs, output, layer=layer: streams.__setitem__(layer, output)
        )
    with torch.no_grad():
        wanted = target.model(TOKENS).logits
    torch.testing.assert_close(target.logits(read.last_hidden_BTH), wanted, atol=1e-5, rtol=0)
    means = torch.cat([streams[layer].mean(2) for layer in LAST], -1)
    torch.testing.assert_close(read.features_BTF, means)
    first = torch.cat([streams[layer][:, :, 0] for layer in LAST], -1)
    assert float((means - first).abs().max()) > 0.1, "the streams are all alike: this test shows nothing"
    norm, collapse = target.model.model.norm, target.model.model.hc_head
    torch.testing.assert_close(norm(collapse(streams[4])), read.last_hidden_BTH)


def test_reading_goes_on_from_every_place_of_a_pass_that_was_taken_back() -> None:
    """Windows of 8 and entries of 4 and 6 tokens end within the passes."""
    target = tiny_target(heavy=6)
    whole = target.forward(TOKENS, None, LAST)
    for start in (3, 8, 15, 23):
        for kept in range(7):
            cache = target.new_cache()
            target.forward(TOKENS[:, :start], cache)
            wrong = TOKENS[:, start : start + 6].clone()
            wrong[:, kept:] = 91
            target.forward(wrong, cache)
            cache.crop(start + kept)
            assert cache.length == start + kept
            rest = target.forward(TOKENS[:, start + kept :], cache, LAST)
            torch.testing.assert_close(
                rest.features_BTF, whole.features_BTF[:, start + kept :], atol=2e-4, rtol=1e-3
            )


def test_what_stays_of_a_pass_is_read_with_the_next_one() -> None:
    """Round after round of six tokens of which few stay: answers as from one reading, and a pass for each
    round, with one more now and then so that what waits does not grow."""
    target = tiny_target(heavy=6)
    whole = target.forward(TOKENS, None, LAST)
    lengths: list[int] = []
    target.model.model.layers[0].register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    cache, at = target.new_cache(), 3
    target.forward(TOKENS[:, :at], cache)
    for kept in (1, 2, 1, 1, 3, 1, 1, 1, 2, 1, 1):
        tokens = TOKENS[:, at : at + 6].clone()
        tokens[:, kept:] = 91
        read = target.forward(tokens, cache, LAST)
        torch.testing.assert_close(
            read.features_BTF[:, :kept], whole.features_BTF[:, at : at + kept], atol=2e-4, rtol=1e-3
        )
        assert read.last_hidden_BTH.shape[1] == 6
        cache.crop(at + kept + 1)
        cache.crop(at + kept)  # a second time, further back
        at += kept
    assert max(lengths) <= 12 and len(lengths) <= 1 + 11 + 2, lengths
    with pytest.raises(TargetError, match="can go back to"):
        cache.crop(1)


def test_padding_is_read_on_the_right_alone() -> None:
    target = tiny_target()
    rows = torch.cat([TOKENS, torch.cat([TOKENS[:, :25], torch.zeros(1, 15, dtype=torch.int64)], 1)])
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 25:] = 0
    read = target.forward(rows, None, LAST, mask)
    alone = target.forward(TOKENS[:, :25], None, LAST)
    torch.testing.assert_close(read.features_BTF[1, :25], alone.features_BTF[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(TargetError, match="pad on the right, without a cache"):
        target.forward(rows.flip(1), None, (), mask.flip(1))
    with pytest.raises(TargetError, match="pad on the right, without a cache"):
        target.forward(rows, target.new_cache(), (), mask)


def test_a_family_of_several_streams_without_a_rule_is_refused_before_it_is_captured() -> None:
    target = tiny_target()
    other = TransformersTarget(tiny_model(), replace(target.info, family="new"))
    with pytest.raises(TargetError, match=r"layer 1 of family new gives \[1, 1, 4, 64\], no hidden states"):
        check_taps(other, (1,))
    check_taps(target, LAST)
    with pytest.raises(TargetError, match="choose distinct ids between 0 and 4"):
        check_taps(target, (5,))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def test_a_checkpoint_with_deepseeks_names_is_the_same_model(model: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ds", model)
    target = load_target(str(folder))
    assert target.info.family == "deepseek_v4" and target.info.stop_token_ids == (1,)
    with torch.no_grad():
        assert torch.equal(target.model(TOKENS).logits, model(TOKENS).logits)
    files = TargetFiles(str(folder))
    assert torch.equal(files.head_weight(), model.lm_head.weight)
    assert torch.equal(files.embedding_weight(), model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "hf")  # the names that Transformers writes
    again = load_target(str(tmp_path / "hf"))
    with torch.no_grad():
        assert torch.equal(again.model(TOKENS).logits, model(TOKENS).logits)
    spread = load_target(str(folder), spread="layers")  # over all devices, here one
    with torch.no_grad():
        assert torch.equal(spread.model(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(TargetError, match=r"give target\.spread: layers"):
        load_target(str(folder), spread="tensors")
    half = load_target(str(folder), dtype="bfloat16").model
    assert half.model.norm.weight.dtype == half.model.layers[0].attn_hc.fn.dtype == torch.float32
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_quantised_weights_are_what_a_table_says(model: Any, tmp_path: Path) -> None:
    """Bit for bit against a decoder that knows the formats' bits, through the loader."""
    folder = write_checkpoint(tmp_path, model, quantised=True)
    target = load_target(str(folder))
    state = target.model.state_dict()
    shards = Shards("t", tensor_places(str(folder)))
    stored = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    for name in ("layers.2.attn.wq_b", "layers.1.ffn.experts.3.w2", "layers.4.attn.indexer.wq_b"):
        weight, scale = stored[f"{name}.weight"], stored[f"{name}.scale"]
        place = place_of(f"{name}.weight")
        assert torch.equal(place.part_of(state[place.name]), _by_table(weight, scale)), name
    assert shards.found["layers.1.ffn.experts.3.w2.weight"].dtype == "I8"
    exact = tiny_model()
    with torch.no_grad():
        difference = (target.model(TOKENS).logits - exact(TOKENS).logits).abs().mean()
        assert 0 < float(difference) < float(exact(TOKENS).logits.std())


def _by_table(weight: Tensor, scale: Tensor) -> Tensor:
    """Element by element, from the bits."""
    exponent = 2.0 ** (scale.view(torch.uint8).double() - 127)
    if weight.dtype == torch.int8:
        codes = torch.stack([weight.view(torch.uint8) & 15, weight.view(torch.uint8) >> 4], -1).flatten(-2)
        signed = [*FP4_VALUES, *(-v for v in FP4_VALUES)]
        rows = [
            [signed[int(c)] * float(exponent[r, i // 32]) for i, c in enumerate(row)]
            for r, row in enumerate(codes)
        ]
        return torch.tensor(rows, dtype=torch.float32)
    found = torch.zeros(weight.shape, dtype=torch.float64)
    for (r, c), byte in zip(
        torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist(),
        weight.view(torch.uint8).flatten().tolist(),
        strict=True,
    ):
        power, fraction = byte >> 3 & 15, byte & 7
        size = 2.0 ** (power - 7) * (1 + fraction / 8) if power else 2.0**-6 * fraction / 8
        found[r, c] = (-1) ** (byte >> 7) * size * float(exponent[r // 128, c // 128])
    return found.float()


def test_every_code_of_both_formats_comes_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    packed, scales = codes.view(16, 16).view(torch.int8), torch.full((16, 1), 8.0).to(torch.float8_e8m0fnu)
    assert torch.equal(dequantise_fp4(packed, scales), _by_table(packed, scales))
    finite = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)[None]
    eighth = torch.full((1, 2), 0.125).to(torch.float8_e8m0fnu)
    eight_bits = finite.view(torch.float8_e4m3fn)
    assert torch.equal(dequantise_fp8(eight_bits, eighth), _by_table(eight_bits, eighth))
    torch.manual_seed(0)
    weight = torch.randn(130, 192)
    for quantise, dequantise, worst in (
        (quantise_fp8, dequantise_fp8, 0.07),
        (quantise_fp4, dequantise_fp4, 0.3),
    ):
        once = dequantise(*quantise(weight))
        assert float((once - weight).abs().max() / weight.abs().max()) < worst
        assert torch.equal(dequantise(*quantise(once)), once)


def _edit(folder: Path, changed: dict[str, Any]) -> None:
    """Put tensors in place of others; None removes one."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, value in changed.items():
        file = folder / index["weight_map"].get(name, "model-00001-of-00002.safetensors")
        tensors = load_file(file)
        tensors.pop(name, None)
        index["weight_map"].pop(name, None)
        if value is not None:
            tensors[name] = value
            index["weight_map"][name] = file.name
        save_file(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_everything_that_does_not_fit_is_named_at_once(model: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model, quantised=True)
    _edit(
        folder,
        {
            "layers.0.attn.wq_a.weight": None,
            "layers.2.ffn.experts.1.w1.scale": None,
            "layers.1.attn.attn_sink": torch.zeros(5),
            "layers.3.attn.spare": torch.zeros(2),
        },
    )
    with pytest.raises(TargetError) as caught:
        load_target(str(folder))
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        "missing layers.0.attn.wq_a.weight",
        "scales missing: layers.2.ffn.experts.1.w1.scale",
        "unexpected layers.3.attn.spare",
        "layers.1.attn.attn_sink is F32 [5], must be",
    ):
        assert part in said, said


def test_shards_that_are_not_there_or_cut_short_are_named(model: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TargetError, match=r"model-00002-of-00002.safetensors: is damaged"):
        load_target(str(folder))
    shard.unlink()
    with pytest.raises(TargetError, match=r"model-00002-of-00002.safetensors is missing"):
        load_target(str(folder))


def test_another_generation_is_refused_by_name(model: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model, TINY | {"model_type": "deepseek_v41"})
    for load in (load_target, TargetFiles):
        with pytest.raises(TargetError, match=r"is DeepSeek-V4\.1, another architecture than DeepSeek-V4"):
            load(str(folder))


def test_gemma_3n_runs_and_is_refused_before_it_is_captured(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(
        "gemma3n_text",
        **sizes,
        vocab_size=300,
        intermediate_size=48,
        num_key_value_heads=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=300,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
        pad_token_id=0,
    )
    info = TargetInfo("g", None, "f", 300, 32, 4, (), 256, "gemma3n_text")
    target = TransformersTarget(AutoModelForCausalLM.from_config(config), info)
    check_target(target)
    with pytest.raises(TargetError, match=r"layer 1 of family gemma3n_text gives \[4, 1, 1, 32\]"):
        check_taps(target, (1,))
    recipe = load_recipe("tiny-dspark", ["drafter.feature_layers=[1,2]"])
    with pytest.raises(TargetError, match="no hidden states"):
        run_capture(target, None, recipe, [], tmp_path / "features")
    assert not (tmp_path / "features").exists()
