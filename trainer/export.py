"""Export: a run folder goes in, one safetensors file of its weights comes out, with what it takes to build the model beside it.

`python -m trainer.export run=runs/NAME [out=FILE] [format=official]`. A run that ends has run/model.safetensors without asking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.config import ExportConfig, RunConfig

HELP = """python -m trainer.export run=RUN_FOLDER [key=value ...]

Writes a run's weights as one safetensors file, whatever number of ranks trained it, and its configuration beside it as JSON.

  run=FOLDER         run folder, for example runs/demo
  step=N             checkpoint to take (default: the newest that verifies)
  format=slotstream  tensors named as in trainer/model, or official: as released SlotContrast, SSync and SRL models name theirs
  out=FILE           where it goes (default: RUN_FOLDER/model.safetensors or model_official.safetensors)

To load it in plain torch:
  config = json.load(open("model.json"))["model"]
  model = VideoSlotModel(ModelConfig(**config))
  model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
"""
NAMES = {"slotstream": "model.safetensors", "official": "model_official.safetensors"}


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return 0
    from data_pipeline.compose import compose
    from trainer.config import ExportConfig

    print(f"written: {export_run(compose('export', ExportConfig, argv))}")
    return 0


def export_run(settings: ExportConfig) -> Path:
    """Write the file that `settings` ask for; its path."""
    from pathlib import Path

    from safetensors.torch import save as to_bytes

    from data_pipeline.errors import ConfigError
    from data_pipeline.files import write_atomically
    from trainer.evaluate import choose_checkpoint
    from trainer.model.official_names import to_official
    from trainer.run_folder import read_config

    run = Path(settings.run)
    out = Path(settings.out) if settings.out else run / NAMES[settings.format]
    if out.is_dir() or out.suffix != ".safetensors":
        raise ConfigError(f"out={out}; a file that ends in .safetensors is needed; give out=FILE.safetensors")
    config = read_config(run)
    found = choose_checkpoint(run, settings.step)
    tensors = dict(found.weights)
    if settings.format == "official":
        try:
            tensors = to_official(tensors)
        except ValueError as error:
            raise ConfigError(f"format=official: {error}") from None
    write_atomically(out, to_bytes({name: value.contiguous() for name, value in tensors.items()}, {"format": "pt"}))
    _describe(out, config, found.state.step, found.state.features, settings.format)
    return out


def keep_last(run: Path, checkpoint: Path, config: RunConfig, say: Callable[[str], None]) -> None:
    """run/model.safetensors from the run's last checkpoint: another name for the same bytes, or a copy where links cannot be.

    A disk that refuses costs this file alone: the checkpoint has it all.
    """
    import json
    import os
    import shutil

    out = run / NAMES["slotstream"]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(checkpoint / "model.safetensors", temporary)
        except OSError:
            shutil.copyfile(checkpoint / "model.safetensors", temporary)
        temporary.replace(out)
        state = json.loads((checkpoint / "state.json").read_text())["train"]
        _describe(out, config, state["step"], state.get("features", ""), "slotstream")
    except OSError as error:
        say(f"warning: {out} was not written ({error.strerror}); python -m trainer.export run={run} writes it")


def _describe(out: Path, config: RunConfig, step: int, features: str, names: str) -> None:
    """FILE.json beside FILE.safetensors: what it takes to build the model, and what its weights know."""
    import json
    from dataclasses import asdict

    from data_pipeline.files import write_atomically

    content: dict[str, Any] = {
        "model": asdict(config.model),
        "names": names,
        "step": step,
        "seed": config.seed,
        "run": config.name,
        "features": config.data.features,
        "features_fingerprint": features,
    }
    write_atomically(out.with_suffix(".json"), json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    from data_pipeline.compose import run_command

    raise SystemExit(run_command(main))
