"""Sizes in a target's configuration that its weights cannot have are one line before they take memory."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import gguf
import pytest

from draftkit.errors import TargetError
from draftkit.target.config_sizes import check_counts, check_numbers, held_in, may_be_larger
from draftkit.target.gguf import unpacked
from draftkit.target.loading import load_target
from draftkit.target.place import EMBEDDED
from support.gguf_file import small_llama, write_gguf
from support.targets import FAMILIES, make_family

VOCAB = 4096  # of the tokenizer

HUGE = {  # a field of config.json, and what is said; by family
    ("llama", "num_hidden_layers", 10**9): "num_hidden_layers 1,000,000,000, and the",
    ("llama", "hidden_size", 10**9): "hidden_size 1,000,000,000, and the",
    ("llama", "vocab_size", 10**9): "vocab_size 1,000,000,000, and the",
    ("llama", "num_hidden_layers", 30): "describes a model of",
    ("llama", "intermediate_size", 10**9): "describes a model of",
    ("llama", "intermediate_size", 10**5): "describes a model of",
    ("llama", "head_dim", 10**6): "describes a model of",
    ("qwen3_moe", "num_local_experts", 10**9): "num_local_experts 1,000,000,000, and the",
    ("qwen3_moe", "num_local_experts", 80): "describes a model of",
    ("qwen3_moe", "moe_intermediate_size", 10**6): "describes a model of",
}


@pytest.mark.parametrize(("family", "field", "value"), HUGE)
def test_sizes_that_the_weights_cannot_have_are_named_before_they_take_memory(
    family: str, field: str, value: int, tmp_path: Path
) -> None:
    make_family(family).model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TargetError, match=HUGE[family, field, value]) as error:
        load_target(str(tmp_path))
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 100_000, "kB"


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_every_family_are_those_of_its_weights(family: str, tmp_path: Path) -> None:
    make_family(family).model.save_pretrained(tmp_path)
    config, held = json.loads((tmp_path / "config.json").read_text()), held_in(tmp_path)
    assert held is not None
    check_counts("it", config, held)
    check_numbers("it", config, sum(p.numel() for p in make_family(family).model.parameters()), held)


def test_a_configuration_alone_may_have_no_more_parts_than_can_be_described() -> None:
    check_counts("it", {"num_hidden_layers": 64, "num_experts": 512}, None)
    with pytest.raises(TargetError, match="has 64000000000 layers and experts of layers"):
        check_counts("it", {"text_config": {"num_hidden_layers": 64, "num_experts": 10**9}}, None)


def test_no_skeleton_is_made_of_a_plain_model_whose_sizes_fit(target_folder: Path) -> None:
    """It takes a quarter of a second for thirty layers."""
    config, held = json.loads((target_folder / "config.json").read_text()), held_in(target_folder)
    assert held is not None and not may_be_larger(config, held)
    assert may_be_larger(config | {"intermediate_size": 5000}, held)


def test_metadata_of_a_gguf_file_that_its_tensors_cannot_have_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf.GGUFWriter, "add_block_count", add_huge_count)
    write_gguf(tmp_path / "huge.gguf", small_llama(VOCAB), EMBEDDED)
    with pytest.raises(TargetError, match=r"its metadata has block_count 1,000,000,000, and the"):
        unpacked(tmp_path / "huge.gguf")


def add_huge_count(writer: gguf.GGUFWriter, length: int) -> None:
    """A billion layers, whatever was asked."""
    writer.add_uint32(f"{writer.arch}.block_count", 10**9)
