"""README and docs/: code blocks run, commands parse, the site builds, and its links and pictures exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import timm

from fastrm import doctor, embed, evaluate, export, report
from fastrm.data import __main__ as views
from fastrm.methods import recipes
from fastrm.settings import command_line
from fastrm.settings.flags import read_flags
from fastrm.train import train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("[a-z]*.md"))]
# the commands of these pages are run with small settings; those of other pages are only parsed
RUN = ("quickstart.md", "tutorial.md")
SMALL = {
    "arch": "test_resnet", "epochs": 1, "max_steps": 2, "batch_size": 8, "hidden_dim": 16, "predictor_hidden_dim": 16,
    "output_dim": 8,
    "workers": 0, "eval_every": 0, "warmup_epochs": 0.0,
}  # fmt: skip
COMMANDS: dict[str, tuple[Any, type]] = {
    "fastrm.evaluate": (evaluate, evaluate.EvaluateConfig),
    "fastrm.embed": (embed, embed.EmbedConfig),
    "fastrm.export": (export, export.ExportConfig),
    "fastrm.report": (report, report.ReportConfig),
    "fastrm.data": (views, views.Options),
}
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# The commands of the quick start are also in examples/quickstart.py and on other pages.
SLOW = {ROOT / "docs" / "quickstart.md"}
run = pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The (language, text) of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def command(line: str, run: bool) -> None:
    """Run a line of a shell block, or only check that its command exists and that its flags parse."""
    words = shlex.split(line.replace("…", "digits"), comments=True)
    match words:
        case []:
            pass
        case ["make", target, *settings] if all("=" in setting for setting in settings):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
        case ["pip", "install", what]:
            extra = re.search(r"\[(\w+)\]", what)
            assert extra is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(), line
        case ["pytest", path, *_] | ["python", path, *_] if not path.startswith("-"):
            assert (ROOT / path).exists(), line
        case ["torchrun", flag, "-m", "fastrm.train", *arguments] if flag.startswith("--nproc"):
            read_flags(arguments)
        case ["python", "-m", "fastrm.train", *arguments]:
            config = read_flags(arguments)
            if run:
                train(config.replace(**SMALL))
        case ["python", "-m", "fastrm.doctor"]:
            doctor.main([])
        case ["python", "-m", module, *arguments] if module in COMMANDS:
            program, options = COMMANDS[module]
            program.main(arguments) if run else command_line.parse(options, arguments, prog=module)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, line
        case _:
            pytest.fail(f"a command that nothing tests: {line}")


@run
@pytest.mark.usefixtures("few_digits", "small_heads")
def test_code_blocks_run(page: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").symlink_to(pictures / "split")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, text in blocks(page):
        assert language in ("python", "sh", "toml"), f"{page.name} has a block of {language} that nothing tests"
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "toml":
            (name,) = re.findall(r"\A# (\w+\.toml):", text)
            Path(name).write_text(text, encoding="utf-8")
        else:
            for line in text.splitlines():
                command(line, run=page.name in RUN)


@named
def test_inline_commands_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"`((?:python|pytest|make|torchrun) [^`\n]+)`", text):
        if line.split()[1:] != ["fastrm.train"] and "--help" not in line and not line.endswith("…"):
            command(line, run=False)
    assert set(re.findall(r"--recipe ([a-z][\w-]+)", text)) <= set(recipes())


@named
def test_named_tests_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    networks = timm.list_models("test_*")
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests or name in networks, name
    for name in re.findall(r"`((?:fastrm|kernels|benchmarks|tests|examples|docs)/[\w/.*]*)`", text):
        assert "NAME" in name or list(ROOT.glob(name.rstrip("/"))), name


def test_the_readme_shows_three_uses() -> None:
    said = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python -m fastrm.train --arch resnet50 --data /imagenet" in said
    assert "pytest benchmarks/ --benchmark-only" in said
    assert "fused_ema_(teacher, student" in said


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the documentation, built from a copy. Warnings are errors."""
    for name in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    work = tmp_path_factory.mktemp("site")
    for name in ("docs", "examples", "fastrm", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__", "_generated"))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / name, work)
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "html"]
    done = subprocess.run(build, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return work / "html"


@pytest.mark.slow
def test_the_site_lists_all_operations_and_recipes(site: Path) -> None:
    shown = {
        page: (site / f"{page}.html").read_text(encoding="utf-8") for page in ("api/kernels", "recipes", "drop-in")
    }
    for name in importlib.import_module("fastrm.kernels").__all__:
        assert f'id="fastrm.kernels.{name}"' in shown["api/kernels"], name
    assert all(recipe in shown["recipes"] for recipe in recipes())
    assert "residual_info_nce" in shown["drop-in"]
    assert ":func:" not in shown["api/kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_a_phone_and_tables_fit_a_screen(width: int, site: Path, browser: Any) -> None:
    """No page is wider than the window. At 1,280 pixels no table is wider than its frame; on a phone, tables scroll."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for page in sorted(site.rglob("*.html")):
            browser.get(page.as_uri())
            wide, tables = browser.execute_script("""
                const beyond = element => element.scrollWidth - element.clientWidth;
                const tables = [...document.querySelectorAll(".table-wrapper")].filter(frame => beyond(frame) > 1);
                return [beyond(document.documentElement), tables.length];
            """)
            assert wide <= 0, page
            assert width < 600 or not tables, page
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_no_dead_link_inside_the_site(site: Path, browser: Any) -> None:
    """A browser loads every page that it can reach from the first, with its images, styles and scripts."""
    waiting, seen, targets = [(site / "index.html").as_uri()], set(), set()
    anchors: dict[str, set[str]] = {}
    while waiting:
        url = waiting.pop()
        if url in seen:
            continue
        seen.add(url)
        browser.get(url)
        found = browser.execute_script("""
            const all = (what, key) => [...document.querySelectorAll(what)].map(e => e[key]);
            return {
                links: all("a[href]", "href"),
                parts: [...all("link[rel=stylesheet]", "href"), ...all("script[src]", "src"), ...all("img", "src")],
                broken: [...document.images].filter(i => i.complete && i.naturalWidth === 0).map(i => i.src),
                ids: all("[id]", "id"),
            }""")
        assert not found["broken"], url
        errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors, f"{url}: {errors}"
        anchors[url] = set(found["ids"])
        for part in found["parts"]:
            assert urlparse(part).scheme in ("file", "data"), f"{url} needs the network for {part}"
        for link in found["links"]:
            address, anchor = urldefrag(link)
            parsed = urlparse(address)
            if parsed.scheme != "file":
                continue
            path = Path(unquote(parsed.path))
            assert path.is_file(), f"{url} leads to {path}, which is not there"
            targets.add((url, parsed._replace(query="").geturl(), unquote(anchor)))
            if path.suffix == ".html":
                waiting.append(parsed._replace(query="").geturl())
    for url, address, anchor in targets:
        assert not anchor or anchor in anchors[address], f"{url} leads to {address}#{anchor}, which is not there"
    docs = ROOT / "docs"
    written = {site / path.relative_to(docs).with_suffix(".html") for path in docs.rglob("*.md")}
    included = {"_generated", "study"}  # parts of other pages
    assert {path.as_uri() for path in written if not included & set(path.parts)} <= seen
