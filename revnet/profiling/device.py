"""The name of the hardware that something was measured on."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

__all__ = ["device_name"]


def device_name(device: torch.device | str) -> str:
    """The model of a GPU; for any other device that of the machine's processor.

    Example:
        >>> from revnet.profiling import device_name
        >>> isinstance(device_name("cpu"), str)  # such as "AMD EPYC"
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpus.read_text()) if cpus.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
