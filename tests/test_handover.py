"""What is handed to an engine is what that engine loads, and what it cannot load is refused by name."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from draftkit import cli
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import load_drafter, new_drafter, open_drafter, save_drafter
from draftkit.draft.drafter import DrafterConfig
from draftkit.errors import CheckpointError, ConfigError
from draftkit.handover.engines import ENGINES
from draftkit.handover.export import hand_over
from draftkit.handover.full_vocabulary import with_full_vocabulary
from draftkit.target.place import EMBEDDED
from draftkit.target.weights import TargetFiles
from support.drafters import BLOCK_CONFIG, EAGLE_CONFIG
from support.faulty import faulty, reduced
from support.gguf_file import small_llama, write_gguf

DRAFTER = EMBEDDED / "drafter"
SHAPES = {
    "dspark": BLOCK_CONFIG,
    "gated head": replace(BLOCK_CONFIG, head="gated"),
    "Llama's block": replace(BLOCK_CONFIG, style="llama"),
    "DFlash from the anchor": replace(BLOCK_CONFIG, head="none", markov_rank=0, confidence=False),
    "DFlash 1+N": replace(BLOCK_CONFIG, head="none", markov_rank=0, confidence=False, layout="one_plus_n"),
    "reduced": replace(BLOCK_CONFIG, draft_vocab_size=20),
    "EAGLE-3": EAGLE_CONFIG,
    "EAGLE-3 with q/k norms": replace(EAGLE_CONFIG, style="qwen3"),
}
# which of the shapes each engine loads, from its sources (see handover/engines.py)
LOADS = {
    "vllm": {"dspark", "DFlash 1+N", "reduced", "EAGLE-3", "EAGLE-3 with q/k norms"},
    "sglang": {"dspark", "gated head", "DFlash 1+N", "EAGLE-3"},
    "llama.cpp": {"dspark", "DFlash from the anchor", "DFlash 1+N", "reduced"},
    "mlx": {"dspark", "DFlash 1+N", "reduced"},
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_table_says_which_shapes_an_engine_loads(name: str) -> None:
    loads = {shape for shape, config in SHAPES.items() if not ENGINES[name].refusals(config)}
    assert loads == LOADS[name]


@pytest.mark.parametrize("name", ["vllm", "sglang", "mlx"])
def test_a_folder_drafts_as_before_and_comes_with_its_command(tmp_path: Path, name: str) -> None:
    files = TargetFiles("tiny")
    made = hand_over(name, DRAFTER, tmp_path / "handed", "tiny", "float32")
    before, after = open_drafter(DRAFTER, files), open_drafter(made.path, files)
    assert after.config == before.config
    for own, theirs in zip(before.state_dict().values(), after.state_dict().values(), strict=True):
        assert torch.equal(own, theirs)
    words = shlex.split(made.command)
    assert str(made.path) in made.command and "tiny" in words
    if name == "vllm":
        told = json.loads(words[words.index("--speculative-config") + 1])
        assert (told["method"], told["num_speculative_tokens"]) == ("dspark", 7)
    assert any("without" in note or "otherwise" in note or "cost curve" in note for note in made.notes)
    assert made.checked == ENGINES[name].checked


def test_a_reduced_vocabulary_is_expanded_where_the_engine_takes_the_targets_head(tmp_path: Path) -> None:
    files = TargetFiles("tiny")
    folder = faulty(tmp_path / "reduced", reduced(files))
    made = hand_over("sglang", folder, tmp_path / "handed", "tiny", "float32")
    [change] = made.changes
    assert "expanded from 2,048 to all 4,096 tokens" in change and "target's head" in change
    small, whole = open_drafter(folder, files), open_drafter(made.path, files)
    assert isinstance(small, BlockDrafter) and isinstance(whole, BlockDrafter)
    hidden = torch.randn(5, small.config.hidden_size)
    ids = small.draft_ids_W
    assert small.markov_head is not None and whole.markov_head is not None and ids is not None
    previous = small.markov_head.previous(torch.tensor([3, 9, 1, 0, 7]))
    some = small.head().logits(hidden) + small.markov_head.markov_w2(previous)
    every = whole.head().logits(hidden) + whole.markov_head.markov_w2(previous)
    torch.testing.assert_close(every[:, ids], some)
    with pytest.raises(CheckpointError, match="reduced vocabulary"):
        with_full_vocabulary(whole, files)


def gguf_pair(folder: Path, draft_ids: torch.Tensor | None) -> tuple[Path, Path, BlockDrafter]:
    """A small Llama as GGUF, and a drafter for it as a folder."""
    model = small_llama(4096)
    write_gguf(folder / "target.gguf", model, EMBEDDED)
    torch.manual_seed(0)
    config = DrafterConfig(
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=4096,
        feature_layers=(0, 2),
        num_target_layers=4,
        mask_token_id=3,
        block_size=5,
        markov_rank=8,
        rope_theta=5000.0,
        draft_vocab_size=None if draft_ids is None else len(draft_ids),
    )
    head = model.get_output_embeddings().weight
    drafter = new_drafter(config, model.get_input_embeddings().weight, head, draft_ids)
    assert isinstance(drafter, BlockDrafter)
    save_drafter(drafter, folder / "drafter", {}, torch.float32)
    return folder / "target.gguf", folder / "drafter", drafter


@pytest.mark.slow
@pytest.mark.parametrize("ids", [None, torch.arange(1, 4096, 3)], ids=["whole", "reduced"])
def test_a_gguf_holds_the_drafter_as_llama_cpp_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, folder, drafter = gguf_pair(tmp_path, ids)
    made = hand_over("llama.cpp", folder, tmp_path / "handed.gguf", str(target), "float32")
    reader = gguf.GGUFReader(made.path)

    def field(name: str) -> object:
        found = reader.get_field(name)
        assert found is not None, name
        return found.contents()

    assert field("general.architecture") == "dflash"
    assert field("dflash.target_layers") == [1, 3]  # outputs 0 and 2 are inputs 1 and 3
    assert field("dflash.block_size") == 5 and field("dflash.sample_from_anchor") is True
    assert field("dflash.rope.freq_base") == 5000.0 and field("tokenizer.ggml.mask_token_id") == 3
    assert len(reader.get_field("tokenizer.ggml.tokens").data) == 4096
    tensors = {t.name: t for t in reader.tensors}
    own = drafter.state_dict()
    pairs = {
        "blk.1.attn_q_norm.weight": "layers.1.self_attn.q_norm.weight",
        "blk.0.ffn_gate.weight": "layers.0.mlp.gate_proj.weight",
        "fc.weight": "fc.weight",
        "enc.output_norm.weight": "hidden_norm.weight",
        "output_norm.weight": "norm.weight",
        "markov_w2.weight": "markov_head.markov_w2.weight",
        "conf_proj.bias": "confidence_head.proj.bias",
    }
    for theirs, ours in pairs.items():
        values = np.asarray(tensors[theirs].data).view(np.float32).reshape(own[ours].shape)
        assert np.array_equal(values, own[ours].numpy()), theirs
    assert "token_embd.weight" not in tensors  # the target's own
    assert ("output.weight" in tensors) == (ids is not None)
    if ids is not None:
        assert np.asarray(tensors["d2t"].data).tolist() == ids.tolist()  # target ids, not offsets
    assert shlex.split(made.command)[:5] == ["llama-server", "-m", str(target), "-md", str(made.path)]
    assert "draft-dspark" in made.command


def test_bfloat16_is_the_nearest_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, folder, drafter = gguf_pair(tmp_path, None)
    made = hand_over("llama.cpp", folder, tmp_path / "handed.gguf", str(target))
    [fc] = [t for t in gguf.GGUFReader(made.path).tensors if t.name == "fc.weight"]
    assert fc.tensor_type == gguf.GGMLQuantizationType.BF16
    values = gguf.quants.dequantize(fc.data, fc.tensor_type)
    assert np.array_equal(values, drafter.fc.weight.detach().bfloat16().float().numpy())


def test_bad_input_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine 'tgi' is not known, choose one of vllm, sglang"):
        hand_over("tgi", DRAFTER, tmp_path / "x", "tiny")
    with pytest.raises(CheckpointError, match=r"--target tiny: llama\.cpp serves GGUF files"):
        hand_over("llama.cpp", DRAFTER, tmp_path / "x", "tiny")
    with pytest.raises(ConfigError, match="own folder"):
        hand_over("vllm", DRAFTER, DRAFTER, "tiny")
    done = CliRunner().invoke(cli.app, ["export", "-d", str(DRAFTER), "-o", str(tmp_path), "--for", "vllm"])
    assert isinstance(done.exception, ConfigError) and "needs the --target" in str(done.exception)


def test_a_head_that_an_engine_lacks_is_refused_by_its_name(tmp_path: Path) -> None:
    files = TargetFiles("tiny")
    drafter = load_drafter(DRAFTER, target=files)
    assert isinstance(drafter.config, DrafterConfig)
    config = replace(drafter.config, head="gated")
    gated = new_drafter(config, files.embedding_weight(), files.head_weight())
    save_drafter(gated, tmp_path / "gated", {}, torch.float32)
    with pytest.raises(
        CheckpointError, match=r"vllm \(0\.33\.0\) does not run this drafter: it has no gated head"
    ):
        hand_over("vllm", tmp_path / "gated", tmp_path / "out", "tiny")


def test_the_command_line_prints_the_command_of_the_engine(tmp_path: Path) -> None:
    options = [
        "export",
        "-d",
        str(DRAFTER),
        "-o",
        str(tmp_path / "handed"),
        "--for",
        "sglang",
        "--target",
        "tiny",
    ]
    done = CliRunner().invoke(cli.app, options)
    assert done.exit_code == 0, done.output
    assert "--speculative-algorithm DSPARK" in done.output and "0.5.23" in done.output
    again = CliRunner().invoke(cli.app, options)
    assert isinstance(again.exception, ConfigError) and "give --overwrite" in str(again.exception)
    assert CliRunner().invoke(cli.app, [*options, "--overwrite"]).exit_code == 0
