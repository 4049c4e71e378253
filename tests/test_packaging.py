"""fastrm.kernels is importable however the project is installed, and kernels/ depends on nothing of the trainer."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import pathlib, fastrm, fastrm.kernels, fastrm.config, fastrm.methods, fastrm.data, fastrm.optim
assert fastrm.kernels.fused_ema_ and fastrm.kernels.residual_info_nce
print(pathlib.Path(fastrm.__file__).parent)
print(pathlib.Path(fastrm.kernels.__file__).parent)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing behind here."""
    copy = tmp_path_factory.mktemp("sources") / "fastrm"
    copy.mkdir()
    for name in ("fastrm", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, built from the sdist, and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, sources, cwd=sources)
    return out


def test_the_wheel_holds_every_module(sources: Path, built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    own = {str(path.relative_to(sources)) for path in (sources / "fastrm").rglob("*.py")}
    assert held == own | {f"fastrm/kernels/{path.name}" for path in (sources / "kernels").glob("*.py")}


def imported(python: Path, cwd: Path) -> list[Path]:
    return [Path(line) for line in run(python, "-c", CHECK, cwd=cwd).splitlines()[-2:]]


@pytest.mark.parametrize(
    "how", ["editable", *(pytest.param(how, marks=pytest.mark.slow) for how in ("wheel", "folder", "sdist"))]
)
def test_installed(how: str, sources: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In an environment that has the dependencies but not fastrm."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    what: list[str | Path] = ["--editable", sources] if how == "editable" else [sources]
    if how in ("wheel", "sdist"):
        built: Path = request.getfixturevalue("built")
        what = list(built.glob("*.whl" if how == "wheel" else "*.tar.gz"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, *what, cwd=tmp_path)
    (tmp_path / "elsewhere").mkdir()
    package, kernels = imported(python, tmp_path / "elsewhere")
    if how == "editable":
        assert (package, kernels) == (sources / "fastrm", sources / "kernels")
    else:
        assert (package, kernels) == (site / "fastrm", site / "fastrm" / "kernels")
    if how in ("wheel", "sdist"):
        shutil.copy(ROOT / "tests" / "smoke.py", tmp_path / "elsewhere")
        assert run(python, "smoke.py", cwd=tmp_path / "elsewhere").endswith("fastrm works\n")
    # Also from the root of the sources, which then come first.
    assert imported(python, sources) == [sources / "fastrm", sources / "kernels"]


def test_uninstalled_from_the_root(sources: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert imported(python, sources) == [sources / "fastrm", sources / "kernels"]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_kernels_import_nothing_of_the_trainer() -> None:
    used = set().union(*(imports_of(path) for path in (ROOT / "kernels").glob("*.py")))
    assert not used & {"fastrm", "kernels", "timm", "torchvision"}


def test_data_flows_one_way() -> None:
    """config → data → methods and models → kernels → optim → checkpoint and metrics; nothing looks back."""
    order = [
        *("errors", "recipes", "config", "device", "distributed", "signals", "data", "models", "methods", "optim"),
        *("checkpoint", "metrics", "pretrained", "probes", "verify", "watch"),
    ]
    ground = {"kernels", "errors", "files", "memory", "own", "progress", "sheets", "shell", "version"}
    for path in (ROOT / "fastrm").rglob("*.py"):
        here = path.relative_to(ROOT / "fastrm").parts[0].removesuffix(".py")
        if here not in order:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastrm."):
                there = str(node.module).split(".")[1]
                assert there in ground or order.index(there) <= order.index(here), f"{path} -> {there}"


def test_the_kernels_work_without_triton(tmp_path: Path) -> None:
    """As on macOS and Windows."""
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest)
import torch, fastrm.kernels as kernels
kernels.fused_ema_([torch.ones(3)], [torch.zeros(3)], 0.9)
assert kernels.info_nce(torch.eye(3), torch.eye(3)).isfinite()
try:
    kernels.info_nce(torch.eye(3), torch.eye(3), backend="triton")
except ValueError as error:
    print(error)
"""
    assert "backend='triton'" in run(sys.executable, "-c", code, cwd=ROOT)


def test_the_version_is_the_same_everywhere() -> None:
    import fastrm

    named = {
        name: re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name, pattern in {"pyproject.toml": r'^version = "(.+)"', "CITATION.cff": r"^version: (.+)"}.items()
    }
    assert {name: found and found[1] for name, found in named.items()} == dict.fromkeys(named, fastrm.__version__)
