"""`draftkit plan`: bytes against a store that was written, sizes without weights, and a disk that is too
small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV4Config
from typer.testing import CliRunner

from draftkit import feature_stages, stages
from draftkit.cli import app
from draftkit.config import load_recipe
from draftkit.data.conversations import read_conversations
from draftkit.draft.algorithms import algorithm_named
from draftkit.features.estimate import assumed_counts
from draftkit.features.record import RecordForm
from draftkit.plan import plan
from draftkit.plan.drafter import DrafterSizes
from draftkit.plan.target import target_sizes
from support.records import prompts
from tools import v4_configs

QWEN3_4B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
}


def config_folder(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_bytes_are_those_of_the_store_within_one_percent(
    dtype: str, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = tmp_path / "talk.jsonl"
    with talk.open("w") as file:
        for number, prompt in enumerate(prompts(120)):
            answer = "a list holds values " * (1 + number % 9)
            said = [*prompt.as_dicts(), {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"conversation-{number}", "messages": said}) + "\n")
    sets = [f"target.path={target_folder}", "drafter.num_features=2", f"capture.dtype={dtype}"]
    recipe = load_recipe("tiny-dspark", [*sets, "capture.max_length=40"])
    monkeypatch.setattr("draftkit.features.estimate.SAMPLED", 60)
    made = plan.plan(recipe, [talk], (1, 8, 0.5), tmp_path)
    out = tmp_path / "features"
    feature_stages.run_capture(*stages.open_target(recipe), recipe, read_conversations([talk]), out)
    written = sum(p.stat().st_size for p in out.iterdir() if p.is_file())
    planned = made.stages[1]
    assert planned.stage == "capture"
    assert planned.disk_bytes == pytest.approx(written, rel=0.01)
    assert made.counts.conversations == 120


def test_numbers_of_qwen3_4b_need_its_configuration_alone(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "qwen", QWEN3_4B)
    sizes = target_sizes(str(folder), None, "bfloat16")
    assert sizes.parameters == sizes.active == pytest.approx(4.02e9, rel=0.01)
    counts = assumed_counts(1000, 4096, 1.0, 4096)
    form = RecordForm("bfloat16", 5, 2560)
    assert counts.store_bytes(form) / (1000 * 4096) == pytest.approx(30_724, rel=0.001)
    assert counts.store_bytes(RecordForm("fp8", 5, 2560)) / (1000 * 4096) == pytest.approx(15_388, rel=0.001)
    recipe = load_recipe("qwen3-4b-dspark", [f"target.path={folder}"])
    drafter = DrafterSizes.of(recipe, sizes, 5)
    assert algorithm_named("dspark").layers == drafter.layers == 5
    assert drafter.trained == pytest.approx(5 * 100.9e6 + 5 * 2560**2 + 2 * 151936 * 256, rel=0.02)


def test_a_mixture_of_experts_counts_what_one_token_uses(tmp_path: Path) -> None:
    """DeepSeek-V4's configuration at small sizes: 8 experts of which 2 are chosen."""
    small = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    small |= {"head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 16}
    small |= {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "hc_mult": 4}
    small |= {"num_hash_layers": 1, "compress_ratios": [0, 0, 4, 128, 4, 128], "sliding_window": 16}
    small |= {"index_n_heads": 4, "index_head_dim": 16, "max_position_embeddings": 4096}
    DeepseekV4Config(**small).save_pretrained(tmp_path / "v4")
    sizes = target_sizes(str(tmp_path / "v4"), None, "bfloat16")
    experts = 6 * 8 * 3 * 64 * 32
    assert sizes.parameters - sizes.active == experts * 6 // 8
    recipe = load_recipe("tiny-dspark", [f"target.path={tmp_path / 'v4'}", "drafter.feature_layers=[3,4]"])
    made = plan.plan(recipe, [], (10, 100, 0.5), tmp_path)
    per_sample = 4 * 100 + (98 * 2 + 50) * 64 * 2
    assert made.stages[1].disk_bytes == pytest.approx(10 * per_sample, abs=10 * 400)


def test_a_store_that_does_not_fit_is_exit_code_2_and_says_what_fits(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "qwen", QWEN3_4B)
    words = ["plan", "-r", "qwen3-4b-dspark", "--set", f"target.path={folder}", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, "--count", "100000000", "--tokens", "4096", "--json"])
    assert done.exit_code != 0
    told = str(done.exception)
    assert "a store in bfloat16 needs" in told and "what fits:" in told and "conversations" in told
    assert getattr(done.exception, "exit_code", None) == 2
    fits = CliRunner().invoke(app, [*words, "--count", "10", "--tokens", "4096", "--json"])
    assert fits.exit_code == 0, fits.output
    told = json.loads(fits.stdout)
    assert told["fits"] and told["way"].startswith("hybrid")
    assert told["bytes_per_token"]["live"] < 5


