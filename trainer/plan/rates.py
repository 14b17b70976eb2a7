"""How fast devices are. A name comes in, Rates go out: a table of known devices, or this machine, measured by a small process."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from data_pipeline.errors import ConfigError, StateError


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one rank's device sustains. Units: FLOP/s, bytes/s, seconds."""

    name: str
    matmul_half: float
    matmul_float: float
    memory: float
    call: float = 4e-6  # from one device call to the next that waits for it
    memory_gib: float | None = None
    node_link: float = 450e9  # between ranks of a node, each way


# Peak rates of the data sheets (dense, no sparsity) times what long runs of large products keep of them.
KEPT_MATMUL, KEPT_MEMORY = 0.6, 0.8


def _sheet(name: str, half: float, single: float, memory: float, gib: float, node_link: float) -> Rates:
    return Rates(
        name=name,
        matmul_half=KEPT_MATMUL * half,
        matmul_float=KEPT_MATMUL * single,
        memory=KEPT_MEMORY * memory,
        memory_gib=gib,
        node_link=node_link,
    )


RATES: dict[str, Rates] = {
    "h200": _sheet("h200", 989e12, 67e12, 4.8e12, 139, 450e9),
    "h100": _sheet("h100", 989e12, 67e12, 3.35e12, 79, 450e9),
    "a100": _sheet("a100", 312e12, 19.5e12, 2.0e12, 79, 300e9),
    "rtx_pro_6000": _sheet("rtx_pro_6000", 504e12, 126e12, 1.79e12, 95, 64e9),
    "rtx_4090": _sheet("rtx_4090", 165e12, 82.6e12, 1.0e12, 23.5, 32e9),
    # one core of a server: PyTorch's float32 products, and bf16 where the core has it
    "cpu_core": Rates(name="cpu_core", matmul_half=450e9, matmul_float=115e9, memory=8e9, call=5e-6, node_link=5e9),
}


def find_rates(name: str) -> Rates:
    """A device by name, or FLOP/s and bytes/s as "500e12,3e12". Raises ConfigError."""
    if name in RATES:
        return RATES[name]
    matmul, comma, memory = name.partition(",")
    try:
        if comma and float(matmul) > 0 and float(memory) > 0:
            return Rates(name=name, matmul_half=float(matmul), matmul_float=float(matmul), memory=float(memory))
    except ValueError:
        pass
    near = difflib.get_close_matches(name, RATES, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"--rate {name}; a known device is needed, one of {', '.join(RATES)}, or FLOP/s and bytes/s as 500e12,3e12{hint}"
    )


def measured_rates(timeout_s: float = 120.0) -> Rates:
    """This machine's, by a process of its own: only it imports torch."""
    command = [sys.executable, "-m", "trainer.plan.measure"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise StateError(f"measuring the device took more than {timeout_s:g} s; give --rate in its place") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StateError(f"measuring the device failed: {last[:200]}; give --rate in its place")
    return Rates(**json.loads(done.stdout.strip().splitlines()[-1]))


def as_json(rates: Rates) -> str:
    return json.dumps(asdict(rates))
