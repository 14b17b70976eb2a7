"""Settings of the data half: how a dataset becomes shards, and how shards become batches. No torch import here."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from data_pipeline.errors import ConfigError, check_at_least, check_choice, check_distinct, check_path, check_share
from data_pipeline.progress import parse_bytes
from data_pipeline.views import parse_view

RESIZE_RULES = ("stretch", "crop")
DIFFICULTIES = ("easy", "movi_c", "movi_e")
PHYSICS_VARIANTS = ("movi_c", "movi_e", "easy")  # the place in this list is part of a clip's random numbers
PHYSICS_STEPS = 240  # of the simulation, in a second


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
class OfficialShardsSource(SourceConfig):
    """WebDataset shards of the released code: <dataset>-<split>-000000.tar with video.npy and segmentations.npy."""

    name: str = "official_shards"
    dataset: str | None = None  # movi_c, ytvis, ...: the first part of the shards' names; None: the one that lies under root
    masks: str = "auto"  # dense: one channel of ids; channels: one for each instance; auto: by the dataset's name

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_choice("source.masks", self.masks, ("auto", "dense", "channels"))


@dataclass(kw_only=True)
class FolderSource(SourceConfig):
    """A user's own files, without annotations. Validation is the folder validation/ or val/ where there is one, else a share."""

    image_size: int = 518
    resize: str = "crop"
    train_views: list[str] = field(default_factory=lambda: ["center", "crop0", "crop1"])
    validation_share: float = 0.1  # of the files, by a hash of their keys; unused where train/, validation/ or val/ exist
    frame_stride: int = 1  # keep every so many-th frame
    max_frames: int | None = None  # keep at most so many frames of a video, the first ones

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_share("source.validation_share", self.validation_share)
        check_at_least("source.frame_stride", self.frame_stride, 1)
        if self.max_frames is not None:
            check_at_least("source.max_frames", self.max_frames, 1)


@dataclass(kw_only=True)
class VideoFilesSource(FolderSource):
    """A folder of video files: mp4, mov, mkv, webm, avi. Needs the extra `video` (PyAV)."""

    name: str = "video_files"
    fps: float | None = None  # keep so many frames a second; None: as many as the file has. frame_stride counts what is left
    clip_frames: int | None = 64  # cut into pieces of at most so many kept frames, all about as long; None: whole videos

    def __post_init__(self) -> None:
        FolderSource.__post_init__(self)
        if self.fps is not None:
            check_at_least("source.fps", self.fps, 1e-3)
        if self.clip_frames is not None:
            check_at_least("source.clip_frames", self.clip_frames, 1)


@dataclass(kw_only=True)
class ImagesSource(FolderSource):
    """A folder of pictures: jpg, png, webp, bmp."""

    name: str = "images"
    layout: str = "images"  # images: each picture is a clip of one frame; frame_folders: each folder of pictures is a video

    def __post_init__(self) -> None:
        FolderSource.__post_init__(self)
        check_choice("source.layout", self.layout, ("images", "frame_folders"))


@dataclass(kw_only=True)
class VocSource(SourceConfig):
    """Pascal VOC 2012: pictures with object masks, each a clip of one frame."""

    name: str = "voc"
    image_size: int = 224
    resize: str = "crop"
    train_views: list[str] = field(
        default_factory=lambda: ["center", "center+hflip", "crop0", "crop0+hflip", "crop1", "crop1+hflip"]
    )
    train_list: str = "train"  # train | trainval | trainaug (10,582 pictures of SBD; it has no object masks, so none are read)

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_choice("source.train_list", self.train_list, ("train", "trainval", "trainaug"))


@dataclass(kw_only=True)
class ClevrTexSource(SourceConfig):
    """ClevrTex: rendered pictures with exact masks, each a clip of one frame."""

    name: str = "clevrtex"
    image_size: int = 224
    variant: str = "full"  # full | pbg | vbg | grassbg | camo | outd (outd has no train split: all of it is test)
    official_crop: bool = True  # the central square of 0.8 of the height, as the official loader cuts it

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_choice("source.variant", self.variant, ("full", "pbg", "vbg", "grassbg", "camo", "outd"))


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
class PhysicsSource(SourceConfig):
    """slotstream-physics: simulated clips with exact masks, depth and flow; needs pybullet, and nothing from disk."""

    name: str = "physics"
    image_size: int = 128
    variant: str = "movi_c"  # movi_c (3-10 objects, static camera) | movi_e (11-23, most at rest, moving camera) | easy (2-4)
    num_train: int = 500
    num_validation: int = 100
    num_test: int = 100
    num_frames: int = 24
    frame_rate: int = 12  # frames in a second; a divisor of 240
    resolution: int = 128  # clips are drawn and stored at resolution x resolution, whatever image_size the features need
    supersampling: int = 2  # colours are the mean of so many points across and down a pixel; 1 is faster, edges have jags
    shadows: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_choice("source.variant", self.variant, PHYSICS_VARIANTS)
        check_at_least("source.resolution", self.resolution, 16)  # below that objects shrink to a pixel or two
        for name in ("num_frames", "num_train", "num_validation", "num_test"):
            check_at_least(f"source.{name}", getattr(self, name), 1)
        check_at_least("source.seed", self.seed, 0)
        if not 1 <= self.supersampling <= 4:
            raise ConfigError(f"source.supersampling={self.supersampling}; 1 to 4 points across a pixel are needed; take 2")
        if self.frame_rate < 1 or PHYSICS_STEPS % self.frame_rate:
            raise ConfigError(f"source.frame_rate={self.frame_rate}; a divisor of {PHYSICS_STEPS} is needed; 12 is the default")


