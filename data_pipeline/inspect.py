"""Command: what is in these shards. `python -m data_pipeline.inspect SHARDS`

Comes in: a folder with shards, or with splits of shards. Goes out: counts, sizes, how the features were made, and one contact
sheet per split: a few videos, a few frames each, annotated objects outlined.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from data_pipeline.compose import run_command
from data_pipeline.files import write_atomically
from data_pipeline.progress import format_bytes
from data_pipeline.shards import DatasetIndex
from data_pipeline.store import ShardDataset, find_splits

TILE = 160  # side of a frame on the sheet, pixels
GOLDEN = 0.618034  # hues a golden section apart stay apart for any number of objects


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.inspect", description="Show what built shards hold.")
    parser.add_argument("shards", help="folder of a build, or of one of its splits")
    parser.add_argument("--out", help="folder for the contact sheets; default: beside the shards")
    parser.add_argument("--videos", type=int, default=6, help="rows of a contact sheet; 0: none")
    parser.add_argument("--frames", type=int, default=6, help="frames of a row")
    options = parser.parse_args(argv)
    for folder in find_splits(options.shards):
        dataset = ShardDataset.open(folder)
        print("\n".join(describe(folder, dataset.index)))
        if options.videos > 0 and any(sample.members["frames"] for sample in dataset.index.samples):
            name = f"{dataset.index.dataset['split']}.png" if options.out else "contact_sheet.png"
            path = Path(options.out or folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(path, contact_sheet(dataset, options.videos, options.frames))
            print(f"  contact sheet   {path}")
        dataset.close()
    return 0


def describe(folder: Path, index: DatasetIndex) -> list[str]:
    """Lines for a person."""
    made = index.features
    frames = [sample.frames for sample in index.samples]
    objects = [sample.num_instances for sample in index.samples if sample.num_instances is not None]
    sizes = sorted({f"{sample.size[1]}x{sample.size[0]}" for sample in index.samples})
    stored = sum(place["length"] for sample in index.samples for place in sample.members["features"].values())
    error = "not measured" if index.codec_error is None else f"{index.codec_error:.2g} of a channel's deviation"
    lines = {
        "dataset": f"{index.dataset['source']}, split {index.dataset['split']}, version {index.version[:12]}",
        "videos": f"{len(frames)}, {len(index.skipped)} skipped, frames {min(frames)} to {max(frames)}, {sum(frames)} in all",
        "native size": ", ".join(sizes[:4]) + (f" and {len(sizes) - 4} more" if len(sizes) > 4 else ""),
        "objects": f"{min(objects)} to {max(objects)} a video" if objects else "not annotated",
        "features": f"{made['extractor']}, layer {made['layer']}, {made['grid'][0]}x{made['grid'][1]} patches x {made['width']}",
        "made from": f"{made['image_size']} pixels, resize {made['resize']}, views {', '.join(made['views'])}",
        "fingerprint": str(made["fingerprint"])[:12],
        "codec": f"{made['codec']}, error {error}",
        "size": f"{format_bytes(sum(shard['bytes'] for shard in index.shards))} in {len(index.shards)} shards, "
        f"features {format_bytes(stored)}",
    }
    skipped = [f"  skipped         {skip['key']}: {skip['reason']}" for skip in index.skipped]
    return [str(folder)] + [f"  {name:<15} {text}" for name, text in lines.items()] + skipped


def contact_sheet(dataset: ShardDataset, num_videos: int, num_frames: int) -> np.ndarray:
    """Evenly chosen videos as rows, evenly chosen frames as columns. Shapes: uint8 (rows * TILE, columns * TILE, 3)."""
    total = len(dataset)
    chosen = np.unique(np.linspace(0, total - 1, min(num_videos, total)).astype(int))
    rows = []
    for sample_id in chosen:
        last = dataset.index.samples[int(sample_id)].frames - 1
        columns = np.linspace(0, last, num_frames).astype(int)
        rows.append(np.concatenate([_tile(dataset, int(sample_id), int(frame)) for frame in columns], axis=1))
    return np.concatenate(rows)


def _tile(dataset: ShardDataset, sample_id: int, frame: int) -> np.ndarray:
    from PIL import Image

    pixels = dataset.frames(sample_id, frame, 1)
    if pixels is None:
        return np.zeros((TILE, TILE, 3), np.uint8)
    tile = np.array(Image.fromarray(pixels[0]).resize((TILE, TILE), Image.Resampling.BILINEAR))
    ids = dataset.instance_ids(sample_id, frame, 1)
    return tile if ids is None else outline(tile, _nearest(ids[0], TILE))


def outline(pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Colour the inner border of every object. Shapes: pixels uint8 (H, W, 3), ids (H, W); 0 is left alone."""
    padded = np.pad(ids, 1, mode="edge")
    height, width = ids.shape
    shifted = [padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    border = np.any([other != ids for other in shifted], axis=0) & (ids > 0)
    result = pixels.copy()
    result[border] = _colours(ids[border])
    return result


def _colours(ids: np.ndarray) -> np.ndarray:
    """A bright colour for each id. Shapes: (N,) -> uint8 (N, 3)."""
    hue = (ids.astype(np.float64) * GOLDEN % 1.0)[:, None]
    wave = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6.0 - 3.0) - 1.0
    return (np.clip(wave, 0.0, 1.0) * 255).astype(np.uint8)


def _nearest(ids: np.ndarray, size: int) -> np.ndarray:
    rows, columns = (((np.arange(size) + 0.5) * side / size).astype(int) for side in ids.shape)
    return ids[rows[:, None], columns]


def _save(path: Path, pixels: np.ndarray) -> None:
    from data_pipeline.shards import encode_image

    write_atomically(path, encode_image(pixels, "png"))


if __name__ == "__main__":
    sys.exit(run_command(main))
