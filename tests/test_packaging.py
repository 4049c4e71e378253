"""fastrm.kernels can be imported however the project is installed, and packages import only those below them."""

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
import importlib.util, pathlib, fastrm, fastrm.kernels, fastrm.settings.config
assert fastrm.kernels.fused_ema_ and fastrm.kernels.residual_info_nce
assert all(importlib.util.find_spec(f"fastrm.{part}") for part in ("methods", "data", "optim", "models", "train"))
print(pathlib.Path(fastrm.__file__).parent)
print(pathlib.Path(fastrm.kernels.__file__).parent)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, in which building leaves its files."""
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
    """A folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, sources, cwd=sources)
    return out


def test_the_wheel_holds_every_module(sources: Path, built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    own = {str(path.relative_to(sources)) for path in (sources / "fastrm").rglob("*.py")}
    assert held == own | {f"fastrm/kernels/{path.name}" for path in (sources / "kernels").glob("*.py")}


def imported(python: Path, cwd: Path) -> list[Path]:
    """The folders that fastrm and fastrm.kernels are imported from."""
    return [Path(line) for line in run(python, "-c", CHECK, cwd=cwd).splitlines()[-2:]]


@pytest.mark.parametrize(
    "how", ["editable", *(pytest.param(how, marks=pytest.mark.slow) for how in ("wheel", "folder", "sdist"))]
)
def test_an_installation_imports_its_kernels(
    how: str, sources: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The environment has the dependencies, but not fastrm."""
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
    # In the root of the sources, those come first.
    assert imported(python, sources) == [sources / "fastrm", sources / "kernels"]


def test_a_checkout_exposes_only_its_kernels(sources: Path, tmp_path: Path) -> None:
    """A checkout uses its own kernels, also if another checkout is installed as editable."""
    other = tmp_path / "other"
    (other / "kernels").mkdir(parents=True)
    (other / "kernels" / "__init__.py").write_text("raise AssertionError('the kernels of another checkout')\n")
    code = f"""
import importlib.util, sys
class Editable:
    def find_spec(self, name, path=None, target=None):
        if name == "fastrm.kernels":
            return importlib.util.spec_from_file_location(name, {str(other / "kernels" / "__init__.py")!r})
sys.meta_path.append(Editable())
import fastrm
assert "torch" not in sys.modules
import fastrm.kernels
print(fastrm.kernels.__path__[0])
for name in ("tests", "benchmarks", "fastrm"):
    try:
        importlib.import_module("fastrm." + name)
    except ModuleNotFoundError as error:
        print(error)
"""
    shown = run(sys.executable, "-c", code, cwd=sources).splitlines()
    assert shown == [
        str(sources / "kernels"),
        *(f"No module named 'fastrm.{n}'" for n in ("tests", "benchmarks", "fastrm")),
    ]


@pytest.mark.slow
def test_a_checkout_works_without_installation(sources: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert imported(python, sources) == [sources / "fastrm", sources / "kernels"]


def imports_of(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_kernels_do_not_import_the_trainer() -> None:
    used = set().union(*(imports_of(path) for path in (ROOT / "kernels").glob("*.py")))
    assert not used & {"fastrm", "kernels", "timm", "torchvision"}


FLOW = (
    *("errors", "packages", "version", "checkout", "kernels", "machine.memory", "files", "own", "evaluated"),
    *("settings", "machine", "terminal"),
    *("data", "models", "optim", "methods", "exports"),
    *("probes", "hooks", "run", "pretrained", "reports"),
    *("train", "pretraining", "evaluate", "embed", "export", "report", "doctor", "__main__"),
)
"""Parts of the package. Each may import only those before it."""
# The fields of the settings look a method up by its name, at the time it is known.
LOOKED_UP = {("settings/fields.py", "methods")}


def part_of(module: str) -> str:
    """The part of the package that contains a module, whose name is relative to the package."""
    return module if module in FLOW else module.split(".")[0]


def imported_parts(path: Path) -> set[str]:
    """Parts that a module imports when it is imported or runs, without those for type checking only."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("fastrm."):
                module, _, last = name.removeprefix("fastrm.").rpartition(".")
                found.add(part_of(module or last))
    return found


def test_data_flows_one_way() -> None:
    """Entry points → run → hooks → probes → methods → optim, models, data → kernels: no import goes the other way."""
    here = {path: path.relative_to(ROOT / "fastrm").with_suffix("") for path in (ROOT / "fastrm").rglob("*.py")}
    parts = {path: part_of(".".join(name.parts)) for path, name in here.items() if name.parts != ("__init__",)}
    assert set(parts.values()) | {"kernels"} == set(FLOW)
    backwards, looked_up = [], set()
    for path, part in parts.items():
        for there in imported_parts(path):
            if FLOW.index(there) > FLOW.index(part):
                edge = (path.relative_to(ROOT / "fastrm").as_posix(), there)
                looked_up.add(edge) if edge in LOOKED_UP else backwards.append(edge)
    assert not backwards
    assert looked_up == LOOKED_UP


@pytest.mark.slow
def test_mypy_sees_the_calls_from_the_trainer_to_the_kernels(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from torch import Tensor\n\nfrom fastrm.kernels import info_nce\n\n\n"
                     "def f(x: Tensor) -> Tensor:\n    return info_nce(x, x, temprature=0.2)\n")  # fmt: skip
    files = ("fastrm/__init__.py", "typed/fastrm/kernels", str(wrong))
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert re.search(r'wrong.py:7: error: Unexpected keyword argument "temprature" for "info_nce"', done.stdout)


def test_private_names_of_the_kernels_are_not_imported_elsewhere() -> None:
    for path in (ROOT / "fastrm").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"fastrm\.kernels\._|from fastrm\.kernels import .*\b_\w", text), path


def test_the_figure_of_the_layout_shows_every_part() -> None:
    shown = re.findall(r"\w+", (ROOT / "docs" / "images" / "layout.svg").read_text(encoding="utf-8"))
    ground = {"errors", "version", "checkout", "machine.memory", "__main__", "pretraining"}
    assert set(FLOW) - ground <= set(shown)


def test_the_kernels_work_without_triton(tmp_path: Path) -> None:
    """Triton does not exist on macOS and Windows."""
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


def test_all_files_state_the_same_version() -> None:
    import fastrm

    named = {
        name: re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name, pattern in {"pyproject.toml": r'^version = "(.+)"', "CITATION.cff": r"^version: (.+)"}.items()
    }
    assert {name: found and found[1] for name, found in named.items()} == dict.fromkeys(named, fastrm.__version__)


def test_the_folder_of_the_kernels_is_imported_once() -> None:
    """transformers looks for a package "kernels", and finds the folder of a checkout."""
    lines = [
        "import importlib, torch, fastrm.kernels",
        "assert importlib.import_module('kernels') is fastrm.kernels",
        "query = torch.randn(4, 8, requires_grad=True)",
        "fastrm.kernels.residual_info_nce(query, query.detach(), query.detach())[0].backward()",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT)
