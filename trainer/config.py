"""RunConfig: every setting of a training run, typed and strict. No torch import here.

Defaults are the published MOVi-C values of SSync unless a comment says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError, check_at_least, check_choice, check_path
from trainer.observe.profile_window import parse_window


@dataclass(kw_only=True)
class ModelConfig:
    """SlotContrast's network, which SSync shares."""

    num_slots: int = 11
    slot_dim: int = 64
    feature_dim: int = 384  # E, must be what the shards hold
    grid: list[int] = field(default_factory=lambda: [24, 24])  # Y, X of the patch grid, must be what the shards hold
    iters_first: int = 3  # slot attention iterations of a clip's first frame
    iters_next: int = 2  # ... and of every other
    predictor_heads: int = 4
    decoder_hidden: list[int] = field(default_factory=lambda: [1024, 1024, 1024])
    gru_hidden: str = "normed"  # normed: the GRU's hidden state is LayerNorm(slots), as released; raw: Locatello et al.
    attention_scale: str = "official_inverted"  # predictor logits q.k*sqrt(d) as released; standard: q.k/sqrt(d)
    query_key_gain: float = 1.0  # initial weights of queries and keys times this; > 1 sharpens small models' first maps
    decoder_positions: str = "normal"  # normal: N(0, 1/D) as released; fourier: sines and cosines of y and x
    decoder_path: str = "fused"  # fused: chunk by chunk, nothing of size slots x patches x width is kept; plain: its twin
    decoder_chunk_rows: int = 0  # rows (one slot at one patch) of a chunk; 0: what suits the device
    decoder_products: str = "auto"  # whose float32 products on a CPU: torch | onednn; auto: onednn on AMD's, where it is faster
    projectors: bool = False  # two linear maps to slot width that SRL's ranking losses compare in
    patch_maps: bool = False  # softmax over patches of the attention logits, which SRL's regulariser of slots reads
    recompute_frames: int = 0  # frames of slot attention kept at a time, the rest computed again in backward; 0: keep all
    eval_decode_frames: int = 8  # frames decoded at once in evaluation: bounds memory, changes nothing else

    def __post_init__(self) -> None:
        check_choice("model.gru_hidden", self.gru_hidden, ("normed", "raw"))
        check_choice("model.attention_scale", self.attention_scale, ("official_inverted", "standard"))
        check_choice("model.decoder_positions", self.decoder_positions, ("normal", "fourier"))
        check_choice("model.decoder_path", self.decoder_path, ("fused", "plain"))
        check_choice("model.decoder_products", self.decoder_products, ("auto", "torch", "onednn"))
        check_at_least("model.decoder_chunk_rows", self.decoder_chunk_rows, 0)
        check_at_least("model.recompute_frames", self.recompute_frames, 0)
        for key in ("num_slots", "slot_dim", "feature_dim", "iters_first", "iters_next", "predictor_heads", "eval_decode_frames"):
            check_at_least(f"model.{key}", getattr(self, key), 1)
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ConfigError(f"model.grid={self.grid}; two positive numbers [Y, X] are needed; change model.grid")
        if not self.decoder_hidden:
            raise ConfigError("model.decoder_hidden=[]; at least one hidden layer is needed; for example [1024, 1024, 1024]")
        if self.slot_dim % self.predictor_heads:
            raise ConfigError(
                f"model.slot_dim={self.slot_dim} is not a multiple of model.predictor_heads={self.predictor_heads}; "
                "change one of them"
            )


@dataclass(kw_only=True)
class FeatureReconstructionConfig:
    weight: float = 1.0


@dataclass(kw_only=True)
class SlotContrastConfig:
    weight: float = 0.5
    temperature: float = 0.1
    axis: str = "official_later_anchor"  # official_later_anchor | paper_earlier_anchor
    form: str = "infonce"  # infonce: one pair of frames at a time; supcon: all frames of the batch at once, as SRL released it
    scope: str = "global"  # candidates: global | rank (as released) | video (batch_contrast=false)

    def __post_init__(self) -> None:
        check_choice("objective.slot_contrast.axis", self.axis, ("official_later_anchor", "paper_earlier_anchor"))
        check_choice("objective.slot_contrast.form", self.form, ("infonce", "supcon"))
        check_choice("objective.slot_contrast.scope", self.scope, ("global", "rank", "video"))
        if not self.temperature > 0:
            raise ConfigError(f"objective.slot_contrast.temperature={self.temperature}; it must be above 0; 0.1 is published")


