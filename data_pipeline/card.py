"""Command, and last step of a build: a dataset card beside the splits. `python -m data_pipeline.card FOLDER`

Comes in: the indexes of a build, and its settings.json where that lies there. Goes out: Markdown. It follows from what was built
alone: no date, no path of a machine, so that the same build has the same card.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.compose import run_command
from data_pipeline.errors import DataError
from data_pipeline.files import write_atomically
from data_pipeline.inspect import codec_error, ranked
from data_pipeline.progress import format_bytes
from data_pipeline.shards import INDEX_NAME, DatasetIndex, read_json, view_member

CARD_NAME, OTHER_NAME = "README.md", "DATASET_CARD.md"
MARK = "<!-- Written by python -m data_pipeline.build. It is written anew by the next build. -->"
SHOWN_SKIPS = 20
ABSOLUTE = re.compile(r"(?<![\w.])/(?:[^/\s:;,']+/)+")
SETTINGS_SHOWN_ELSEWHERE = ("name", "image_size", "resize", "train_views")


class Origin(NamedTuple):
    """Where a source's videos come from."""

    title: str
    citation: str
    terms: str


CHECKING = """\
Check every byte: `python -m data_pipeline.verify FOLDER`. Look at them: `python -m data_pipeline.inspect FOLDER`. The version of
a split is a hash of its whole index, which holds the sha256 of every shard: equal versions are equal data.
"""
OWN = "made by this project's code; Apache-2.0, like the code"
UNKNOWN = Origin("", "", "those of the videos and annotations that the shards were made from")
ORIGINS: dict[str, Origin] = {
    "movi": Origin(
        "MOVi", "Greff et al., Kubric: a scalable dataset generator, CVPR 2022", "see https://github.com/google-research/kubric"
    ),
    "ytvis": Origin(
        "YouTube-VIS, or OVIS in the same layout",
        "Yang et al., Video instance segmentation, ICCV 2019; Qi et al., Occluded video instance segmentation, IJCV 2022",
        "see https://youtube-vos.org/dataset/vis and https://songbai.site/ovis",
    ),
    "davis": Origin(
        "DAVIS 2017",
        "Pont-Tuset et al., The 2017 DAVIS challenge on video object segmentation, 2017",
        "see https://davischallenge.org",
    ),
    "coco": Origin(
        "COCO 2017",
        "Lin et al., Microsoft COCO: common objects in context, ECCV 2014",
        "see https://cocodataset.org/#termsofuse",
    ),
    "voc": Origin(
        "Pascal VOC 2012",
        "Everingham et al., The Pascal visual object classes challenge: a retrospective, IJCV 2015",
        "see http://host.robots.ox.ac.uk/pascal/VOC",
    ),
    "clevrtex": Origin(
        "ClevrTex",
        "Karazija et al., ClevrTex: a texture-rich benchmark for unsupervised multi-object segmentation, NeurIPS 2021",
        "see https://www.robots.ox.ac.uk/~vgg/data/clevrtex",
    ),
    "physics": Origin("slotstream-physics: simulated clips", "Slotstream", OWN),
    "synthetic": Origin("Generated clips of textured shapes", "Slotstream", OWN),
    "official_shards": Origin("Shards of the released code of SlotContrast, SRL or SSync", "", "those of the original dataset"),
    "video_files": Origin("A folder of video files", "", "those of the videos"),
    "images": Origin("A folder of pictures", "", "those of the pictures"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.card",
        description=f"Write the dataset card of built shards anew: {CARD_NAME} (of a README that is not ours: {OTHER_NAME}).",
    )
    parser.add_argument("shards", help="folder of a build, with its splits below")
    print(write_card(Path(parser.parse_args(argv).shards)))
    return 0


def write_card(out: Path) -> Path:
    """Write the card of the build in `out`; returns where. A README.md that someone else wrote is left alone.

    Raises DataError when there is no index, or one is damaged.
    """
    path = out / CARD_NAME
    if path.exists() and not path.read_text("utf-8", "replace").startswith(MARK):
        path = out / OTHER_NAME
    write_atomically(path, card(out))
    return path


def card(out: Path) -> str:
    """The card's text."""
    indexes = {path.parent.name: DatasetIndex.load(path.parent) for path in out.glob(f"*/{INDEX_NAME}")}
    if not indexes:
        raise DataError(
            f"{out}: no {INDEX_NAME} one level below; splits are needed; build them with python -m data_pipeline.build"
        )
    splits = dict(sorted(indexes.items(), key=lambda item: (item[0] != "train", item[0])))
    first = next(iter(splits.values()))
    parts = [
        f"{MARK}\n\n# {_origin(first).title or first.dataset['source']}{_with_features(first)}\n",
        _about(first, _source_settings(out)),
        _table(splits),
        _features(splits),
        _loading(splits),
        _skipped(splits),
    ]
    return "\n".join(part for part in parts if part)


def _with_features(index: DatasetIndex) -> str:
    return f" with {index.features['extractor']} features" if index.has_features else ": frames"


def _origin(index: DatasetIndex) -> Origin:
    return ORIGINS.get(str(index.dataset["source"]), UNKNOWN)


def _source_settings(out: Path) -> dict[str, Any]:
    """How the dataset was read, where the build left that behind."""
    path = out / "settings.json"
    values = read_json(path, "the settings of a build", "build again") if path.exists() else {}
    source = values.get("source")
    return (
        {name: value for name, value in source.items() if name not in SETTINGS_SHOWN_ELSEWHERE}
        if isinstance(source, dict)
        else {}
    )


def _about(index: DatasetIndex, settings: Mapping[str, Any]) -> str:
    origin = _origin(index)
    annotated = any(sample.num_instances is not None for sample in index.samples)
    meaning = "annotated background" if index.background_labelled else "not annotated"
    rows = {
        "source": f"`{index.dataset['source']}`" + "".join(f", {name}={settings[name]}" for name in sorted(settings)),
        "cite": origin.citation,
        "terms": f"{origin.terms}. Shards with frames hold the pictures themselves: check the terms before you pass them on.",
        "instance ids": f"1..n are objects, the same in every frame of a video; 0 is {meaning}" if annotated else "",
    }
    lines = [f"- **{name}**: {text}" for name, text in rows.items() if text]
    intro = "WebDataset shards of Slotstream: every sample is a video (or a picture)"
    intro += " with patch features of a frozen extractor." if index.has_features else "; features are taken in training."
    return f"{intro}\n\n" + "\n".join(lines) + "\n"


def _table(splits: Mapping[str, DatasetIndex]) -> str:
    head = ("split", "videos", "frames", "a video", "native size", "objects a video", "shards", "bytes", "left out", "version")
    rows = [head, ("---",) * len(head)] + [_row(name, index) for name, index in splits.items()]
    return "## Splits\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(name: str, index: DatasetIndex) -> tuple[str, ...]:
    frames = [sample.frames for sample in index.samples]
    objects = [sample.num_instances for sample in index.samples if sample.num_instances is not None]
    sizes = ranked(Counter(f"{sample.size[1]}x{sample.size[0]}" for sample in index.samples))
    shown = ", ".join(f"{size} ({count})" for size, count in sizes[:3]) if len(sizes) > 1 else "".join(size for size, _ in sizes)
    return (
        name,
        f"{len(frames):,}",
        f"{sum(frames):,}",
        _span(frames),
        shown + (", ..." if len(sizes) > 3 else ""),
        _span(objects) if objects else "not annotated",
        f"{len(index.shards):,}",
        format_bytes(sum(shard["bytes"] for shard in index.shards)),
        f"{len(index.skipped):,}",
        f"`{index.version[:16]}`",
    )


def _span(values: list[int]) -> str:
    if not values:
        return "-"
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}, mean {sum(values) / len(values):.1f}"


