"""What `doctor` looks at in the installation: Python, packages, GPUs. Checks out."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.layout import gpu_ids

OK, WARNING, PROBLEM = "ok", "warning", "problem"
REQUIRED = ("torch", "deepspeed", "hydra-core", "omegaconf", "numpy", "safetensors", "webdataset", "prometheus-client", "pillow")
COMPARED = (*REQUIRED, "xformers", "ray", "submitit", "triton")  # must be the same on all nodes
PYTHONS = ((3, 10), (3, 13))
IMPORT_SECONDS = 120.0
IMPORT = """
import importlib, json, sys, time
found = {}
for name in ("torch", "deepspeed", "xformers"):
    begun = time.monotonic()
    try:
        module = importlib.import_module(name)
        found[name] = {"version": str(getattr(module, "__version__", "?")), "seconds": round(time.monotonic() - begun, 1)}
    except BaseException as error:
        absent = isinstance(error, ModuleNotFoundError)
        found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0], "absent": absent}
torch = sys.modules.get("torch")
if torch is not None and "error" not in found["torch"]:
    there = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())] if there else []
    found["cuda"] = {"built": torch.version.cuda, "available": there, "devices": names}
print("\\n" + json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    name: str
    result: str  # ok | warning | problem
    value: str
    advice: str = ""  # what to do

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


class Imports:
    """Imports the heavy packages in a process of its own, beside the other checks: a crash in one of them is then a finding."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "")}
        if not environment["DS_ACCELERATOR"]:
            del environment["DS_ACCELERATOR"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", IMPORT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
        )

    def collect(self) -> dict[str, Any]:
        """What was found; {"error": why} when the process did not come to its end."""
        try:
            out, err = self._process.communicate(timeout=IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"not imported after {IMPORT_SECONDS:.0f} s"}
        try:
            return dict(json.loads(out.splitlines()[-1]))
        except (IndexError, ValueError):
            last = err.strip().splitlines()[-1:] or ["no message"]
            return {"error": f"the importing process ended with code {self._process.returncode}: {last[0]}"}


def python_check() -> Check:
    version = sys.version_info[:2]
    value = f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return Check("python", OK, value)
    return Check("python", PROBLEM, value, "use Python 3.10 to 3.13")


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_constraints(path: Path, python: tuple[int, int]) -> dict[str, str]:
    """Package name -> version that was tested; lines for another Python are left out. {} without the file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    tested = {}
    for line in lines:
        match = re.match(r"^([A-Za-z0-9._-]+)==([^;\s]+)\s*(?:;\s*python_version\s*(>=|<)\s*\"(\d+)\.(\d+)\")?", line)
        if match is None:
            continue
        if match[3]:
            bound = (int(match[4]), int(match[5]))
            if (python >= bound) != (match[3] == ">="):
                continue
        tested[match[1]] = match[2]
    return tested


def packages_check(constraints: Path) -> Check:
    tested = read_constraints(constraints, sys.version_info[:2])
    there = package_versions(tuple({*tested, *REQUIRED}))
    missing = [name for name in REQUIRED if name not in there]
    install = "pip install -e . -c constraints.txt"
    if missing:
        return Check("packages", PROBLEM, f"not installed: {', '.join(missing)}", install)
    other = [f"{name} {version} (tested: {tested[name]})" for name, version in sorted(there.items())
             if name in tested and version.partition("+")[0] != tested[name].partition("+")[0]]  # fmt: skip
    if other:
        return Check("packages", WARNING, f"{len(other)} differ: {', '.join(other[:4])}{' ...' if other[4:] else ''}", install)
    return Check(
        "packages", OK, f"{sum(name in tested for name in there)} as tested" if tested else "all that are needed are there"
    )


def imports_checks(found: Mapping[str, Any], has_gpus: bool) -> list[Check]:
    if "error" in found:
        return [Check("imports", PROBLEM, str(found["error"]), "install PyTorch and DeepSpeed again")]
    checks = []
    for name in ("torch", "deepspeed", "xformers"):
        entry = found.get(name, {})
        if "error" not in entry:
            checks.append(Check(name, OK, f"{entry['version']}, imported in {entry['seconds']:g} s"))
        elif name == "xformers" and entry.get("absent"):
            result = WARNING if has_gpus else OK
            checks.append(
                Check(name, result, "not installed; attention is PyTorch's", "pip install xformers" if has_gpus else "")
            )
        else:
            checks.append(Check(name, PROBLEM, entry["error"], f"install {name} again: pip install {name} -c constraints.txt"))
    return checks


def describe_gpus() -> list[str]:
    """One line per GPU that a rank would get: name, memory, driver. [] without any."""
    if not gpu_ids(os.environ) or not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip().replace(", ", " ", 1).replace(", ", ", driver ") for line in lines if line.strip()]


def devices_check(gpus: list[str], found: Mapping[str, Any]) -> Check:
    cuda = found.get("cuda", {})
    if not gpus:
        return Check("devices", OK, "no GPU; ranks run on CPU")
    value = f"{len(gpus)} x {gpus[0]}" if len(set(gpus)) == 1 else "; ".join(gpus)
    if cuda and not cuda.get("built"):
        return Check("devices", PROBLEM, f"{value}; this PyTorch is built for CPU", "install a CUDA build of PyTorch")
    if cuda and not cuda.get("available"):
        return Check("devices", PROBLEM, f"{value}; PyTorch cannot use them", f"match driver and PyTorch (CUDA {cuda['built']})")
    if len(set(gpus)) > 1:
        return Check("devices", WARNING, value, "different GPUs in one node: the slowest sets the pace")
    return Check("devices", OK, value)
