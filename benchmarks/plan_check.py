"""Command: what the plan says beside what is measured, memory and FLOP of a step. `python -m benchmarks.plan_check`.

Exit code 1 if one of them is further off than 10 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.case import Case
from benchmarks.single import MIB, fresh_memory, prepare_environment

WITHIN = 0.10
STEP = "benchmarks.step"


def planned(case: Case) -> dict[str, float]:
    """Units: MiB above weights and inputs; FLOP of matrix products."""
    from trainer.plan import memory, work
    from trainer.plan.sizes import Layout, sizes_of

    sizes = sizes_of(case.run(), Layout(gpu=case.device == "cuda"))
    held = memory.holdings(sizes, stored_bytes=4.0)  # the benchmarks' features come in float32
    flop = sum(part.flop for part in work.step_work(sizes).values())
    return {"memory_mib": memory.peak(held, step_only=True)[1] / MIB, "flop": flop}


def counted_flop(case: Case) -> float:
    """Matrix products of one step as torch dispatches them."""
    import importlib

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def in_place(total: list[int], left: list[int], right: list[int], **_: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    step = importlib.import_module(STEP).prepare(case)
    # torch counts what makes a new matrix, not what adds to one
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        step()
    return float(counter.get_total_flops())


def compare(case: Case, *, memory: bool = True) -> dict[str, Any]:
    """Plan, measurement and plan / measurement. Resident memory is taken where glibc gives freed memory back."""
    plan, flop = planned(case), counted_flop(case)
    row: dict[str, Any] = {"name": case.name, "batch": case.batch, "shape": case.shape_text}
    row |= {"flop": flop, "planned_flop": plan["flop"], "flop_ratio": plan["flop"] / flop}
    if not memory:
        return row
    measured = fresh_memory(STEP, case, give_back=True)
    row |= {"planned_mib": plan["memory_mib"], **measured}
    for name in ("resident", "tensors"):
        value = measured[f"{name}_mib"]
        row[f"{name}_ratio"] = plan["memory_mib"] / value if value else None
    return row


def is_within(row: dict[str, Any]) -> bool:
    ratios = [row["flop_ratio"], row.get("resident_ratio") or row.get("tensors_ratio")]
    return all(ratio is None or abs(ratio - 1) <= WITHIN for ratio in ratios)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_check", allow_abbrev=False)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--path", choices=("fused", "plain"), nargs="+", default=["fused", "plain"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    prepare_environment(1)
    import torch

    torch.set_num_threads(1)
    rows = [
        compare(Case(batch=batch, frames=options.frames, patches=options.patches, path=path, device=options.device))
        for path in options.path
        for batch in options.batch
    ]
    print(json.dumps(rows, indent=1) if options.json else text(rows), flush=True)
    return 0 if all(map(is_within, rows)) else 1


def text(rows: Sequence[dict[str, Any]]) -> str:
    columns = "MiB: plan resident (plan/it) tensors (plan/it)   GFLOP: plan counted (plan/it)"
    lines = [f"{'step of':<47}{columns}"]
    for row in rows:
        memory = f"{row['planned_mib']:9.1f} {row['resident_mib'] or 0:8.1f} {_ratio(row['resident_ratio'])}"
        memory += f" {row['tensors_mib']:7.1f} {_ratio(row['tensors_ratio'])}"
        flop = f"{row['planned_flop'] / 1e9:9.1f} {row['flop'] / 1e9:8.1f} {_ratio(row['flop_ratio'])}"
        lines.append(
            f"{row['name']:<24}{row['shape']:<27}{memory}       {flop}{'' if is_within(row) else '  MORE THAN 10 % OFF'}"
        )
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "        -" if value is None else f"  ({value:5.3f})"


if __name__ == "__main__":
    sys.exit(main())