def _features(splits: Mapping[str, DatasetIndex]) -> str:
    first = next(iter(splits.values()))
    made, grid = first.features, first.grid
    if not first.has_features:
        return ""
    rows = {
        "extractor": f"`{made['extractor']}`, layer `{made['layer']}`, fingerprint `{str(made['fingerprint'])[:16]}`",
        "shape": f"{grid[0]} x {grid[1]} patches x {made['width']} channels a frame, row by row",
        "input": f"squares of {made['image_size']} pixels, resize `{made['resize']}`; patches of {made['patch_size']} pixels",
        **{f"views, {name}": f"`{'`, `'.join(index.features['views'])}`" for name, index in splits.items()},
        **{f"codec, {name}": f"`{index.features['codec']}`: {codec_error(index)}" for name, index in splits.items()},
    }
    return "## Features\n\n" + "\n".join(f"- **{name}**: {text}" for name, text in rows.items()) + "\n"


def _loading(splits: Mapping[str, DatasetIndex]) -> str:
    """Every line of code here is run by the tests."""
    name, index = next(iter(splits.items()))
    if not index.has_features:
        return _loading_frames(name, index)
    made, view = index.features, str(index.features["views"][0])
    settings = {
        "root": "FOLDER",
        "train_split": name,
        "val_split": "validation" if "validation" in splits else list(splits)[-1],
        "features": made["extractor"],
        "layer": made["layer"],
        "image_size": made["image_size"],
        "views": f"[{', '.join(made['views'])}]",
    }
    train = " ".join(f"data.{key}={str(value).replace(', ', ',')}" for key, value in settings.items())
    shards = index.shards
    last = f"{{000000..{len(shards) - 1:06d}}}" if len(shards) > 1 else "000000"
    decode = "features = stored"
    if stored_in_codes(index):
        decode = (
            'made = json.load(open("FOLDER/' + name + '/index.json"))["features"]["statistics"]\n'
            '    tokens = stored["q"] * stored["scale"].astype(np.float32)[..., None]\n'
            '    features = tokens * np.float32(made["scale"]) + np.float32(made["mean"])'
        )
    return f"""## Loading

Train on them (the model's grid must be {list(made["grid"])}):

```bash
python -m trainer.main {train}
```

Read a window of frames, checked against its checksums:

```python
from data_pipeline.store import ShardDataset

split = ShardDataset.open("FOLDER/{name}")
features = split.features(0, "{view}", start=0, count=1)  # float32 (1, {index.num_patches}, {made["width"]})
frames, ids = split.frames(0, 0, 1), split.instance_ids(0, 0, 1)  # as the view shows them, native size; None where there are none
```

Without Slotstream, with stock webdataset (nothing is checked then):

```python
import io
import json

import numpy as np
import webdataset

for sample in webdataset.WebDataset("FOLDER/{name}/{name}-{last}.tar", shardshuffle=False):
    stored = np.load(io.BytesIO(sample["{view_member(view)}"]), allow_pickle=False)
    {decode}
    print(sample["__key__"], features.shape, json.loads(sample["meta.json"]))
    break
```

{CHECKING}"""


