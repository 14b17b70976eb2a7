"""One measured shape: the command line of every single benchmark in, a Case out. No torch import. Letters: model/outputs.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import RunConfig

PATHS = ("fused", "plain", "official_form")
HELP_PATHS = "fused: chunk by chunk, nothing kept; plain: the same algebra, stored activations; official_form: as published"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured. `settings`: more key=value words for the run's configuration."""

    batch: int = 1
    frames: int = 4
    patches: int = 256
    slots: int = 11
    width: int = 384  # E
    dim: int = 64  # D
    hidden: int = 1024  # of each of the decoder's three hidden layers
    path: str = "fused"
    matmul: str = "torch"  # torch | onednn, of the fused decoder
    device: str = "cpu"
    precision: str = "fp32"
    settings: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """The most square Y x X with Y*X = P."""
        rows = next(side for side in range(int(self.patches**0.5), 0, -1) if self.patches % side == 0)
        return rows, self.patches // rows

    @property
    def name(self) -> str:
        products = f", {self.matmul} products" if self.path == "fused" and self.device == "cpu" else ""
        return f"{self.path}{products}"

    @property
    def shape_text(self) -> str:
        return f"B={self.batch} T={self.frames} P={self.patches} S={self.slots} E={self.width}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        values = json.loads(text)
        return Case(**values | {"settings": tuple(values["settings"])})

    def run(self) -> RunConfig:
        """MOVi-C's settings of SSync at this shape, its losses on from the first step."""
        from data_pipeline.compose import compose
        from trainer.config import RunConfig

        words = [
            "experiment=ssync_movi_c",
            f"model.grid=[{self.grid[0]},{self.grid[1]}]",
            f"model.num_slots={self.slots}",
            f"model.slot_dim={self.dim}",
            f"model.feature_dim={self.width}",
            f"model.decoder_hidden=[{self.hidden},{self.hidden},{self.hidden}]",
            f"data.clip_len={self.frames}",
            f"optim.global_batch={self.batch}",
            f"parallel.device={self.device}",
            f"parallel.precision={self.precision}",
            "objective.ssync.start_fraction=0",
            *_decoder_words(self),
        ]
        return compose("train", RunConfig, [*words, *self.settings])


def _decoder_words(case: Case) -> list[str]:
    path = "fused" if case.path == "fused" else "plain"
    return [f"model.decoder_path={path}", f"model.decoder_products={case.matmul}"]


def add_shape_flags(parser: argparse.ArgumentParser) -> None:
    for flag, default, text in (
        ("--batch", 1, "clips B"),
        ("--frames", 4, "frames of a clip T"),
        ("--patches", 256, "patches of a frame P"),
        ("--slots", 11, "slots S"),
        ("--width", 384, "feature width E"),
        ("--hidden", 1024, "width of the decoder's three hidden layers"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--matmul", choices=("torch", "onednn"), default="torch", help="products of the fused decoder on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


def case_of(options: argparse.Namespace, path: str) -> Case:
    return Case(
        batch=options.batch,
        frames=options.frames,
        patches=options.patches,
        slots=options.slots,
        width=options.width,
        hidden=options.hidden,
        path=path,
        matmul=options.matmul,
        device=options.device,
        precision=options.precision,
        settings=tuple(options.settings),
    )
