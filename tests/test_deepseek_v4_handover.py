"""A draft module put into a DeepSeek-V4 checkpoint or beside it, and what can be wrong with one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from draftkit.cli import app
from draftkit.doctor.deepseek_v4 import check_checkpoint, check_encoder, check_pair
from draftkit.doctor.engine import check_engine
from draftkit.draft.checkpoint import open_drafter, save_drafter
from draftkit.errors import CheckpointError, TargetError
from draftkit.handover.deepseek_v4 import commands, write_bundled, write_subfolder
from draftkit.handover.deepseek_v4_gguf import refusals
from draftkit.handover.engines import engine_named
from draftkit.target.deepseek_v4_encoder import generation
from draftkit.target.deepseek_v4_tensors import checkpoint_tensors
from draftkit.target.fp8_fp4 import dequantise_fp4, quantise_fp4
from draftkit.target.loading import load_target
from draftkit.target.weights import TargetFiles
from support.deepseek_v4 import tiny_drafter, tiny_shape
from tools.tiny_v4 import tiny_model, write_checkpoint
from tools.v4_configs import TINY

INDEX = "model.safetensors.index.json"
TOKENS = torch.arange(20)[None]


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


@pytest.mark.parametrize("quantised", [False, True])
def test_a_module_takes_the_place_of_the_released_one(quantised: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_model(), quantised=quantised, shards=3)
    target, before, config = load_target(str(folder)), _files(folder), (folder / "config.json").read_text()
    drafter = tiny_drafter(target)
    made = write_bundled(drafter, folder)
    assert {n: b for n, b in _files(folder).items() if n in before} == before, (
        "a file that was there has changed"
    )
    assert (folder / "config.json").read_text() == config
    assert check_checkpoint(folder) == []
    again = load_target(str(folder))
    with torch.no_grad():
        assert torch.equal(again.model(TOKENS).logits, target.model(TOKENS).logits)
    found = open_drafter(folder, again).state_dict()
    wanted = drafter.state_dict()["stages.2.mlp.experts.down_proj"][1]
    wanted = dequantise_fp4(*quantise_fp4(wanted)) if quantised else wanted.bfloat16().float()
    assert torch.equal(found["stages.2.mlp.experts.down_proj"][1], wanted)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    for file in set(places.values()):  # vLLM reads whole files: no old tensor may lie in one that is named
        assert set(load_file(folder / file)) == {n for n, f in places.items() if f == file}
    assert made.added and made.bytes > 0
    second = write_bundled(drafter, folder)  # and once more
    assert not set(second.added) & set(made.added)
    assert open_drafter(folder, again).state_dict().keys() == found.keys()


def test_a_checkpoint_without_a_module_gets_one_and_its_keys(tmp_path: Path) -> None:
    preview = {k: v for k, v in TINY.items() if not k.startswith("dspark_")} | {
        "compress_ratios": [0, 0, 4, 128, 4, 0]
    }
    folder = write_checkpoint(tmp_path, tiny_model(), preview)
    assert "has no dspark_* keys" in check_checkpoint(folder)[0]
    drafter = tiny_drafter(load_target(str(folder)))
    write_bundled(drafter, folder)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["compress_ratios"] == TINY["compress_ratios"] and raw["dspark_block_size"] == 5
    assert open_drafter(folder, TargetFiles(str(folder))).config == drafter.config
    assert check_checkpoint(folder) == []


def test_a_folder_for_sglang_stands_beside_an_untouched_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "t", tiny_model(), quantised=True)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    target = load_target(str(folder))
    drafter = tiny_drafter(target)
    save_drafter(drafter, tmp_path / "own", {}, torch.float32)
    result = CliRunner().invoke(
        app, ["export", "-d", str(tmp_path / "own"), "-o", str(folder), "--form", "dspark"]
    )
    assert result.exit_code == 0, result.output
    assert (
        "--speculative-num-draft-tokens 6" in result.output and '"num_speculative_tokens":5' in result.output
    )
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert open_drafter(folder / "dspark", target).config == drafter.config
    assert "--spec-draft-n-max 5" in commands("x", drafter.config)["llama.cpp"]


def test_what_cannot_take_the_module_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "t", tiny_model())
    drafter = tiny_drafter(load_target(str(folder)))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    raw = json.loads((folder / "config.json").read_text())
    for config, told in (
        (raw | {"model_type": "deepseek_v41"}, "is a deepseek_v41 checkpoint"),
        (raw | {"n_routed_experts": 8}, "n_routed_experts is 8, the drafter's is 4"),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=told):
            write_bundled(drafter, folder)
    (folder / "config.json").write_bytes(before["config.json"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(CheckpointError, match="give the folder of the sharded DeepSeek-V4 checkpoint"):
        write_subfolder(drafter, tmp_path)
    save_drafter(drafter, tmp_path / "own", {}, torch.float32)
    given = ["-d", str(tmp_path / "own"), "-o", str(tmp_path / "no"), "--form", "bundled"]
    result = CliRunner().invoke(app, ["export", *given])
    assert isinstance(result.exception, TargetError) and "has no config.json" in str(result.exception)


CONVERTER = """
import argparse, json, pathlib, sys
from safetensors.torch import load_file
parser = argparse.ArgumentParser()
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--dspark", action="store_true")
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--target-model-dir", type=pathlib.Path)
given = parser.parse_args()
if not (given.target_model_dir / "tokenizer.json").exists():
    given.outfile.write_text("half")
    sys.exit("no tokenizer in the target's folder")