@dataclass(kw_only=True)
class FeaturesConfig:
    """Which frozen extractor turns frames into patch features."""

    name: str = MISSING  # a key of data_pipeline.features.EXTRACTORS
    weights: str | None = None  # file or folder with the weights; None: the user's hub caches; of patch: see there
    layer: str = "last_block"  # last_block: before the final norm | last_block_keys: of its attention (VideoSAUR); CLS dropped
    batch_frames: int = 32  # frames per forward
    precision: str = "float32"  # float32 | bfloat16

    def __post_init__(self) -> None:
        check_choice("features.precision", self.precision, ("float32", "bfloat16"))
        check_at_least("features.batch_frames", self.batch_frames, 1)


@dataclass(kw_only=True)
class PatchFeatures(FeaturesConfig):
    """The weight-free descriptor: hand-made statistics of a patch, then a slow linear projection fitted on the dataset.

    `weights`: projection.safetensors of another build, whose features these are to be like (for data.mixture); None: fit.
    """

    name: str = "patch"
    layer: str = "slow"
    patch_size: int = 8
    num_components: int = 24
    num_random: int = 256
    num_fit_clips: int = 200
    position_scale: float = 2.0  # size of the six position channels beside the slow ones; 1 learns slower, 0.5 hardly at all
    seed: int = 0

    def __post_init__(self) -> None:
        FeaturesConfig.__post_init__(self)
        check_at_least("features.position_scale", self.position_scale, 0)
        check_at_least("features.seed", self.seed, 0)


@dataclass(kw_only=True)
class BuildConfig:
    """`python -m data_pipeline.build`: dataset -> shards."""

    source: SourceConfig = MISSING
    features: FeaturesConfig = MISSING
    root: str | None = None  # the dataset's folder; a generated dataset needs none
    out: str = MISSING  # written: <out>/<split>/{index.json, *.tar}
    splits: list[str] = field(default_factory=lambda: ["train", "validation"])
    samples_per_shard: int = 32
    codec: str = "int8"  # how features are stored: int8 (channel statistics, then a scale per token) | float16 | float32
    codec_fit_frames: int = 256  # training frames that the channel statistics of int8 come from, of up to 64 videos
    frames: str = "jpeg"  # how frames are kept: jpeg | png | none
    jpeg_quality: int = 95
    workers: int = 0  # processes; 0: one for each usable core
    limit: int | None = None  # first so many videos of each split
    max_skip_fraction: float = 0.0  # share of unreadable videos that is counted and left out before the build stops
    overwrite: bool = False  # False: go on with what is there
    check_space: bool = True  # False: begin although the shards seem not to fit on the disk
    metrics_address: str = "127.0.0.1"  # interface where rank 0 serves the build's progress to Prometheus
    metrics_access: str | None = None  # a file: TLS, user and password for them (data_pipeline/metrics_access.py)
    targets_dir: str | None = None  # a folder that a long-lived Prometheus watches; the build is listed there while it works

    def __post_init__(self) -> None:
        check_path("out", self.out)
        check_path("root", self.root)
        check_path("targets_dir", self.targets_dir)
        check_path("metrics_access", self.metrics_access)
        check_distinct("splits", self.splits)
        check_at_least("samples_per_shard", self.samples_per_shard, 1)
        check_at_least("workers", self.workers, 0)
        check_at_least("codec_fit_frames", self.codec_fit_frames, 1)
        if self.limit is not None:
            check_at_least("limit", self.limit, 1)
        if not 1 <= self.jpeg_quality <= 100:
            raise ConfigError(f"jpeg_quality={self.jpeg_quality}; a number from 1 to 100 is needed; 95 is the default")
        check_choice("frames", self.frames, ("jpeg", "png", "none"))
        if self.frames == "none" and getattr(self.features, "name", "") == "none":
            raise ConfigError("features=none, frames=none; shards would hold nothing to train on; set frames=jpeg")
        check_share("max_skip_fraction", self.max_skip_fraction)