@dataclass(kw_only=True)
class MergeConfig:
    """SSync's merging of redundant slots."""

    mode: str = "transitive"  # transitive | pairwise | none
    source: str = "A"  # A | D | A_or_D | A_and_D | avg_map | avg_iou
    space: str = "logits"  # logits against their mean as released; probs: SP Eq. 7
    threshold: float = 0.7  # tau_merge

    def __post_init__(self) -> None:
        check_choice("objective.ssync.merge.mode", self.mode, ("transitive", "pairwise", "none"))
        check_choice("objective.ssync.merge.source", self.source, ("A", "D", "A_or_D", "A_and_D", "avg_map", "avg_iou"))
        check_choice("objective.ssync.merge.space", self.space, ("logits", "probs"))


@dataclass(kw_only=True)
class SSyncConfig:
    """Selective synergistic learning."""

    boundary_weight: float = 0.0  # 1.0 is published for SSync; 0 leaves SlotContrast
    interior_weight: float = 0.0
    start_fraction: float = 0.3  # share of optim.max_steps before the two losses join
    min_different: int = 1  # dif_n_bd
    min_equal: int = 1  # dif_n_bd_noise
    max_different: int = 1  # dif_n_nbd: interior patches have fewer different neighbours than this
    boundary_strict: bool = False  # False: >= min_different as released; True: > (SP Eq. 5)
    border: str = "clamp"  # clamp: neighbours outside are the nearest inside, as released; ignore: they do not count
    class_reduction: str = "mean"  # mean over slots as released; sum: SP Eq. 13 and 14
    empty: str = "zero"  # an empty set gives 0 (released code: NaN); nan reproduces that
    temperature: float = 1.0
    kernels: str = "auto"  # auto: Triton's on CUDA where triton is installed; torch: never; triton: always
    merge: MergeConfig = field(default_factory=MergeConfig)

    def __post_init__(self) -> None:
        check_choice("objective.ssync.border", self.border, ("clamp", "ignore"))
        check_choice("objective.ssync.class_reduction", self.class_reduction, ("mean", "sum"))
        check_choice("objective.ssync.empty", self.empty, ("zero", "nan"))
        check_choice("objective.ssync.kernels", self.kernels, ("auto", "torch", "triton"))
        if not 0 <= self.start_fraction <= 1:
            raise ConfigError(
                f"objective.ssync.start_fraction={self.start_fraction}; a share in [0, 1] is needed; 0.3 is published"
            )
        if not self.temperature > 0:
            raise ConfigError(f"objective.ssync.temperature={self.temperature}; it must be above 0; 1 is published")


@dataclass(kw_only=True)
class SRLConfig:
    """Ranking of patches, and flattening of redundant slots. Shares are of optim.max_steps, rounded to a step."""

    decoder_weight: float = 0.0  # 0.1 is published for each of the three. The ranking losses need model.projectors=true
    encoder_weight: float = 0.0
    regulariser_weight: float = 0.0  # needs model.patch_maps=true
    decoder_start: float = 0.2  # share after which the decoder's ranking loss joins
    encoder_start: float = 0.2
    regulariser_first: float = 0.0  # shares of the first and the last step that the regulariser counts in
    regulariser_last: float = 0.1
    schedule: str = "config"  # config: the four shares above; paper_fraction: 0.2, 0.2, 0 and 0.1 whatever they say
    temperature: float = 0.1
    group_frames: int = 4  # frames whose patches are compared with each other; must divide data.clip_len
    num_neighbours: int = 8  # nearest patches of each frame in the group that are positives; the patch itself is one of them
    num_redundant: int = 5  # slots of a clip that are flattened

    def __post_init__(self) -> None:
        check_choice("objective.srl.schedule", self.schedule, ("config", "paper_fraction"))
        for key in ("group_frames", "num_neighbours", "num_redundant"):
            check_at_least(f"objective.srl.{key}", getattr(self, key), 1)
        for key in ("decoder_start", "encoder_start", "regulariser_first", "regulariser_last"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"objective.srl.{key}={getattr(self, key)}; a share in [0, 1] is needed; change it")
        if not self.temperature >= 0.02:
            raise ConfigError(
                f"objective.srl.temperature={self.temperature}; at least 0.02 is needed, or float32 overflows; 0.1 is published"
            )