raw = json.loads((given.folder / "config.json").read_text())
tensors = {k: v for f in given.folder.glob("*.safetensors") for k, v in load_file(f).items()}
told = {k: [str(v.dtype), list(v.shape)] for k, v in tensors.items()}
given.outfile.write_text(json.dumps({"dspark": given.dspark, "raw": raw, "tensors": told}))
"""


def test_llama_cpps_converter_is_given_the_one_form_that_it_knows(tmp_path: Path) -> None:
    """What it makes of it is shown by `python -m checks.deepseek_v4_gguf`, with the real one."""
    folder = write_checkpoint(tmp_path / "t", tiny_model())  # floats: the module is quantised all the same
    drafter = tiny_drafter(load_target(str(folder)))
    save_drafter(drafter, tmp_path / "own", {}, torch.float32)
    script = tmp_path / "convert_hf_to_gguf.py"
    words = [
        "export",
        "-d",
        str(tmp_path / "own"),
        "-o",
        str(tmp_path / "out" / "d.gguf"),
        "--target",
        str(folder),
    ]

    def told(*more: str) -> str:
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code, result.output
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
        return str(result.exception)

    for engine in ("vllm", "sglang", "mlx"):
        assert "--form bundled" in told("--for", engine)
    assert "needs --converter" in told("--for", "llama.cpp")
    assert "give llama.cpp's convert_hf_to_gguf.py" in told("--for", "llama.cpp", "--converter", str(script))
    script.write_text(CONVERTER)
    given = ("--for", "llama.cpp", "--converter", str(script))
    assert "failed: no tokenizer in the target's folder" in told(*given)
    (folder / "tokenizer.json").write_text("{}")
    result = CliRunner().invoke(app, [*words, *given])
    assert result.exit_code == 0, result.output
    assert f"-md {tmp_path / 'out' / 'd.gguf'} --spec-type draft-dspark" in result.output
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["d.gguf"]
    made = json.loads((tmp_path / "out" / "d.gguf").read_text())
    assert made["dspark"] and made["raw"]["dspark_block_size"] == 5
    assert made["raw"]["architectures"] == ["DeepseekV4ForCausalLM"]
    assert made["tensors"]["mtp.2.ffn.experts.3.w2.weight"] == ["torch.int8", [64, 16]]
    assert made["tensors"].keys() == {n for n in checkpoint_tensors(TINY) if n.startswith("mtp.")}
    odd = dataclasses.replace(drafter.config, intermediate_size=40, confidence_with_markov=False)
    assert [r.split(",")[0] for r in refusals(odd)] == [
        "it reads a confidence head with the Markov embedding alone",
        "expert size 40 is no multiple of 32",
    ]


def test_what_goes_wrong_in_practice_is_found(tmp_path: Path) -> None:
    names = ("a/DeepSeek-V4-Flash", "b/DeepSeek-V4-Pro-DSpark", "c/DeepSeek-V4-Flash-0731", "d/other")
    assert [generation(n) for n in names] == ["preview", "preview", "official", None]
    assert "acceptance collapses" in check_pair(names[2], names[0])[0]
    assert check_pair(names[0], names[1]) == check_pair(names[2], None) == []
    assert "was trained with the preview one" in check_encoder(names[0], {"encoder": "official"})[0]
    assert check_encoder(names[2], {"encoder": "official"}) == check_encoder(names[0], {}) == []
    for name in ("vllm", "sglang", "llama.cpp"):
        findings, facts = check_engine(engine_named(name), tiny_shape(), tmp_path)
        assert findings == [] and facts, "the released module is sound"
    folder = write_checkpoint(tmp_path, tiny_model(), quantised=True)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop("mtp.0.attn.wkv.scale")
    (folder / INDEX).write_text(json.dumps(index))
    assert "scales missing: mtp.0.attn.wkv.scale" in check_checkpoint(folder)[0]
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "deepseek_v41"}))
    assert "DeepSeek-V4.1" in check_checkpoint(folder)[0]
