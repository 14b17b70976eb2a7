"""Settings of the data half: how a dataset becomes shards, and how shards become batches. No torch import here."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from data_pipeline.errors import ConfigError, check_at_least, check_choice, check_distinct, check_path, check_share

RESIZE_RULES = ("stretch", "crop")
DIFFICULTIES = ("easy", "movi_c", "movi_e")


@dataclass(kw_only=True)
class SourceConfig:
    """A dataset on disk and how its frames are prepared. Members of the group `source` extend it."""

    name: str = MISSING  # which reader: a key of data_pipeline.sources.SOURCES
    image_size: int = 336  # frames are brought to image_size x image_size
    resize: str = "stretch"  # stretch: squash to a square (MOVi); crop: short side to image_size, then a square crop
    train_views: list[str] = field(default_factory=lambda: ["center", "center+hflip"])  # stored views; one is drawn per clip

    def __post_init__(self) -> None:
        check_choice("source.resize", self.resize, RESIZE_RULES)
        check_at_least("source.image_size", self.image_size, 1)
        check_distinct("source.train_views", self.train_views)


@dataclass(kw_only=True)
class MoviSource(SourceConfig):
    """MOVi-A..F as TFDS wrote it: TFRecords beside features.json."""

    name: str = "movi"
    variant: str | None = None  # movi_a ... movi_f; None: the one that lies under root


@dataclass(kw_only=True)
class YtvisSource(SourceConfig):
    """YouTube-VIS: instances.json beside JPEGImages/."""

    name: str = "ytvis"
    image_size: int = 518
    resize: str = "crop"
    train_views: list[str] = field(default_factory=lambda: ["center", "crop0", "crop1"])
    num_validation: int = 300  # the last so many videos of the train file, in file order (SlotContrast's split)
    short_side: int | None = None  # bring frames and masks to this short side first, nearest pixel; None: leave them as they are

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_at_least("source.num_validation", self.num_validation, 0)
        if self.short_side is not None:
            check_at_least("source.short_side", self.short_side, 1)


@dataclass(kw_only=True)
class DavisSource(SourceConfig):
    """DAVIS 2017 at 480p: JPEGImages/, palette PNGs and ImageSets/."""

    name: str = "davis"
    image_size: int = 518
    resize: str = "crop"
    train_views: list[str] = field(default_factory=lambda: ["center", "crop0", "crop1"])
    annotations: str = "unsupervised"  # unsupervised: every salient object; semi: the objects of the semi-supervised task

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_choice("source.annotations", self.annotations, ("unsupervised", "semi"))


@dataclass(kw_only=True)
class CocoSource(SourceConfig):
    """COCO 2017: images, each a clip of one frame."""

    name: str = "coco"
    image_size: int = 224
    resize: str = "crop"
    train_views: list[str] = field(
        default_factory=lambda: ["center", "center+hflip", "crop0", "crop0+hflip", "crop1", "crop1+hflip"]
    )


@dataclass(kw_only=True)
class SyntheticSource(SourceConfig):
    """Generated clips: textured objects that move, occlude and leave; exact masks; nothing is read from disk."""

    name: str = "synthetic"
    image_size: int = 96
    train_views: list[str] = field(default_factory=lambda: ["center", "center+hflip"])
    difficulty: str = "easy"  # easy | movi_c (3-10 objects, static camera) | movi_e (up to 23, moving camera)
    num_train: int = 400
    num_validation: int = 40
    num_frames: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_choice("source.difficulty", self.difficulty, DIFFICULTIES)
        check_at_least("source.image_size", self.image_size, 16)  # below that objects shrink to a pixel or two
        for name in ("num_frames", "num_train", "num_validation"):
            check_at_least(f"source.{name}", getattr(self, name), 1)
        check_at_least("source.seed", self.seed, 0)


@dataclass(kw_only=True)
class FeaturesConfig:
    """Which frozen extractor turns frames into patch features."""

    name: str = MISSING  # a key of data_pipeline.features.EXTRACTORS
    weights: str | None = None  # file or folder with the weights; None: the user's hub caches
    layer: str = "last_block"  # output of the last block before the final norm, CLS dropped
    batch_frames: int = 32  # frames per forward
    precision: str = "float32"  # float32 | bfloat16

    def __post_init__(self) -> None:
        check_choice("features.precision", self.precision, ("float32", "bfloat16"))
        check_at_least("features.batch_frames", self.batch_frames, 1)


@dataclass(kw_only=True)
class PatchFeatures(FeaturesConfig):
    """The weight-free descriptor: hand-made statistics of a patch, then a slow linear projection fitted on the dataset."""

    name: str = "patch"
    layer: str = "slow"
    patch_size: int = 8
    num_components: int = 24
    num_random: int = 256
    num_fit_clips: int = 200
    position_scale: float = 2.0  # size of the six position channels beside the slow ones; 1 learns slower, 0.5 hardly at all
    seed: int = 0


@dataclass(kw_only=True)
class BuildConfig:
    """`python -m data_pipeline.build`: dataset -> shards."""

    source: SourceConfig = MISSING
    features: FeaturesConfig = MISSING
    root: str | None = None  # the dataset's folder; a generated dataset needs none
    out: str = MISSING  # written: <out>/<split>/{index.json, *.tar}
    splits: list[str] = field(default_factory=lambda: ["train", "validation"])
    samples_per_shard: int = 32
    codec: str = "float16"
    frames: str = "jpeg"  # how frames are kept: jpeg | png | none
    jpeg_quality: int = 95
    workers: int = 0  # processes; 0: one for each usable core
    limit: int | None = None  # first so many videos of each split
    max_skip_fraction: float = 0.0  # share of unreadable videos that is counted and left out before the build stops
    overwrite: bool = False  # False: go on with what is there

    def __post_init__(self) -> None:
        check_path("out", self.out)
        check_path("root", self.root)
        check_distinct("splits", self.splits)
        check_at_least("samples_per_shard", self.samples_per_shard, 1)
        check_at_least("workers", self.workers, 0)
        if self.limit is not None:
            check_at_least("limit", self.limit, 1)
        if not 1 <= self.jpeg_quality <= 100:
            raise ConfigError(f"jpeg_quality={self.jpeg_quality}; a number from 1 to 100 is needed; 95 is the default")
        check_choice("frames", self.frames, ("jpeg", "png", "none"))
        check_share("max_skip_fraction", self.max_skip_fraction)


@dataclass(kw_only=True)
class DataConfig:
    """Shards as the trainer reads them. What stands in the shards must be what is asked for here."""

    root: str = MISSING  # folder that the build wrote
    train_split: str = "train"
    val_split: str = "validation"
    features: str = MISSING  # extractor the shards must hold
    layer: str = "last_block"
    image_size: int = 336
    clip_len: int = 4  # frames of a training clip: chunks aligned at multiples of clip_len
    views: list[str] = field(default_factory=lambda: ["center", "center+hflip"])
    block_shards: int = 8  # shards whose samples are shuffled together
    read_threads: int = 2
    prefetch_steps: int = 2
    val_limit: int | None = None  # first so many validation videos (YTVIS: 210 is what the official configuration scores)
    max_skip_fraction: float = 0.001  # share of damaged samples that is replaced and counted before the run stops

    def __post_init__(self) -> None:
        check_path("data.root", self.root)
        check_share("data.max_skip_fraction", self.max_skip_fraction)
        check_at_least("data.clip_len", self.clip_len, 1)
        check_at_least("data.read_threads", self.read_threads, 1)
        check_at_least("data.prefetch_steps", self.prefetch_steps, 1)
        check_distinct("data.views", self.views)
