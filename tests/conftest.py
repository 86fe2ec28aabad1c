"""Shared by all tests: no network, one thread per process, and small targets that the tests make."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the same tests everywhere; checks/gpu.py is for a GPU
if not os.environ.setdefault("CUDA_VISIBLE_DEVICES", ""):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, slowly

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget
from support.targets import make_target_folder

torch.set_num_threads(1)
# how long an example, or drawing one, takes depends on the machine
settings.register_profile("draftkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("draftkit")
pytest_plugins = ("support.training",)


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3."""
    return make_target_folder(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def target(target_folder: Path) -> TransformersTarget:
    """The small random Qwen3, loaded in float64: no greedy tie can be settled by rounding."""
    return load_target(str(target_folder), dtype="float64")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what a run with `-m "not slow"` left out, so that nobody takes it for all tests."""
    if config.option.markexpr != "not slow":
        return
    counts = {
        path.stem.removeprefix("test_"): path.read_text("utf-8").count("pytest.mark.slow")
        for path in sorted(Path(__file__).parent.glob("test_*.py"))
    }
    terminalreporter.write_line(
        f"left out: {sum(counts.values())} slow tests or groups of tests, which `make check` runs; of "
        + ", ".join(name for name, count in counts.items() if count)
    )
