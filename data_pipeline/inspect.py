"""Command: what is in these shards. `python -m data_pipeline.inspect SHARDS`

Comes in: a folder with shards, or with splits of shards. Goes out: counts, sizes, how the features were made and what storing
them cost, and one contact sheet a split. Damaged shards are named and the rest is shown; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.compose import run_command
from data_pipeline.config import RemoteConfig
from data_pipeline.errors import DataError
from data_pipeline.files import write_atomically
from data_pipeline.progress import format_bytes
from data_pipeline.remote.address import shown
from data_pipeline.shards import DatasetIndex, encode_image
from data_pipeline.store import ShardDataset, find_splits

if TYPE_CHECKING:
    from data_pipeline.contact_sheet import Sheet

SHEET_NAME = "contact_sheet.png"
BAR = 40  # characters
BINS = 10  # rows of a histogram
SHOWN_SKIPS = 10


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.inspect", description="Show what built shards hold.")
    parser.add_argument("shards", help="folder or URL of a build, or of one of its splits")
    parser.add_argument(
        "--out", help="folder of the contact sheets, <split>.png; default: contact_sheet.png beside the shards; of a URL: here"
    )
    parser.add_argument("--videos", type=int, default=6, help="videos of a contact sheet; 0: no sheet")
    parser.add_argument("--frames", type=int, default=6, help="frames of a video")
    parser.add_argument("--tile", type=int, default=160, help="side of a frame on the sheet, pixels")
    parser.add_argument("--no-features", action="store_true", help="leave the colours of the features out")
    options = parser.parse_args(argv)
    for name, least in (("videos", 0), ("frames", 1), ("tile", 16)):
        if getattr(options, name) < least:
            parser.error(f"--{name}={getattr(options, name)}; at least {least} is needed")
    faults: list[str] = []
    for folder in find_splits(options.shards):
        faults += inspect_split(folder, options)
    for line in faults:
        print(f"damaged: {line}", file=sys.stderr)
    return 1 if faults else 0


def inspect_split(folder: Path | str, options: argparse.Namespace) -> list[str]:
    """Print and draw one split; returns a line for each damaged thing that was met."""
    try:
        dataset = _open(folder)
    except DataError as error:
        print(f"{shown(folder)}\n  unreadable")
        return [str(error)]
    index = dataset.index
    print("\n".join(describe(folder, index)))
    faults = missing_shards(folder, index) if isinstance(folder, Path) else []
    if options.videos > 0 and index.samples:
        sheet = _draw(dataset, options)
        split = str(index.dataset["split"])
        path = Path(options.out or ".") / f"{split}.png" if options.out or isinstance(folder, str) else folder / SHEET_NAME
        _write(path, encode_image(sheet.pixels, "png"))
        faults += [fault for fault in sheet.faults if not any(fault.startswith(line.split(":")[0]) for line in faults)]
    dataset.close()
    return faults


def _write(path: Path, picture: bytes) -> None:
    try:
        write_atomically(path, picture)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the sheet needs a place; give --out=FOLDER, or --videos=0 for none") from None
    print(f"  contact sheet   {path}")


def _open(folder: Path | str) -> ShardDataset:
    """A damaged shard is no reason not to show the others. Behind a URL the frames that are shown are all that is fetched."""
    if isinstance(folder, Path):
        return ShardDataset(folder, DatasetIndex.load(folder))
    from data_pipeline.remote.fetch import NoRanges

    dataset = ShardDataset.open(folder, remote=RemoteConfig(mode="ranges"))
    try:
        if dataset.index.shards:
            dataset.files.read_into(0, 1, memoryview(bytearray(1)))  # not byte 0: with it every answer begins
    except NoRanges:
        dataset.close()
        return ShardDataset.open(folder)
    except DataError:
        pass  # the sheet will name this shard
    return dataset


def _draw(dataset: ShardDataset, options: argparse.Namespace) -> Sheet:
    from data_pipeline.contact_sheet import draw_sheet

    return draw_sheet(dataset, options.videos, options.frames, options.tile, not options.no_features)


def missing_shards(folder: Path, index: DatasetIndex) -> list[str]:
    """A line for each shard that is not there or has another size than the index says. Bytes: see data_pipeline.verify."""
    lines = []
    for shard in index.shards:
        path = folder / shard["name"]
        found = path.stat().st_size if path.is_file() else None
        if found != shard["bytes"]:
            state = "no such file" if found is None else f"{found} bytes"
            lines.append(f"{path}: {state}, the index has {shard['bytes']} bytes; delete it and build again")
    return lines


def describe(folder: Path | str, index: DatasetIndex) -> list[str]:
    """Lines for a person."""
    made, samples = index.features, index.samples
    frames = [sample.frames for sample in samples]
    objects = [sample.num_instances for sample in samples if sample.num_instances is not None]
    stored = sum(place["length"] for sample in samples for place in sample.members["features"].values())
    total = sum(shard["bytes"] for shard in index.shards)
    features = f"{made['extractor']}, layer {made['layer']}, {made['grid'][0]}x{made['grid'][1]} patches x {made['width']}"
    lines = {
        "dataset": f"{index.dataset['source']}, split {index.dataset['split']}, version {index.version[:12]}",
        "videos": f"{len(frames)}, {len(index.skipped)} skipped, frames {_range(frames)}, {sum(frames)} in all",
        "objects": f"{_range(objects)} a video, {len(objects)} of {len(samples)} annotated" if objects else "not annotated",
        "features": features if index.has_features else "none: frames alone, for data.input=frames",
        "made from": f"{made['image_size']} pixels, resize {made['resize']}, views {', '.join(made['views'])}",
        "fingerprint": str(made["fingerprint"])[:12],
        "codec": f"{made['codec']}, {codec_error(index)}",
        "size": f"{format_bytes(total)} in {len(index.shards)} shards, features {format_bytes(stored)}, "
        f"{format_bytes(total / max(sum(frames), 1))} a frame",
    }
    if not index.has_features:
        lines = {name: text for name, text in lines.items() if name not in ("made from", "fingerprint", "codec")}
    described = [shown(folder)] + [f"  {name:<15} {text}" for name, text in lines.items()]
    resolutions = Counter(f"{sample.size[1]}x{sample.size[0]}" for sample in samples)
    for name, rows in (
        ("native size", ranked(resolutions)),
        ("frames a video", histogram(frames)),
        ("objects a video", histogram(objects)),
    ):
        described += [f"  {name if not row else '':<15} {text}" for row, text in enumerate(bars(rows))]
    skipped = [f"  skipped         {skip['key']}: {skip['reason']}" for skip in index.skipped[:SHOWN_SKIPS]]
    rest = len(index.skipped) - SHOWN_SKIPS
    return described + skipped + ([f"  skipped         and {rest} more, see index.json"] if rest > 0 else [])


def codec_error(index: DatasetIndex) -> str:
    """What storing the features cost, as it was measured when they were stored."""
    quality: dict[str, Any] = dict(index.features.get("quality") or {})
    error = quality.get("err_std", index.codec_error)
    if error is None:
        return "error not measured"
    parts = [f"error {error:.2g} of a channel's deviation"]
    if quality.get("cosine_loss") is not None:
        parts.append(f"1 - cosine {quality['cosine_loss']:.1e}")
    if quality.get("nearest_neighbour") is not None:
        parts.append(f"{quality['nearest_neighbour']:.1%} of nearest neighbours kept")
    if quality.get("bytes_vs_float16") is not None:
        parts.append(f"{quality['bytes_vs_float16']:.3g} of float16's bytes")
    return ", ".join(parts)


def ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first; what does not fit is one row."""
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = rows[BINS - 1 :] if len(rows) > BINS else []
    return [*rows[: len(rows) - len(rest)], *([(f"{len(rest)} other sizes", sum(count for _, count in rest))] if rest else [])]


def histogram(values: Sequence[int]) -> list[tuple[str, int]]:
    """Whole numbers in at most BINS rows of equal width; every value is in exactly one."""
    if not values:
        return []
    least = min(values)
    width = -(-(max(values) - least + 1) // BINS)
    counts = Counter((value - least) // width for value in values)
    rows = []
    for number in range(max(counts) + 1):
        first, last = least + number * width, least + (number + 1) * width - 1
        rows.append((str(first) if width == 1 else f"{first}-{min(last, max(values))}", counts[number]))
    return rows


def bars(rows: Iterable[tuple[str, int]]) -> list[str]:
    """`label count ####`, the longest bar BAR characters wide; what is there at all has one character."""
    rows = list(rows)
    if not rows:
        return []
    most, labels, digits = max(count for _, count in rows), *(max(len(str(row[part])) for row in rows) for part in (0, 1))
    return [f"{label:>{labels}} {count:>{digits}} {'#' * -(-count * BAR // most)}".rstrip() for label, count in rows]


def _range(values: Sequence[int]) -> str:
    if not values:
        return "none"
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


if __name__ == "__main__":
    sys.exit(run_command(main))
