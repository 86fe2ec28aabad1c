"""A DeepSeek-V4 module as GGUF, by llama.cpp's own converter (`convert_hf_to_gguf.py --dspark`).

The converter knows one form: DeepSeek's names in a checkpoint's folder, experts in packed FP4. That is what
it is given, whatever the target is stored in; the tokenizer comes from the target's folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from draftkit.draft.deepseek_v4 import DeepseekV4Drafter
from draftkit.draft.deepseek_v4_shape import DeepseekV4Shape
from draftkit.errors import CheckpointError, ConfigError
from draftkit.handover.deepseek_v4 import CONFIG, INDEX, target_config, with_module, write_shards
from draftkit.handover.engines import engine_named
from draftkit.target.fp8_fp4 import BLOCK, GROUP

SCRIPT = "convert_hf_to_gguf.py"


def write_v4_gguf(drafter: DeepseekV4Drafter, target: Path, converter: Path, out: Path) -> None:
    """Write one file for `llama-server -md`.

    Raises ConfigError when `converter` is no llama.cpp script, CheckpointError for a module that llama.cpp
    does not know, or what the converter said when it failed; nothing is left of a file that is not whole."""
    if not converter.is_file() or converter.name != SCRIPT:
        raise ConfigError(f"--converter {converter}: give llama.cpp's {SCRIPT} (a commit after #25784)")
    if reasons := refusals(drafter.config):
        raise CheckpointError(f"llama.cpp's converter does not know this module: {'; '.join(reasons)}")
    raw = with_module(target_config(target, drafter.config), drafter.config) | {
        "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
        "architectures": ["DeepseekV4ForCausalLM"],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".dspark-") as held:
            folder = Path(held)
            written = write_shards(drafter, raw, folder)
            (folder / CONFIG).write_text(json.dumps(raw), "utf-8")
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": written.places}), "utf-8")
            command = [sys.executable, str(converter), str(folder), "--dspark", "--outfile", str(partial)]
            command += ["--target-model-dir", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not partial.is_file():
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise CheckpointError(
                f"{converter}: failed: {said[-1] if said else f'exit code {done.returncode}'}"
            )
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def refusals(config: DeepseekV4Shape) -> list[str]:
    """Why llama.cpp has no file for this module; empty when it has."""
    found = engine_named("llama.cpp").refusals(config)
    if config.scoring != "sqrtsoftplus":
        found.append(f"experts are scored by {config.scoring}, it knows sqrtsoftplus")
    for name, size in (("hidden", config.hidden_size), ("expert", config.intermediate_size)):
        if size % GROUP:
            found.append(f"{name} size {size} is no multiple of {GROUP}, as packed FP4 needs")
    return found
