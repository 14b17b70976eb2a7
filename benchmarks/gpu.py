"""Command: correctness, figures, memory curve and a trace on one GPU, within a budget of seconds. Called by gpu.sh.

Comes in: a folder. Goes out: gpu.json (written again after every part, so that an early end loses little), gpu.md, trace.json.gz.
Exit code 1 where a fast path is not right; figures beyond their targets only say so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.case import Case
from benchmarks.single import MIB, interleaved, prepare_environment

BUDGET_S = 430.0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row: which benchmark at which shape, and what it shall reach. Units: ms of wall time, GB of tensors in all."""

    title: str
    module: str
    case: Case
    most_ms: float | None = None
    most_gb: float | None = None
    rounds: int = 5


def figures(movi: Case, large: Case, tokens: Case) -> list[Figure]:
    """The rows of the performance targets, the dearest last. `tokens`: one clip of T*P = 16384 patches."""
    step, decoder, ssync, srl = (f"benchmarks.{name}" for name in ("step", "decoder", "ssync", "srl"))
    frame, long = replace(large, batch=1), replace(large, frames=128, settings=("model.recompute_frames=16",))
    one_clip = "T*P=16384"
    return [
        Figure(title="MOVi-C step, B=64 T=4", module=step, case=movi, most_ms=60, most_gb=4),
        Figure(title="the same, plain decoder, B=8", module=step, case=replace(movi, batch=8, path="plain")),
        Figure(title="the same, fused, B=8", module=step, case=replace(movi, batch=8)),
        Figure(title="decoder with losses, B=64 T=4", module=decoder, case=movi),
        Figure(title="decoder, N=4 P=1369", module=decoder, case=frame),
        Figure(title="decoder, N=4 P=1369, plain", module=decoder, case=replace(frame, path="plain")),
        Figure(title=f"SSync after the decoder, {one_clip}", module=ssync, case=replace(tokens, path="fast")),
        Figure(title="SSync after the decoder, B=64 T=4", module=ssync, case=replace(movi, path="fast")),
        Figure(title=f"SRL decoder loss, {one_clip}", module=srl, case=replace(tokens, path="decoder")),
        Figure(title=f"SRL encoder loss, {one_clip}", module=srl, case=replace(tokens, path="encoder")),
        Figure(title="MOVi-C step, B=64 T=24", module=step, case=replace(movi, frames=24), most_gb=12, rounds=2),
        Figure(title="518 px step, ViT-B features, B=4 T=128", module=step, case=long, rounds=1),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    prepare_environment(1)
    import torch

    from benchmarks import machine

    if not options.dry_run and not torch.cuda.is_available():
        print("error: no usable CUDA device; --dry-run shows the script on a CPU")
        return 2
    movi, large, tokens, check, lengths = shapes(options.dry_run)
    report: dict[str, Any] = {"dry_run": options.dry_run, "date": time.strftime("%Y-%m-%d")}
    report["machine"] = machine.describe(torch.get_num_threads(), movi.device)
    began = time.monotonic()
    parts: dict[str, Callable[[], Any]] = {
        "checks": lambda: _checks(check),
        "rows": lambda: [_row(one) for one in figures(movi, large, tokens) if _in_time(began, one.title)],
        "memory_curve": lambda: [_curve_point(movi, length) for length in lengths if _in_time(began, f"T={length}")],
        "trace": lambda: _trace(movi, options.out) if _in_time(began, "trace") else None,
    }
    for name, part in parts.items():
        report[name] = part()
        report["seconds"] = round(time.monotonic() - began, 1)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu.md").write_text(markdown(report))
    print((options.out / "gpu.md").read_text(), flush=True)
    return 0 if all(one["passed"] for one in report["checks"]) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder that is there")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(argv)
    if not options.out.is_dir():
        parser.error(f"--out={options.out}; no such folder; make it first")
    return options


def shapes(dry_run: bool) -> tuple[Case, Case, Case, Case, list[int]]:
    """MOVi-C, ViT-B at 518 pixels, one clip of 16384 patches, the shape of the checks, clip lengths of the memory curve."""
    if dry_run:
        tiny = Case(batch=2, frames=4, patches=16, slots=4, width=12, dim=8, hidden=16, device="cpu")
        return tiny, replace(tiny, slots=3), replace(tiny, batch=1), replace(tiny, frames=3), [4, 8]
    movi = Case(batch=64, frames=4, patches=576, slots=11, width=384, device="cuda", precision="bf16")
    large = replace(movi, batch=4, patches=1369, slots=7, width=768)
    tokens = replace(movi, batch=1, frames=16, patches=1024)
    check = Case(batch=2, frames=3, patches=144, slots=11, width=96, hidden=256, device="cuda")
    return movi, large, tokens, check, [4, 8, 16, 32, 64, 128]


def _in_time(began: float, what: str) -> bool:
    left = BUDGET_S - (time.monotonic() - began)
    if left <= 0:
        print(f"left out, no time: {what}", flush=True)
    return left > 0


def _checks(case: Case) -> list[dict[str, Any]]:
    from benchmarks.exact import checks

    found = [one._asdict() | {"passed": one.passed} for one in checks(case)]
    for one in found:
        print(
            f"{'ok  ' if one['passed'] else 'BAD '} {one['name']}: {one['error']:.1e}, allowed {one['allowed']:.1e}", flush=True
        )
    return found


def _row(figure: Figure) -> dict[str, Any]:
    """A shape that does not fit or fails is a row that says so."""
    row: dict[str, Any] = {
        "title": figure.title,
        "case": asdict(figure.case),
        "most_ms": figure.most_ms,
        "most_gb": figure.most_gb,
    }
    try:
        row |= _measure(figure.module, figure.case, figure.rounds)
    except (RuntimeError, ValueError) as error:
        row["error"] = str(error).splitlines()[0][:300]
    shown = (
        row.get("error") or f"{row['ms']:.1f} ms, {row['gb']:.2f} GB in all, {row['above_mib']:.0f} MiB above weights and inputs"
    )
    print(f"{figure.title}: {shown}", flush=True)
    return row


def _measure(module: str, case: Case, rounds: int) -> dict[str, float]:
    import gc
    import importlib

    import torch

    from benchmarks.measure import peak_of_tensors

    gc.collect()
    cuda = case.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    prepare = importlib.import_module(module).prepare
    call = prepare(case)
    before = torch.cuda.memory_allocated() if cuda else 0
    above = peak_of_tensors(lambda: (call(), call()), torch.device(case.device)).bytes
    ((_, wall),) = interleaved(lambda _: call, [case], rounds)
    return {"ms": wall * 1e3, "gb": (before + above) / 1e9, "above_mib": above / MIB}


def _curve_point(movi: Case, length: int) -> dict[str, Any]:
    """Memory of a step of four clips as they get longer."""
    case = replace(movi, batch=min(4, movi.batch), frames=length)
    return _row(Figure(title=f"MOVi-C step, B={case.batch} T={length}", module="benchmarks.step", case=case, rounds=1))


def _trace(case: Case, out: Path) -> list[dict[str, Any]]:
    """One step's trace as a file, and the operations that take most of its time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.step import prepare

    call = prepare(replace(case, batch=min(16, case.batch)))
    call(), call()
    cuda = case.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as record:
        call()
        if cuda:
            torch.cuda.synchronize()
    record.export_chrome_trace(str(out / "trace.json.gz"))
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    ranked = sorted(record.key_averages(), key=lambda one: -getattr(one, key))[:15]
    return [{"name": one.key, "ms": getattr(one, key) / 1e3, "calls": one.count} for one in ranked]


def markdown(report: dict[str, Any]) -> str:
    """What is there so far, as tables."""
    device, kind = report["machine"]["device"], "dry run on a CPU: the figures mean nothing" if report["dry_run"] else "one GPU"
    lines = [
        f"# {device}, {report['date']} ({kind})",
        "",
        f"torch {report['machine']['torch']}, {report['seconds']} s in all",
        "",
    ]
    if report.get("checks"):
        lines += ["| against float64 | error | allowed | |", "|---|---|---|---|"]
        lines += [
            f"| {one['name']} | {one['error']:.1e} | {one['allowed']:.1e} | {'ok' if one['passed'] else 'BAD'} |"
            for one in report["checks"]
        ]
    for name in ("rows", "memory_curve"):
        if report.get(name):
            lines += ["", "| | ms | target | GB in all | target |", "|---|---|---|---|---|", *map(_line, report[name])]
    if report.get("trace"):
        lines += ["", "| operation | ms of its own | calls |", "|---|---|---|"]
        lines += [f"| {one['name']} | {one['ms']:.2f} | {one['calls']} |" for one in report["trace"]]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['title']} | {row['error']} | | | |"
    targets = [f"<= {row[key]:g}" if row[key] else "" for key in ("most_ms", "most_gb")]
    return f"| {row['title']} | {row['ms']:.1f} | {targets[0]} | {row['gb']:.2f} | {targets[1]} |"


if __name__ == "__main__":
    import os
    import sys

    code = main()
    sys.stdout.flush()
    os._exit(code)  # gloo's and NCCL's threads now and then abort the interpreter's teardown