@dataclass(kw_only=True)
class ObjectiveConfig:
    feature_reconstruction: FeatureReconstructionConfig = field(default_factory=FeatureReconstructionConfig)
    slot_contrast: SlotContrastConfig = field(default_factory=SlotContrastConfig)
    ssync: SSyncConfig = field(default_factory=SSyncConfig)
    srl: SRLConfig = field(default_factory=SRLConfig)

    def __post_init__(self) -> None:
        weights = (
            self.feature_reconstruction.weight,
            self.slot_contrast.weight,
            self.ssync.boundary_weight,
            self.ssync.interior_weight,
            self.srl.decoder_weight,
            self.srl.encoder_weight,
            self.srl.regulariser_weight,
        )
        if not all(0 <= weight < float("inf") for weight in weights) or max(weights) == 0:
            raise ConfigError(
                f"objective weights are {list(weights)} (reconstruction, slot contrast, boundary, interior, SRL's three); "
                "all must be finite, none below 0, and one "
                "must be above; set objective.feature_reconstruction.weight=1"
            )


@dataclass(kw_only=True)
class OptimConfig:
    """Adam with warm-up and exponential decay."""

    lr: float = 8e-4
    max_steps: int = 100_000
    global_batch: int = 128  # clips of one update over all ranks
    schedule: str = "exp_decay_with_warmup"  # a key of trainer.schedule.SCHEDULES
    warmup_steps: int = 2500
    decay_steps: int = 100_000
    decay_rate: float = 0.5
    clip_norm: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for key in ("max_steps", "global_batch"):
            check_at_least(f"optim.{key}", getattr(self, key), 1)
        check_at_least("optim.warmup_steps", self.warmup_steps, 0)
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"optim.decay_steps={self.decay_steps} is not above optim.warmup_steps={self.warmup_steps}; change one of them"
            )
        for key in ("lr", "clip_norm", "decay_rate", "eps"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"optim.{key}={getattr(self, key)}; it must be above 0 and finite; change optim.{key}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas}; two numbers in [0, 1) are needed; [0.9, 0.999] is published")


@dataclass(kw_only=True)
class ParallelConfig:
    device: str = "auto"  # auto: cuda where there is one, else cpu
    precision: str = "auto"  # auto: bf16 on cuda, fp32 on cpu. Softmax, losses and weights stay float32 in both
    zero_stage: int = 1
    accumulation: int = 1  # micro-batches of one update
    reproducible: bool = False  # true: the number of ranks changes no bit of weights, losses, scores; slower
    patch_ranks: int = 1  # neighbouring ranks of a node that share the patches of the same clips: memory of a clip over so many
    threads: int = 0  # intra-op threads of a rank; 0: the rank's share of the usable cores, one where reproducible
    timeout_s: int = 300  # a collective that waits longer ends the rank

    def __post_init__(self) -> None:
        check_choice("parallel.device", self.device, ("auto", "cpu", "cuda"))
        check_choice("parallel.precision", self.precision, ("auto", "bf16", "fp32"))
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero_stage={self.zero_stage}; 0, 1, 2 or 3 is needed; 1 fits models of this size")
        check_at_least("parallel.accumulation", self.accumulation, 1)
        check_at_least("parallel.patch_ranks", self.patch_ranks, 1)
        check_at_least("parallel.threads", self.threads, 0)
        check_at_least("parallel.timeout_s", self.timeout_s, 1)
        for key, only in (("zero_stage", 0), ("patch_ranks", 1)):
            if self.reproducible and getattr(self, key) != only:
                raise ConfigError(
                    f"parallel.reproducible=true, parallel.{key}={getattr(self, key)}; sums that no number of ranks changes need "
                    f"all of a clip and of the optimizer on one rank; set parallel.{key}={only} (parallel=reproducible sets all)"
                )


