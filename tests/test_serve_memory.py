"""What a served model takes of the memory that only this process has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from draftkit.target.place import EMBEDDED

OPEN = """
import sys, torch
from draftkit.engine.settings import EngineSettings
from draftkit.serve.pair import open_pair

def own_bytes():
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

open_pair("tiny", "none", EngineSettings())  # what libraries take
before = own_bytes()
engine, _ = open_pair(sys.argv[1], "none", EngineSettings())
assert engine.compiled
print(own_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what a process holds")
def test_each_weight_of_a_served_model_lies_in_memory_once(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=3
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = sum(p.nbytes for p in model.parameters())
    run = subprocess.run([sys.executable, "-c", OPEN, tmp_path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1.1 * weights
