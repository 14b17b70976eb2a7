"""The plan as a person reads it, and as JSON. Facts come in, text goes out."""

from __future__ import annotations

from typing import Any

MIB, GIB = 2**20, 2**30


def text(plan: dict[str, Any]) -> str:
    """Sections with aligned columns."""
    return "\n".join([_head(plan), "", *_memory(plan), "", *_work(plan), "", *_data(plan), "", *_limits(plan)])


def _head(plan: dict[str, Any]) -> str:
    where, shape = plan["layout"], plan["shape"]
    letters = " ".join(f"{name}={value}" for name, value in shape.items() if name in "BTPSDE")
    return (
        f"{plan['name']}: {where['nodes']} nodes x {where['ranks_per_node']} ranks, global batch {shape['global_batch']}, "
        f"ZeRO-{where['zero_stage']}, {shape['precision']}, decoder {shape['decoder_path']}; a rank's micro-batch: {letters}, "
        f"{shape['micro_batches']} of them"
    )


def _memory(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory"]
    lines = [f"memory of a rank, peak {size(memory['peak_bytes'])} while in: {memory['peak_phase']}"]
    if memory["device_gib"]:
        share = memory["peak_bytes"] / GIB / memory["device_gib"]
        lines[0] += f" ({100 * share:.1f} % of the device's {memory['device_gib']:g} GiB{'' if share < 1 else ': DOES NOT FIT'})"
    for one in memory["tensors"]:
        where = "host" if one["host"] else "all the time" if len(one["phases"]) == 4 else ", ".join(one["phases"])
        lines.append(f"  {one['name']:<42}{size(one['bytes']):>12}  {where}")
    return lines


def _work(plan: dict[str, Any]) -> list[str]:
    work, time = plan["work"], plan["time"]
    lines = [f"arithmetic of a rank's update, {_si(work['flop'])}FLOP in products; rates: {plan['rates']['name']}"]
    for one in work["parts"]:
        lines.append(f"  {one['name']:<42}{_si(one['flop']) + 'FLOP':>12}  {1e3 * one['seconds']:10.3f} ms")
    lines.append(
        f"  step {1e3 * time['step']:.2f} ms = compute {1e3 * time['compute']:.2f} + communication "
        f"{1e3 * time['communication']:.2f}; reading {1e3 * time['data']:.2f} beside it; "
        f"{plan['clips_per_s']:,.0f} clips/s over all ranks"
    )
    return lines


def _data(plan: dict[str, Any]) -> list[str]:
    lines = ["features per node, at this step time"]
    for one in plan["features"]:
        mark = " <- this plan" if one["codec"] == plan["codec"] else ""
        what = "frames (raw), features online" if one["codec"] == "frames" else f"precomputed, {one['codec']}"
        stored = "" if one["storage_bytes"] is None else f"  dataset {size(one['storage_bytes'])}"
        lines.append(f"  {what:<30}{size(one['frame_bytes']):>12} a frame {size(one['bytes_per_s']):>12}/s{stored}{mark}")
    lines.append(f"  dataset: {plan['dataset']}")
    return lines + [f"  {line}" for line in plan["order"]]


def _limits(plan: dict[str, Any]) -> list[str]:
    sent, stop = plan["communication"], plan["stops_scaling"]
    return [
        f"a rank sends {size(sum(sent.values()))} an update: " + ", ".join(f"{name} {size(n)}" for name, n in sent.items()),
        f"binds: {plan['time']['binds']}; over world sizes: {_ranges(stop['binds'])}",
        f"stops scaling at {stop['ranks']} ranks with this global batch: {stop['why']}",
    ]


def _ranges(binds: list[tuple[int, str]]) -> str:
    """`1-4 compute, 8 data`, from what binds at each world size."""
    words: list[list[Any]] = []
    for ranks, what in binds:
        if words and words[-1][2] == what:
            words[-1][1] = ranks
        else:
            words.append([ranks, ranks, what])
    return ", ".join(f"{first} {what}" if first == last else f"{first}-{last} {what}" for first, last, what in words)


def size(count: float) -> str:
    """Bytes in the unit that keeps them short."""
    for unit, limit in (("B", 2**10), ("KiB", 2**20), ("MiB", 2**30), ("GiB", 2**40)):
        if count < limit:
            value = count / (limit / 2**10)
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
    return f"{count / 2**40:,.2f} TiB"


def _si(count: float) -> str:
    for unit, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:,.0f} "
