"""Command: what a run would need and where it would be bound, before anything starts. Settings in, a table or JSON out.

`python -m trainer.plan --nodes 8 --ranks-per-node 8 experiment=ssync_movi_c`; cluster/launch.py plan calls it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from trainer.plan.rates import Rates
    from trainer.plan.scaling import Supply
    from trainer.plan.sizes import Layout, Sizes
    from trainer.plan.traffic import Dataset

GIGA = 1e9


class _Parser(argparse.ArgumentParser):
    """One line for a mistake."""

    def error(self, message: str) -> NoReturn:
        from data_pipeline.errors import ConfigError

        raise ConfigError(f"{message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m trainer.plan",
        usage="%(prog)s [flags] experiment=NAME [key=value ...]",
        description="Memory, arithmetic, traffic and limits of a run, from its settings alone. Starts nothing, reads no weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="R")
    parser.add_argument("--cpu", action="store_true", help="ranks without GPUs")
    parser.add_argument("--rate", metavar="DEVICE", help="h200, h100, ... or FLOP/s,bytes/s (default: h200; cpu_core with --cpu)")
    parser.add_argument("--measure", action="store_true", help="measure this machine's rates in place of --rate (seconds)")
    parser.add_argument("--codec", help="int8, float16, float32; frames: features made in the loop (default: the shards')")
    parser.add_argument("--link", type=float, default=50.0, metavar="GB/s", help="of a node to the others, each way (default 50)")
    parser.add_argument("--disk", type=float, default=3.0, metavar="GB/s", help="a node reads shards at (default 3)")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser


def main(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)  # --help leaves here, before anything slow
    from trainer.plan.report import text

    plan = make_plan(options)
    print(json.dumps(plan, indent=1) if options.json else text(plan), flush=True)
    return 0


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    """All facts of the report, as plain values. Raises ConfigError."""
    from data_pipeline.compose import compose
    from data_pipeline.errors import check_choice
    from trainer.config import RunConfig
    from trainer.plan import traffic
    from trainer.plan.rates import find_rates, measured_rates
    from trainer.plan.scaling import Supply
    from trainer.plan.sizes import Layout, sizes_of

    _check(options)
    run = compose("train", RunConfig, options.settings)
    layout = Layout(nodes=options.nodes, ranks_per_node=options.ranks_per_node, gpu=not options.cpu)
    sizes = sizes_of(run, layout)
    codecs = [*traffic.CODEC_BYTES, "frames"]
    if options.codec:
        check_choice("--codec", options.codec, codecs)
    wanted = options.codec or ("frames" if run.data.input == "frames" else None)
    dataset = traffic.find_dataset(sizes, wanted)
    codec = wanted or (dataset.codec if dataset else run.data.codec or traffic.DEFAULT_CODEC)
    rates = measured_rates() if options.measure else find_rates(options.rate or ("cpu_core" if options.cpu else "h200"))
    supply = Supply(codec=codec, link=options.link * GIGA, disk=options.disk * GIGA)
    return _facts(sizes, dataset, rates, supply)


def _check(options: argparse.Namespace) -> None:
    from data_pipeline.errors import ConfigError

    if options.measure and options.rate:
        raise ConfigError(f"--measure with --rate {options.rate}; one of them says how fast devices are; leave one out")
    for name in ("link", "disk"):
        if not 0 < getattr(options, name) < float("inf"):
            raise ConfigError(f"--{name} {getattr(options, name)}; GB/s above 0 are needed; change --{name}")


def _facts(sizes: Sizes, dataset: Dataset | None, rates: Rates, supply: Supply) -> dict[str, Any]:
    from trainer.plan import memory, scaling, traffic, work

    run, layout = sizes.run, sizes.layout
    time = scaling.step_time(sizes, rates, supply)
    held = memory.holdings(sizes, traffic.stored_bytes(sizes, supply.codec))
    phase, peak = memory.peak(held)
    parts = work.step_work(sizes, online=supply.codec == "frames")
    binds = scaling.binding(run, layout, rates, supply)
    ranks, why = scaling.stops_scaling(binds, run.optim.global_batch)
    return {
        "name": run.name,
        "layout": _layout(layout) | {"zero_stage": run.parallel.zero_stage},
        "shape": _shape(sizes),
        "rates": asdict(rates),
        "memory": {
            "peak_bytes": peak,
            "peak_phase": phase,
            "above_weights_and_inputs": memory.peak(held, step_only=True)[1],
            "device_gib": rates.memory_gib,
            "tensors": [one._asdict() for one in held],
        },
        "work": {
            "flop": sum(one.flop for one in parts.values()),
            "parts": [
                {"name": name, "flop": one.flop, "seconds": scaling.work_seconds(one, rates, sizes.half)}
                for name, one in parts.items()
            ],
        },
        "time": {name: getattr(time, name) for name in ("step", "compute", "communication", "data", "binds")},
        "clips_per_s": run.optim.global_batch / time.step,
        "codec": supply.codec,
        "features": [_features(sizes, codec, dataset, time.step) for codec in (*traffic.CODEC_BYTES, "frames")],
        "dataset": dataset.source if dataset else "its size is not known before its shards are there",
        "order": _order(sizes, dataset),
        "communication": traffic.communication(sizes),
        "stops_scaling": {"ranks": ranks, "why": why, "binds": binds},
    }


def _layout(layout: Layout) -> dict[str, Any]:
    return {"nodes": layout.nodes, "ranks_per_node": layout.ranks_per_node, "world": layout.world, "gpu": layout.gpu}


def _shape(sizes: Sizes) -> dict[str, Any]:
    return {
        "B": sizes.clips,
        "T": sizes.clip_len,
        "P": sizes.patches,
        "S": sizes.slots,
        "D": sizes.dim,
        "E": sizes.width,
        "micro_batches": sizes.micro_batches,
        "global_batch": sizes.run.optim.global_batch,
        "precision": "bf16" if sizes.half else "fp32",
        "decoder_path": _decoder_path(sizes),
    }


def _features(sizes: Sizes, codec: str, dataset: Dataset | None, step_seconds: float) -> dict[str, Any]:
    """Pixels are stored once, features once for each view."""
    from trainer.plan import traffic

    views = 1 if codec == "frames" else len(sizes.run.data.views)
    return {
        "codec": codec,
        "frame_bytes": traffic.frame_bytes(sizes, codec),
        "bytes_per_s": traffic.node_bytes(sizes, codec) / step_seconds,
        "storage_bytes": traffic.frame_bytes(sizes, codec) * dataset.frames * views if dataset else None,
    }


def _decoder_path(sizes: Sizes) -> str:
    if not sizes.chunked:
        return "plain"
    return "fused, learns in one pass" if sizes.one_pass else "fused, chunks computed again"


def _order(sizes: Sizes, dataset: Dataset | None) -> list[str]:
    """How well the shards' order mixes and how local its reads are: only shards can tell, so another command is asked."""
    if dataset is None or not dataset.source.endswith(".json"):
        return []
    run, layout = sizes.run, sizes.layout
    flags = {
        "global-batch": run.optim.global_batch,
        "ranks": layout.world // run.parallel.patch_ranks,
        "nodes": layout.nodes,
        "seed": run.seed,
    }
    flags |= {"clip-len": run.data.clip_len, "lanes": run.data.lanes, "block-shards": run.data.block_shards}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    command = [sys.executable, "-m", "data_pipeline.plan", run.data.root, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines if done.returncode == 0 else lines[-1:]


if __name__ == "__main__":
    from data_pipeline.compose import run_command

    raise SystemExit(run_command(main))
