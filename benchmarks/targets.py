"""What the project promises: fast path, plain path and published code at the same shapes. Rounds come in, rows go out.

The decoder comes first: in its released form it calibrates what is quoted of the published code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import published
from benchmarks.case import Case
from benchmarks.published import LABEL, Published
from benchmarks.single import fresh_memory, measure
from benchmarks.table import Row

MOVI = Case(batch=4, frames=4, patches=256, slots=11, width=384)
LARGE = Case(batch=1, frames=4, patches=1369, slots=7, width=768)
TOKENS = Case(batch=1, frames=16, patches=1024, slots=11, width=384)  # T*P = 16384
LONG = replace(LARGE, frames=128, matmul="onednn", settings=("model.recompute_frames=16",))


class Calibration:
    """Filled by the decoder's rows: (frames, patches) -> factor."""

    def __init__(self) -> None:
        self.factors: dict[tuple[int, int], float] = {}

    def of(self, case: Case) -> float | None:
        """None where the decoder has not been measured at such a size."""
        key = (4, 1369) if case.patches == 1369 else (16, 256)
        return self.factors.get(key)


def both_products(case: Case) -> list[Case]:
    """The fused path with torch's products and with oneDNN's."""
    return [replace(case, path="fused", matmul=products) for products in ("torch", "onednn")]


def decoder_rows(rounds: int, calibration: Calibration) -> list[Row]:
    rows = []
    for shape in (MOVI, LARGE):
        cases = [*both_products(shape), replace(shape, path="plain"), replace(shape, path="official_form")]
        figures = measure("benchmarks.decoder", cases, rounds)["cases"]
        key = (shape.batch * shape.frames, shape.patches)
        calibration.factors[key] = published.calibration(*key, figures[-1]["cpu_s"])
        section = f"decoder with losses, forward + backward, N={key[0]} S={shape.slots} P={shape.patches} E={shape.width}"
        rows += _beside(section, figures, against=figures[-1])
    return rows


def step_rows(rounds: int, calibration: Calibration) -> list[Row]:
    known = ((replace(MOVI, batch=1), published.STEP_224), (MOVI, published.STEP_224_B4), (LARGE, published.STEP_518))
    rows = []
    for shape, before in known:
        figures = measure("benchmarks.step", [*both_products(shape), replace(shape, path="plain")], rounds)["cases"]
        section = f"training step from stored features, {shape.shape_text}"
        rows += [*_beside(section, figures, against=figures[-1]), *_published(section, before, figures, calibration.of(shape))]
    return rows


def ssync_rows(rounds: int, calibration: Calibration) -> list[Row]:
    figures = measure("benchmarks.ssync", [replace(TOKENS, path=path) for path in ("fast", "plain")], max(rounds, 5))["cases"]
    section = "all that SSync adds after the decoder, T*P=16384"
    return [
        *_beside(section, figures, against=figures[-1]),
        *_published(section, published.SSYNC_16K, figures[:1], calibration.of(TOKENS)),
    ]


def srl_rows(rounds: int, calibration: Calibration) -> list[Row]:
    """Whole matrices of 16384 x 16384 would need 10 GiB: the plain form is measured at a quarter of the patches."""
    quarter, rows = replace(TOKENS, frames=4), []
    for loss, before in (("decoder", published.SRL_DECODER_16K), ("encoder", published.SRL_ENCODER_16K)):
        small = measure("benchmarks.srl", [replace(quarter, path=path) for path in (loss, f"{loss}_plain")], rounds)["cases"]
        rows += _beside(f"SRL's {loss} loss, T*P=4096", small, against=small[-1])
        whole = measure("benchmarks.srl", [replace(TOKENS, path=loss)], rounds)["cases"]
        section = f"SRL's {loss} loss, T*P=16384"
        rows += [*_beside(section, whole, against=None), *_published(section, before, whole, calibration.of(TOKENS))]
    return rows


def long_clip_rows(rounds: int, calibration: Calibration) -> list[Row]:
    """One step of a long clip at high resolution; memory only, once."""
    memory = fresh_memory("benchmarks.step", LONG, calls=1, resident_only=True)
    name = "fused, slot attention recomputed 16 frames at a time"
    return [
        Row(
            section=f"training step, {LONG.shape_text}",
            name=name,
            peak_mib=memory["resident_mib"],
            beside="at most 4096 MiB asked",
        )
    ]


def plan_rows(rounds: int, calibration: Calibration) -> list[Row]:
    from benchmarks.plan_check import compare

    rows = []
    for batch, path in ((1, "fused"), (4, "fused"), (1, "plain")):
        found = compare(replace(MOVI, batch=batch, path=path))
        beside = (
            f"planned {found['planned_mib']:.1f} MiB ({found['resident_ratio']:.3f}), FLOP {found['flop_ratio']:.4f} of counted"
        )
        name = f"{path}, B={batch}"
        rows.append(Row(section="plan against a measured step", name=name, peak_mib=found["resident_mib"], beside=beside))
    return rows


def _beside(section: str, figures: Sequence[dict[str, Any]], against: dict[str, Any] | None) -> list[Row]:
    """A row for each case; ratios say how much more `against` takes."""
    rows = []
    for one in figures:
        words = []
        if against is not None and one is not against:
            words.append(f"{against['name']} takes {against['cpu_s'] / one['cpu_s']:.2f}x the time")
            if one["tensors_mib"]:
                words.append(f"{against['tensors_mib'] / one['tensors_mib']:.1f}x the tensors")
                words.append(f"{against['resident_mib'] / max(one['resident_mib'], 0.1):.1f}x resident")
        words.append(f"tensors {one['tensors_mib']:.1f} MiB")
        rows.append(
            Row(
                section=section,
                name=one["name"],
                cpu_ms=one["cpu_s"] * 1e3,
                wall_ms=one["wall_s"] * 1e3,
                peak_mib=one["resident_mib"],
                beside=", ".join(words),
            )
        )
    return rows


def _published(section: str, before: Published, figures: Sequence[dict[str, Any]], factor: float | None) -> list[Row]:
    """What is quoted, carried over to this machine as it is now, beside ours; the lower end of what was seen counts."""
    how = "not calibrated: add decoder to --only" if factor is None else f"calibrated by the released decoder, times {factor:.2f}"
    factor = 1.0 if factor is None else factor
    ours = [one for one in figures if one["path"] != "plain"]
    times = " and ".join(f"{before.seconds[0] * factor / one['cpu_s']:.2f}x" for one in ours)
    words = [f"{before.seconds[0]:g}-{before.seconds[1]:g} s there, {how}: {times} the time of ours"]
    if before.note:
        words.append(before.note)
    if before.mib:
        memory = " and ".join(f"{before.mib[0] / max(one['resident_mib'], 0.1):.1f}x" for one in ours)
        words.append(f"{before.mib[0]:g}-{before.mib[1]:g} MiB: {memory}")
    cpu, peak = before.seconds[0] * factor * 1e3, before.mib[0] if before.mib else None
    return [Row(section=section, name=LABEL, cpu_ms=cpu, peak_mib=peak, beside="; ".join(words))]


TARGETS = {
    "decoder": decoder_rows,
    "step": step_rows,
    "ssync": ssync_rows,
    "srl": srl_rows,
    "long_clip": long_clip_rows,
    "plan": plan_rows,
}


def rows(chosen: Sequence[str], rounds: int, say: Any) -> list[Row]:
    """Rows of the chosen targets, in the table's order."""
    calibration, found = Calibration(), []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, make in TARGETS.items():
        if name in chosen:
            say(name)
            found += make(rounds, calibration)
    return found
