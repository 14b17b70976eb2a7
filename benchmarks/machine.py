"""What the figures were measured on. Nothing comes in, plain values go out."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def describe(threads: int, device: str) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


def line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpu']}, {machine['cores']} cores (load {machine['load']} before) | device {machine['device']} | "
        f"{machine['threads']} thread{'s' * (machine['threads'] > 1)} | torch {machine['torch']}, "
        f"deepspeed {machine['deepspeed']}, python {machine['python']}"
    )


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    for row in text.splitlines():
        if row.startswith("model name"):
            return row.split(":", 1)[1].strip()
    return platform.machine()