@dataclass(kw_only=True)
class RemoteConfig:
    """How shards behind a URL are fetched. What is read does not depend on it. Folders ignore it."""

    mode: str = "whole"  # whole: shards into a cache on this node's disk | ranges: only the frames needed, nothing is kept
    cache_dir: str | None = None  # None: below SLURM_TMPDIR, else below TMPDIR, else the user's cache folder
    cache_bytes: str = "200GB"  # shards that are kept; the least recently used go first. Less where the disk has less
    streams: int = 2  # shards that are fetched ahead at a time
    endpoint: str | None = None  # s3, gs: URL of the service; None: AWS_ENDPOINT_URL, else the provider's own
    stall_s: float = 30.0  # a connection that brings less than 64 KiB in so long is given up; the fetch goes on over a new one
    attempts: int = 8  # in a row that brought less than 1 MiB
    deadline_s: float = 600.0  # for these attempts together

    def __post_init__(self) -> None:
        check_choice("data.remote.mode", self.mode, ("whole", "ranges"))
        check_path("data.remote.cache_dir", self.cache_dir)
        check_at_least("data.remote.cache_bytes", parse_bytes("data.remote.cache_bytes", self.cache_bytes), 1)
        check_at_least("data.remote.streams", self.streams, 1)
        check_at_least("data.remote.attempts", self.attempts, 1)
        check_at_least("data.remote.stall_s", self.stall_s, 0.01)
        check_at_least("data.remote.deadline_s", self.deadline_s, 0)
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"data.remote.endpoint={self.endpoint}; a URL is needed; write it with http:// or https://")


@dataclass(kw_only=True)
class MixturePart:
    """A dataset among several that are trained on together. Its share of the stream is weight / sum of the weights."""

    root: str = MISSING  # folder that the build wrote
    weight: int = 1

    def __post_init__(self) -> None:
        check_path("data.mixture.root", self.root)
        if not 1 <= self.weight <= 1000:
            raise ConfigError(f"data.mixture.weight={self.weight}; a whole number from 1 to 1000 is needed; change data.mixture")


@dataclass(kw_only=True)
class OnlineConfig:
    """The frozen extractor in the training loop; data.features, data.layer and data.image_size say which and at what size."""

    weights: str | None = None  # file or folder; None: the user's hub caches, or projection.safetensors in data.root for patch
    batch_frames: int = 64  # frames per forward, on the training device
    precision: str = "auto"  # float32 | bfloat16 | auto: bfloat16 on cuda

    def __post_init__(self) -> None:
        check_path("data.online.weights", self.weights)
        check_at_least("data.online.batch_frames", self.batch_frames, 1)
        check_choice("data.online.precision", self.precision, ("auto", "float32", "bfloat16"))


@dataclass(kw_only=True)
class DataConfig:
    """Shards as the trainer reads them. What stands in the shards must be what is asked for here."""

    root: str = MISSING  # folder that the build wrote, or its URL: http(s)://, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, file://
    remote: RemoteConfig = field(default_factory=RemoteConfig)  # used where root is a URL
    train_split: str = "train"
    val_split: str = "validation"
    features: str = MISSING  # extractor the shards must hold
    layer: str = "last_block"
    image_size: int = 336
    input: str = "features"  # features: as the shards hold them | frames: taken from the shards' frames in every step
    online: OnlineConfig = field(default_factory=OnlineConfig)  # used where input=frames
    clip_len: int = 4  # frames of a training clip: chunks aligned at multiples of clip_len
    # One is drawn per clip. input=features: those that the shards hold. input=frames: any; crop* is a new random crop every time
    views: list[str] = field(default_factory=lambda: ["center", "center+hflip"])
    codec: str | None = None  # how the features must be stored: int8 | float16 | float32; None: as they are
    mixture: list[MixturePart] = field(default_factory=list)  # train on these instead of on root; root still holds val_split
    block_shards: int = 8  # shards of a lane whose samples are shuffled together
    lanes: int = 240  # parts of the order that run side by side, so that a rank keeps to few shards; fewer for small datasets
    read: str = "auto"  # mmap | pread | auto: mmap on local disks, pread on network file systems
    read_threads: int = 2
    prefetch_steps: int = 2
    val_limit: int | None = None  # first so many validation videos (YTVIS: 210 is what the official configuration scores)
    max_skip_fraction: float = 0.001  # share of damaged samples that is replaced and counted before the run stops

    def __post_init__(self) -> None:
        check_path("data.root", self.root)
        check_share("data.max_skip_fraction", self.max_skip_fraction)
        check_at_least("data.clip_len", self.clip_len, 1)
        check_at_least("data.read_threads", self.read_threads, 1)
        check_at_least("data.lanes", self.lanes, 1)
        check_choice("data.read", self.read, ("auto", "mmap", "pread"))
        if self.codec is not None:
            check_choice("data.codec", self.codec, ("int8", "float16", "float32"))
        check_at_least("data.prefetch_steps", self.prefetch_steps, 1)
        check_distinct("data.views", self.views)
        check_choice("data.input", self.input, ("features", "frames"))
        if self.input == "frames":
            _check_frames_input(self)


def _check_frames_input(config: DataConfig) -> None:
    for view in config.views:
        parse_view(view.replace("*", "0"))
    if config.codec is not None:
        raise ConfigError(f"data.codec={config.codec}, but data.input=frames; only stored features have a codec; drop data.codec")
