"""Evaluation: whole videos -> label maps -> scores, each video exactly once over all ranks.

`python -m trainer.evaluate run=runs/NAME [root=SHARDS split=validation step=N]` scores a run's checkpoint again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from data_pipeline.batch import ClipBatch
    from data_pipeline.loader import VideoLoader
    from trainer.checkpoint import Checkpoint
    from trainer.config import EvaluationConfig, RunConfig
    from trainer.model.network import VideoSlotModel
    from trainer.model.outputs import ModelOutput
    from trainer.preemption import StopRequest
    from trainer.report.render import GalleryItem

HELP = """python -m trainer.evaluate run=RUN_FOLDER [key=value ...]

Scores a finished (or running) run's checkpoint on whole videos and prints the table.

  run=FOLDER      run folder, for example runs/demo
  step=N          checkpoint to score (default: the newest that verifies)
  root=SHARDS     other shards than the run was trained on
  split=NAME      split of the shards (default: the run's data.val_split)
  limit=N         first so many videos
  input=features  features as the shards hold them, or frames: taken from the shards' frames (default: as in training)
  weights=FILE    input=frames: the extractor's weights, where they lie elsewhere than in training
  maps=[object,attn]   which maps are scored
  merge=false     score with SSync's redundant slots merged
  baselines=true  print the baselines beside the model
  device=auto     auto | cpu | cuda
  out=FILE        where the scores are written as JSON (default: RUN_FOLDER/evaluation.json)
"""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by name ("video_fg_ari" of the first map, "attn_video_fg_ari" of another), and pictures on rank 0."""

    scores: dict[str, float]
    gallery: list[GalleryItem]
    num_videos: int


def evaluate_model(
    model: VideoSlotModel, loader: VideoLoader, config: RunConfig, num_pictures: int = 0, stop: StopRequest | None = None
) -> Evaluation:
    """Score a model's object and attention maps. Collective: every rank calls it with its own loader.

    Beside the segmentation scores: used_slots, the share of slots that own a patch of the video, and map_agreement, the ARI
    between attention and object labels over its patches; both are means over videos.
    Raises Interrupted on all ranks between two videos once `stop` came to one of them.
    """
    from trainer import distributed
    from trainer.metrics.diagnostics import label_agreement, used_slots
    from trainer.objective.ssync import select
    from trainer.report.choice import Candidates, merit

    shown: Candidates[GalleryItem] = Candidates(num_pictures)
    seen: list[ModelOutput] = []  # of the newest video
    diagnosed: list[tuple[float, float]] = []

    def predict(batch: ClipBatch) -> dict[str, Tensor]:
        output = _segment(model, batch, config)
        seen[:] = [output]
        if batch.num_real:
            objects, attended = output.object_logits[0].argmax(1), output.attn_logits[0].argmax(1)
            diagnosed.append((used_slots(objects, config.model.num_slots), label_agreement(attended, objects)))
        size = mask_size(config, batch)
        labels = {name: _labels(getattr(output, f"{name}_maps")()[0].float(), batch.grid, size) for name in config.evaluate.maps}
        if config.evaluate.merge:
            chosen = select(output.attn_logits, output.object_logits, output.grid, config.objective.ssync)
            labels = {name: chosen.slot_map[0][value.long()] for name, value in labels.items()}
        return labels

    def offer(batch: ClipBatch, own: Mapping[str, float | None]) -> None:
        if num_pictures:
            shown.offer(batch.sample_ids[0], merit(own), lambda: _picture(seen[0], batch, config))

    scores, per_video = score(predict, loader, config, config.evaluate.maps, stop, offer)
    found = [values for part in distributed.gather_objects(diagnosed) for values in part]
    if found:
        scores["used_slots"], scores["map_agreement"] = (math.fsum(values) / len(found) for values in zip(*found, strict=True))
    return Evaluation(scores=scores, gallery=_gather_gallery(shown.pictures, per_video, num_pictures), num_videos=len(per_video))


def evaluate_baselines(
    loader: VideoLoader, config: RunConfig, untrained: VideoSlotModel, stop: StopRequest | None = None
) -> dict[str, dict[str, float]]:
    """What a number means: an untrained model, a grid of blocks, k-means on the same features, the ceiling of the patch grid.

    Collective.
    """
    from trainer.metrics.baselines import as_maps, grid_of_blocks, k_means, patch_ceiling
    from trainer.metrics.segmentation import resize_ids, upsample_labels

    slots = config.model.num_slots

    def predict(batch: ClipBatch) -> dict[str, Tensor]:
        truth = _truth(batch, loader)
        size, features = mask_size(config, batch), batch.decoded()[0].cpu()
        output = _segment(untrained, batch, config)
        patches = {
            "grid": grid_of_blocks(slots, features.shape[0], batch.grid),
            "k_means": k_means(features, slots, seed=config.seed),
        }
        labels = {name: _labels(as_maps(value, slots), batch.grid, size) for name, value in patches.items()}
        ceiling = patch_ceiling(resize_ids(truth, size), batch.grid)
        labels["patch_ceiling"] = upsample_labels(ceiling, batch.grid, size)
        return {"untrained": _labels(output.object_maps()[0].float(), batch.grid, size), **labels}

    names = ["untrained", "grid", "k_means", "patch_ceiling"]
    scores, _ = score(predict, loader, config, names, stop)
    tables: dict[str, dict[str, float]] = {name: {} for name in names}
    for key, value in scores.items():
        name = next((name for name in names[1:] if key.startswith(name + "_")), names[0])
        tables[name][key.removeprefix(name + "_")] = value
    return tables


def score(
    predict: Callable[[ClipBatch], Mapping[str, Tensor]],
    loader: VideoLoader,
    config: RunConfig,
    names: list[str],
    stop: StopRequest | None = None,
    scored: Callable[[ClipBatch, Mapping[str, float | None]], None] = lambda batch, own: None,
) -> tuple[dict[str, float], dict[int, dict[str, float | None]]]:
    """Scores of every named prediction over all ranks, and each video's own scores of the first name. Collective.

    `scored` hears each video's own scores of the first name as soon as they are known, on the rank that scored it.
    """
    from trainer import distributed
    from trainer.metrics.segmentation import SegmentationScores, resize_ids
    from trainer.preemption import Interrupted

    rules = (config.evaluate.empty_foreground, loader.dataset.index.background_labelled)
    tables = {name: SegmentationScores(*rules) for name in names}
    per_video: dict[int, dict[str, float | None]] = {}
    for batch in loader:
        if stop is not None and not distributed.agree(not stop.requested):
            raise Interrupted
        labels = predict(batch)  # also for padding, so that all ranks make the same calls
        if not batch.num_real:
            continue
        truth = resize_ids(_truth(batch, loader), mask_size(config, batch))
        own = {name: tables[name].add(truth, labels[name]) for name in names}
        per_video[batch.sample_ids[0]] = own[names[0]]
        scored(batch, own[names[0]])
    everyone = distributed.gather_objects(({name: table.state() for name, table in tables.items()}, per_video))
    merged: dict[str, float] = {}
    for name in names:
        result = SegmentationScores(*rules).merge([states[name] for states, _ in everyone]).result()
        prefix = "" if name == names[0] else name + "_"
        merged |= {prefix + key: value for key, value in result.items() if value is not None}
    return merged, {key: value for _, videos in everyone for key, value in videos.items()}


def mask_size(config: RunConfig, batch: ClipBatch) -> tuple[int, int]:
    """Height and width that masks are scored at: the backbone's input size as in the released configurations."""
    side = config.evaluate.mask_size or config.data.image_size
    return side, side


def _truth(batch: ClipBatch, loader: VideoLoader) -> Tensor:
    """Instance ids (T, h, w) of the batch's video."""
    from data_pipeline.errors import DataError

    if batch.instance_ids is None:
        raise DataError(
            f"{loader.dataset.folder}: sample {batch.keys[0]} has no masks; scores need annotated videos; "
            "set evaluate.at_end=false and evaluate.every_steps=0, or choose another data.val_split"
        )
    return batch.instance_ids[0]


def _segment(model: VideoSlotModel, batch: ClipBatch, config: RunConfig) -> ModelOutput:
    import torch

    from trainer.engine import choose_precision

    device = next(model.parameters()).device
    bf16 = choose_precision(config.parallel.precision, device) == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model.segment(batch.to(device).decoded(), config.model.eval_decode_frames)


def _labels(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    from trainer.metrics.segmentation import label_map

    return label_map(maps, grid, size)


def _picture(output: ModelOutput, batch: ClipBatch, config: RunConfig) -> GalleryItem:
    """What the report shows of one video, as small arrays on the host."""
    from trainer.objective.ssync import select
    from trainer.report.render import MAPS, GalleryItem, shrink

    chosen = select(output.attn_logits, output.object_logits, output.grid, config.objective.ssync)
    maps = {name: getattr(chosen, name)[0].cpu().numpy() for name in MAPS}
    assert batch.frames is not None
    truth = None if batch.instance_ids is None else batch.instance_ids[0].numpy()
    return shrink(GalleryItem(key=batch.keys[0], frames=batch.frames[0].numpy(), truth=truth, grid=batch.grid, **maps))


def _gather_gallery(
    own: Mapping[int, GalleryItem], per_video: Mapping[int, Mapping[str, float | None]], num_pictures: int
) -> list[GalleryItem]:
    """The best and the worst of all ranks' videos, best first, with their scores and places. Collective."""
    from dataclasses import replace

    from trainer import distributed
    from trainer.report.choice import best_and_worst, merit

    merits = {number: merit(scores) for number, scores in per_video.items()}
    chosen = best_and_worst(merits, num_pictures)
    ranked = best_and_worst({number: value for number, value in merits.items() if value is not None}, len(merits))
    parts = distributed.gather_objects({number: own[number] for number in chosen if number in own})
    items = {number: item for part in parts for number, item in part.items()}
    return [
        replace(
            items[number],
            scores={key: value for key, value in per_video[number].items() if value is not None},
            place=ranked.index(number) + 1 if number in ranked else 0,
            num_videos=len(ranked),
        )
        for number in chosen
    ]


def main(argv: list[str]) -> int:
    if not argv or "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return 0
    from data_pipeline.compose import compose
    from trainer.config import EvaluationConfig

    return evaluate_run(compose("evaluate", EvaluationConfig, argv))


def evaluate_run(settings: EvaluationConfig) -> int:
    """Score a run folder's checkpoint; print the table and write the scores."""
    import json
    import sys
    from dataclasses import replace
    from pathlib import Path

    from data_pipeline.errors import ConfigError
    from data_pipeline.files import write_atomically
    from data_pipeline.remote.address import shown
    from trainer import checkpoint, distributed
    from trainer.build import Made, build_model, build_online, build_video_loader, check_extractor
    from trainer.engine import choose_device
    from trainer.observe.console import Console
    from trainer.observe.serving import EvaluationMetrics
    from trainer.run_folder import read_config

    run = Path(settings.run)
    out = Path(settings.out) if settings.out else run / "evaluation.json"
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder; the scores are one file; give out={out / 'scores.json'}")
    config = _choose_input(read_config(run), settings)
    device, world = choose_device(settings.device), distributed.world_from_environment()
    online = build_online(config, device)  # before other shards are named: the run's own know its extractor
    data = replace(
        config.data,
        root=settings.root or config.data.root,
        val_split=settings.split or config.data.val_split,
        val_limit=settings.limit if settings.limit is not None else config.data.val_limit,
    )
    config = replace(config, data=data, evaluate=replace(config.evaluate, maps=settings.maps, merge=settings.merge))
    distributed.start(device, config.parallel.timeout_s)
    found = choose_checkpoint(run, settings.step)
    model = build_model(config.model, config.seed).to(device)
    untrained = build_model(config.model, config.seed).to(device)
    checkpoint.load_weights(model, found)
    with EvaluationMetrics(config, run, world.rank) as metrics, build_video_loader(config, world, online) as loader:
        check_extractor(Made.of(loader.dataset, online), found.state.features)
        result = evaluate_model(model, loader, config)
        metrics.scored(result.scores)
        baselines = evaluate_baselines(loader, config, untrained) if settings.baselines else {}
    if world.rank == 0:
        content = {
            "step": found.state.step,
            "shards": shown(data.root),
            "split": data.val_split,
            "videos": result.num_videos,
            "scores": result.scores,
        }
        write_atomically(out, json.dumps(content | {"baselines": baselines}, indent=1))
        flat = {f"metric/{key}": value for key, value in result.scores.items()}
        flat |= {f"baseline/{name}/{key}": value for name, table in baselines.items() for key, value in table.items()}
        title = f"{run.name}, step {found.state.step}: {result.num_videos} videos of {shown(data.root)}/{data.val_split}, in %"
        Console(0, stream=sys.stdout).score_table(flat, title)
        print(f"written: {out}")
    distributed.stop()
    return 0


def _choose_input(config: RunConfig, settings: EvaluationConfig) -> RunConfig:
    """What the run was trained on, stored features or frames, or the other."""
    from dataclasses import replace

    chosen = settings.input or config.data.input
    online = replace(config.data.online, weights=settings.weights or config.data.online.weights)
    codec = config.data.codec if chosen == config.data.input else None
    return replace(config, data=replace(config.data, input=chosen, online=online, codec=codec))


def choose_checkpoint(run: Path, step: int | None) -> Checkpoint:
    """A run's checkpoint of `step`, or its newest that verifies. Raises ConfigError when there is none such."""
    from data_pipeline.errors import ConfigError
    from trainer import checkpoint

    root = run / "checkpoints"
    if step is None:
        found = checkpoint.load_newest(root, report=print)
        if found is None:
            raise ConfigError(f"run={run}; it has no checkpoint yet; train it first, or name another run folder")
        return found
    path = root / checkpoint.folder_name(step)
    reason = checkpoint.problem(path)
    if reason:
        have = ", ".join(str(int(item.name[5:])) for item in checkpoint.candidates(root)) or "none"
        raise ConfigError(f"step={step}: {path} does not verify ({reason}); choose one of {have}")
    return checkpoint.read(path)


if __name__ == "__main__":
    from trainer.process import run_as_rank

    run_as_rank(main)
