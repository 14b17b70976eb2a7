"""The house's rules, read from the code's own imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("trainer", "data_pipeline", "cluster")
HEAVY = ("torch", "deepspeed", "ray", "scipy", "pycocotools", "webdataset")
DEPENDENCIES = {
    "torch", "deepspeed", "ray", "submitit", "hydra", "omegaconf", "xformers", "prometheus_client", "webdataset",
    "numpy", "scipy", "PIL", "av", "pybullet", "rich", "safetensors", "requests", "urllib3", "boto3", "botocore", "awscrt",
    "tensorboard", "wandb", "platform", "signal", "logging", "config_store",
}  # fmt: skip


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a module imports; relative imports do not occur in this project."""
    tree = ast.parse(path.read_text())
    nodes = _executed_at_import(tree) if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _executed_at_import(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found += [node, *_executed_at_import(node)]
    return found


def reaches(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


@pytest.mark.parametrize("path", modules("cluster"), ids=str)
def test_cluster_knows_neither_torch_nor_our_packages(path):
    for package in ("torch", "deepspeed", "trainer", "data_pipeline"):
        assert not reaches(imports_of(path), package)


@pytest.mark.parametrize("path", modules("data_pipeline"), ids=str)
def test_data_pipeline_knows_none_of_our_packages(path):
    for package in ("trainer", "cluster"):
        assert not reaches(imports_of(path), package)


@pytest.mark.parametrize("path", modules("trainer"), ids=str)
def test_trainer_does_not_know_the_cluster(path):
    assert not reaches(imports_of(path), "cluster")


@pytest.mark.parametrize("path", [*modules("trainer/objective"), *modules("trainer/metrics")], ids=str)
def test_objective_and_metrics_never_see_the_network(path):
    seen = reaches(imports_of(path), "trainer.model")
    assert all(
        name in ("trainer.model", "trainer.model.outputs") or name.startswith("trainer.model.outputs.") for name in seen
    ), seen
    assert not reaches(imports_of(path), "trainer.build") and not reaches(imports_of(path), "trainer.engine")


def test_only_the_engine_knows_deepspeed():
    users = [path for package in PACKAGES for path in modules(package) if reaches(imports_of(path), "deepspeed")]
    assert [str(path.relative_to(ROOT)) for path in users] == ["trainer/engine.py"]


def test_no_module_directly_in_cluster_shadows_a_dependency():
    assert not {path.stem for path in (ROOT / "cluster").glob("*.py")} & DEPENDENCIES


def test_nothing_is_unpickled():
    """torch.load only with weights_only=True, np.load never with allow_pickle, of pickle nothing but the name of its error."""
    for package in PACKAGES:
        for path in modules(package):
            assert reaches(imports_of(path), "pickle") <= {"pickle", "pickle.UnpicklingError"}, path
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle":
                    assert node.attr == "UnpicklingError", f"{path}:{node.lineno}"
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "load":
                    continue
                owner = getattr(node.func.value, "id", "")
                values = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                assert (
                    owner not in ("torch", "np", "numpy")
                    or values.get("weights_only") is True
                    or values.get("allow_pickle") is False
                ), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "command",
    [
        ["cluster/launch.py"],
        ["-m", "cluster.launch"],
        ["-m", "data_pipeline.build"],
        ["-m", "data_pipeline.inspect"],
        ["-m", "data_pipeline.plan"],
        ["-m", "data_pipeline.verify"],
        ["-m", "trainer.main"],
        ["-m", "trainer.evaluate"],
        ["-m", "trainer.export"],
        ["-m", "trainer.report"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(command):
    """--help answers from a process that has loaded none of the heavy libraries: that is what makes it quick."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) > 3
    loaded = {
        line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert not loaded & set(HEAVY), loaded & set(HEAVY)
    assert "argparse" in loaded or "data_pipeline" in loaded or "cluster" in loaded  # the listing was read at all