def test_a_module_of_one_stage_is_a_third_of_three(tmp_path: Path) -> None:
    folder = tmp_path / "flash"
    v4_configs.main("flash", str(folder))

    def counted(stages: int) -> DrafterSizes:
        recipe = load_recipe("deepseek-v4-flash", [f"target.path={folder}", f"drafter.num_layers={stages}"])
        return DrafterSizes.of(recipe, target_sizes(str(folder), None, "bfloat16"), 3)

    one, three = counted(1), counted(3)
    assert (one.layer, one.experts, one.active) == (three.layer, three.experts, three.active)
    assert one.experts == 256 * 3 * 4096 * 2048
    assert three.trained - one.trained == 2 * (one.layer + one.experts)


def test_one_epoch_is_read_live(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "qwen", QWEN3_4B | {"num_hidden_layers": 4})
    recipe = load_recipe("qwen3-4b-dspark", [f"target.path={folder}", "drafter.feature_layers=[1,2]"])
    recipe = recipe.model_copy(update={"train": replace(recipe.train, epochs=1)})
    assert plan.plan(recipe, [], (10, 100, 0.5), tmp_path).way == "live"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 16])
def test_specialising_deepseek_v4_flash_on_several_gpus(devices: int, tmp_path: Path) -> None:
    """The printed numbers, added up here by hand from the published configuration."""
    folder = tmp_path / "flash"
    v4_configs.main("flash", str(folder))
    words = ["plan", "-r", "deepseek-v4-flash", "--set", f"target.path={folder}", "--count", "1000", "--json"]
    words += ["--tokens", "4096", "--devices", str(devices), "--tflops", "989", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    told = json.loads(done.stdout)
    stages = {stage["stage"]: stage for stage in told["stages"]}

    hidden, inner, vocab, streams = 4096, 2048, 129_280, 4
    experts = 256 * 3 * hidden * inner
    attention = 1024 * hidden + 64 * 512 * 1024 + 512 * hidden + 8 * 1024 * 8 * 512 + hidden * 8 * 1024
    attention += 64 + 1024 + 512 + 2 * hidden  # sinks and norms
    mixes = 2 * ((2 + streams) * streams * (streams * hidden + 1) + 3)
    layer = attention + mixes + 256 * hidden + 256 + 3 * hidden * inner
    outside = 3 * hidden * hidden + 2 * hidden + streams * streams * hidden + streams + 1
    outside += 2 * vocab * 256 + hidden + 256
    trained, frozen = 3 * (layer + experts) + outside, 2 * vocab * hidden
    assert trained == pytest.approx(19.85e9, rel=1e-3)
    assert told["experts_apart"] == 3 * experts == 19_327_352_832

    state = (16 * trained + 4 * frozen) // devices  # float32: weights, gradients, two moments
    passes = 2 * (outside + frozen + 2 * layer) + 6 * layer  # bfloat16 and a gradient on its way
    apart = (2 * 3 * experts + 6 * experts) // devices
    drafted = 128 * 5 * 8192 / 4094  # a row holds two conversations
    kept = drafted * 3 * (8 * streams * hidden + 3 * 64 * 512 + 6 * (3 * inner + 2 * hidden)) * 2
    batch = 8192 * 4 * hidden * 2 + 8192 * 4 * hidden * 2
    wanted = state + passes + apart + kept + batch + 16 * 2**25
    assert stages["train from the store"]["memory_bytes"] == pytest.approx(wanted, rel=1e-6)
    assert wanted < 80 * 2**30, "a step fits on a GPU of 80 GB"
    # capture: all weights in bfloat16, and eager attention over 8,192 tokens with an entry for each 4 of them
    parameters = target_sizes(str(folder), None, "bfloat16").parameters
    assert parameters == pytest.approx(284e9, rel=0.01)
    scores, width = 3 * 64 * (8192 + 2048), 64 * 512
    held = 8192 * (4 * hidden + 2 * streams * hidden + 3 * width + 2 * width * 10_240 // 8192 + scores)
    assert stages["capture"]["memory_bytes"] == 2 * (parameters // devices + held)

    weights = 166.88e9 - 10.86e9  # of the target as it is stored
    assert stages["generate"]["memory_bytes"] == pytest.approx(weights / devices, rel=1e-3)
    rate = 3600 * devices * 989e12 * 0.4
    active = 6 * experts / 256 + layer
    context = 4094 * (3 * hidden**2 + 3 * hidden * 512)
    operations = 6 * (128 * 5 * 3 * active + context) + 2 * 128 * 5 * 4 * vocab * hidden
    assert stages["train from the store"]["hours"] == pytest.approx(10 * 1000 * operations / rate, rel=1e-6)