def _loading_frames(name: str, index: DatasetIndex) -> str:
    settings = f"data.root=FOLDER data.train_split={name} data.image_size={index.features['image_size']} data.input=frames"
    return f"""## Loading

Train on them, with features of an extractor of your choice (the model's grid and feature_dim must be its):

```bash
python -m trainer.main {settings} data.features=dinov2_vits14
```

Read a window of frames, checked against its checksums:

```python
from data_pipeline.store import ShardDataset

split = ShardDataset.open("FOLDER/{name}")
frames, ids = split.frames(0, 0, 1), split.instance_ids(0, 0, 1)  # of the centre, native size; ids are None where there are none
```

{CHECKING}"""


def stored_in_codes(index: DatasetIndex) -> bool:
    """Whether channel statistics are needed to read the features."""
    return bool(index.features.get("statistics"))


def _skipped(splits: Mapping[str, DatasetIndex]) -> str:
    skipped = [(name, skip) for name, index in splits.items() for skip in index.skipped]
    if not skipped:
        return ""
    lines = [f"- {name}, `{skip['key']}`: {ABSOLUTE.sub('', str(skip['reason']))}" for name, skip in skipped[:SHOWN_SKIPS]]
    rest = len(skipped) - SHOWN_SKIPS
    lines += [f"- and {rest:,} more: `skipped` in the splits' {INDEX_NAME}"] if rest > 0 else []
    return "## Left out\n\nThese could not be read when the shards were built.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
