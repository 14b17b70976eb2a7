"""The README's commands are commands: make targets exist, builds and trainings compose, launches plan; links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import parse as parse_launch
from data_pipeline.compose import compose
from data_pipeline.config import BuildConfig
from data_pipeline.features import GROUP_SCHEMAS as FEATURE_SCHEMAS
from data_pipeline.sources import GROUP_SCHEMAS as SOURCE_SCHEMAS
from trainer.config import EvaluationConfig, ExportConfig, RunConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


COMMANDS = ("status", "logs", "cancel", "resume", "doctor", "monitor")


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_there_are_commands():
    assert len(commands()) >= 8 and {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[1:3] == ["cluster/launch.py", "plan"]:
        result = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0 and "binds:" in result.stdout, result.stdout + result.stderr
    elif "build-shards" in words:
        assert parse_launch(words[2:]).job == "build-shards"
        settings = [word for word in words if "=" in word]
        assert isinstance(compose("build_shards", BuildConfig, settings, {**SOURCE_SCHEMAS, **FEATURE_SCHEMAS}), BuildConfig)
    elif words[1] == "cluster/launch.py" and words[2] in COMMANDS:
        result = subprocess.run([sys.executable, *words[1:3], "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and all(word in result.stdout for word in words if word.startswith("--")), result.stderr
    elif "--multirun" in words:
        result = subprocess.run([sys.executable, *words[1:], "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and len(result.stdout.splitlines()) == 6, result.stdout + result.stderr
    elif words[1] == "cluster/launch.py":
        dry = [] if "--dry-run" in words else ["--dry-run"]
        result = subprocess.run(
            [sys.executable, *words[1:], *dry], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr
        assert "trainer.main" in result.stdout or "#SBATCH --nodes=8" in result.stdout
        compose("train", RunConfig, [word for word in words if "=" in word])
    elif words[2] == "data_pipeline.build":
        settings = [word for word in words[3:] if word != "--dry-run"]
        assert isinstance(compose("build_shards", BuildConfig, settings, {**SOURCE_SCHEMAS, **FEATURE_SCHEMAS}), BuildConfig)
    elif words[2] == "trainer.evaluate":
        assert compose("evaluate", EvaluationConfig, words[3:]).run
    elif words[2] == "trainer.report":
        result = subprocess.run([sys.executable, *words[1:3], "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and 1 <= len(words[3:]) <= 2, result.stderr
    elif words[2] == "trainer.export":
        assert compose("export", ExportConfig, words[3:]).format == "official"
    else:
        assert words[2] in ("data_pipeline.inspect", "data_pipeline.verify", "data_pipeline.plan")
        result = subprocess.run(
            [sys.executable, *words[1:3], "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0 and all(word in result.stdout for word in words[4:] if word.startswith("--")), result.stderr


def test_links_and_named_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:trainer|data_pipeline|cluster|tests|configs|benchmarks)/[\w/.]+\.(?:py|md|yaml))`", TEXT):
        assert (ROOT / name).is_file(), name


def test_experiments_named_are_there():
    names = set(re.findall(r"`((?:slotcontrast|srl|ssync)_[a-z]+\w*)`", TEXT)) - {"ssync_pairwise", "ssync_seed0", "ssync_seed1"}
    assert names == {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")} - {"demo"}


def test_make_demo_builds_trains_and_reports(tmp_path):
    """The demo's own two commands, with fewer clips and steps: the whole chain from generated videos to the report."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^demo: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe
    small = {
        "data_pipeline.build": ["source.num_train=8", "source.num_validation=3", f"out={tmp_path / 'data'}", "workers=1"],
        "cluster/launch.py": [f"data.root={tmp_path / 'data'}", f"runs={tmp_path}", "optim.max_steps=12", "optim.warmup_steps=2"],
    }
    for line in recipe[1].strip().splitlines():
        words = shlex.split(
            line.strip().replace("$(BIN)/python", sys.executable).replace("$(DEMO_NAME)", "demo").replace("$(SEED)", "0")
        )
        kept = [word for word in words if word != "$(DEMO_ARGS)" and not word.startswith("out=")]
        extra = next(value for key, value in small.items() if key in line)
        result = subprocess.run([*kept, *extra], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    run = tmp_path / "demo"
    report = (run / "report" / "index.html").read_text()
    assert (run / "DONE").is_file() and "ceiling of the patch grid" in report and len(list((run / "report").glob("*.png"))) >= 2