@dataclass(kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 2  # verified checkpoints that stay
    asynchronous: bool = True  # the training loop waits for a copy into host memory only; false: for the disk
    max_failures: int = 3  # saves in a row that a disk may refuse before the run ends

    def __post_init__(self) -> None:
        check_at_least("checkpoint.max_failures", self.max_failures, 1)
        check_at_least("checkpoint.every_steps", self.every_steps, 1)
        check_at_least("checkpoint.keep", self.keep, 1)


@dataclass(kw_only=True)
class EvaluateConfig:
    every_steps: int = 2500  # 0: only at the end
    at_end: bool = True
    maps: list[str] = field(
        default_factory=lambda: ["object", "attn"]
    )  # scored maps; the first gives metric/..., the others metric/<name>_...
    mask_size: int | None = None  # side that masks are scored at; None: data.image_size as released
    merge: bool = False  # score with SSync's redundant slots merged; the released code scores them unmerged
    baselines: bool = True  # score the four baselines once at the end
    empty_foreground: str = "one"  # FG-ARI of a frame or video without foreground: one as released (MOVi) | skip

    def __post_init__(self) -> None:
        for name in self.maps:
            check_choice("evaluate.maps", name, ("object", "attn"))
        if not self.maps:
            raise ConfigError("evaluate.maps=[]; choose at least one of object, attn")
        check_choice("evaluate.empty_foreground", self.empty_foreground, ("one", "skip"))
        check_at_least("evaluate.every_steps", self.every_steps, 0)
        if self.mask_size is not None:
            check_at_least("evaluate.mask_size", self.mask_size, 1)


@dataclass(kw_only=True)
class ObserveConfig:
    log_every: int = 50
    record_order: bool = False  # write order/rank*.jsonl
    metrics: bool = True  # serve Prometheus metrics from every rank
    metrics_address: str = "127.0.0.1"  # interface; loopback unless told
    metrics_access: str | None = None  # a file outside the run: TLS, user and password (data_pipeline/metrics_access.py)
    targets_dir: str | None = None  # a folder that a long-lived Prometheus watches; targets are linked there
    mirror: list[str] = field(default_factory=list)  # tensorboard, wandb: rank 0 copies the run log there while it trains
    profile: str | None = None  # steps[a:b]: a torch profile of updates a to b goes to runs/NAME/profile
    profile_all_ranks: bool = False  # true: of every rank; false: of rank 0
    report: bool = True
    report_videos: int = 4  # validation videos shown in the report: those with the best and with the worst scores, half each

    def __post_init__(self) -> None:
        check_at_least("observe.log_every", self.log_every, 1)
        check_at_least("observe.report_videos", self.report_videos, 0)
        check_path("observe.targets_dir", self.targets_dir)
        check_path("observe.metrics_access", self.metrics_access)
        if self.profile is not None:
            parse_window("observe.profile", self.profile)
        for name in self.mirror:
            check_choice("observe.mirror", name, ("tensorboard", "wandb"))


@dataclass(kw_only=True)
class PublishedScores:
    """Units: percent, as papers print it; None: not reported."""

    video_fg_ari: float | None = None
    video_mbo: float | None = None
    frame_fg_ari: float | None = None
    frame_mbo: float | None = None

    def __post_init__(self) -> None:
        for name in ("video_fg_ari", "video_mbo", "frame_fg_ari", "frame_mbo"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ConfigError(f"published {name}={value}; it is in percent, 0 to 100; change published.percent or plus_minus")


@dataclass(kw_only=True)
class PublishedConfig:
    """What a paper reports for an experiment. The report shows it beside the run's own scores; nothing else reads it."""

    source: str = ""  # method and data set, and who reports it
    percent: PublishedScores = field(default_factory=PublishedScores)
    plus_minus: PublishedScores = field(default_factory=PublishedScores)  # as printed beside it


@dataclass(kw_only=True)
class RunConfig:
    name: str = "run"  # the run folder is <runs>/<name>
    runs: str = "runs"
    seed: int = 0
    data: DataConfig = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    published: PublishedConfig = field(default_factory=PublishedConfig)

    def __post_init__(self) -> None:
        check_path("runs", self.runs)
        _check_srl(self)
        if self.parallel.patch_ranks > 1:
            _check_patch_ranks(self)
        contrast = self.objective.slot_contrast
        if self.parallel.reproducible and contrast.scope == "rank" and contrast.weight > 0:
            raise ConfigError(
                "parallel.reproducible=true, objective.slot_contrast.scope=rank; it compares the clips of one rank, and so "
                "depends on how many ranks there are; set the scope to global or video"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"name={self.name!r}; a plain folder name is needed; for example name=movi_c_seed0")


def _check_patch_ranks(config: RunConfig) -> None:
    """Terms that compare patches of one rank's band with those of another's need all of them in one place."""
    srl, ranks = config.objective.srl, config.parallel.patch_ranks
    for key in ("decoder_weight", "encoder_weight", "regulariser_weight"):
        if getattr(srl, key) > 0:
            raise ConfigError(
                f"parallel.patch_ranks={ranks}, objective.srl.{key}={getattr(srl, key)}; SRL compares every patch with all of "
                "its clip, so they cannot be shared out; set parallel.patch_ranks=1"
            )
    if config.model.patch_maps:
        raise ConfigError(
            f"parallel.patch_ranks={ranks}, model.patch_maps=true; a softmax over patches needs all of them on one rank; "
            "set one of them back"
        )
    if ranks > config.model.grid[0]:
        raise ConfigError(
            f"parallel.patch_ranks={ranks}; the patch grid has only {config.model.grid[0]} rows to share; set it to that or less"
        )


def _check_srl(config: RunConfig) -> None:
    """What SRL's terms ask of the network and of the clips."""
    srl, model = config.objective.srl, config.model
    needs = {"projectors": ("decoder_weight", "encoder_weight"), "patch_maps": ("regulariser_weight",)}
    for switch, terms in needs.items():
        for term in terms:
            if getattr(srl, term) > 0 and not getattr(model, switch):
                raise ConfigError(
                    f"objective.srl.{term}={getattr(srl, term)}, but model.{switch}=false; the term reads what it makes; "
                    f"set model.{switch}=true"
                )
    if max(srl.decoder_weight, srl.encoder_weight) > 0 and config.data.clip_len % srl.group_frames:
        raise ConfigError(
            f"objective.srl.group_frames={srl.group_frames} does not divide data.clip_len={config.data.clip_len}; change one"
        )
    num_tokens = srl.group_frames * model.grid[0] * model.grid[1]
    if srl.encoder_weight > 0 and srl.num_neighbours * srl.group_frames > num_tokens:
        raise ConfigError(
            f"objective.srl.num_neighbours={srl.num_neighbours}; a frame has only {num_tokens // srl.group_frames} patches; "
            "set it to that or less"
        )


@dataclass(kw_only=True)
class EvaluationConfig:
    """`python -m trainer.evaluate run=...`: score a run's checkpoint again, perhaps on other shards."""

    run: str = MISSING  # run folder
    step: int | None = None  # checkpoint to score; None: the newest that verifies
    root: str | None = None  # other shards than the run was trained on
    split: str | None = None
    limit: int | None = None
    input: str | None = None  # features | frames, see data.input; None: what the run was trained on
    weights: str | None = None  # of the extractor, where they lie elsewhere than in training; used where input is frames
    maps: list[str] = field(default_factory=lambda: ["object", "attn"])
    merge: bool = False  # score with SSync's redundant slots merged
    baselines: bool = True
    device: str = "auto"
    out: str | None = None  # where scores.json goes; None: beside the run's metrics

    def __post_init__(self) -> None:
        check_path("run", self.run)
        check_path("out", self.out)
        check_path("weights", self.weights)
        if self.input is not None:
            check_choice("input", self.input, ("features", "frames"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class ExportConfig:
    """`python -m trainer.export run=...`: one file of a run's weights."""

    run: str = MISSING  # run folder
    step: int | None = None  # checkpoint to take; None: the newest that verifies
    out: str | None = None  # None: model.safetensors, or model_official.safetensors, in the run folder
    format: str = "slotstream"  # slotstream: our names; official: those of released SlotContrast, SSync and SRL checkpoints

    def __post_init__(self) -> None:
        check_path("run", self.run)
        check_path("out", self.out)
        check_choice("format", self.format, ("slotstream", "official"))
