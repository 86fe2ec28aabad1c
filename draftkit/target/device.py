"""Devices and memory, as far as they can be told without importing torch."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from draftkit.errors import ConfigError

# what drivers put there: NVIDIA, AMD, Windows' Linux
_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def check_device(device: str | None) -> None:
    """Raise ConfigError unless the device is the processor, or a GPU that may be there."""
    if device is None or device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ConfigError(f"--device {device}: is not known; give cpu, cuda or cuda:1")
    if not may_have_gpu():
        raise ConfigError(f"--device {device}: there is no GPU here that this process may use; give cpu")


def may_have_gpu() -> bool:
    """False where certainly no GPU can be used; the driver's own answer takes seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return not sys.platform.startswith("linux") or any(Path(path).exists() for path in _DRIVERS)


def memory_bytes() -> int:
    """Of this machine, in all."""
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
