"""The run folder: a run saves before it evaluates, and the same command completes what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from fastrm import train, version
from fastrm.errors import Stopped, UsageError
from fastrm.files import as_utf8
from fastrm.machine.signals import Asked
from fastrm.run import checkpoint
from fastrm.settings.config import Config
from tests.test_train import assert_as_uninterrupted, records

ROOT = Path(__file__).parent.parent
Small = Callable[..., Config]


@pytest.fixture
def quick(small: Small, pictures: Path) -> Small:
    """Settings of a run on 96 images in class folders, with six steps per epoch."""
    tiny = {"data": str(pictures / "classes"), "batch_size": 14, "hidden_dim": 8, "output_dim": 8, "epochs": 2}
    return lambda **leaves: small(**{**tiny, "predictor_hidden_dim": 8, **leaves})


class Died(Exception):
    """An error that no code of fastrm expects."""


def dies(*_: object, **__: object) -> Any:
    """Raise Died."""
    raise Died


def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every training step raise Died."""
    monkeypatch.setattr("fastrm.run.step.Step.__call__", dies)


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without the images per second."""
    return {name: value for name, value in summary.items() if name != "images_per_second"}


@pytest.mark.parametrize("when", ["end", "between"])
def test_an_evaluation_that_dies_costs_no_step(
    when: str, quick: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, at = (2, 2) if when == "end" else (7, 6)
    leaves = {"checkpoint_every": 100, "eval_every": 1}
    whole = train.train(quick(**leaves, max_steps=steps, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("fastrm.hooks.evaluation.frozen_scores", dies)
        with pytest.raises(Died):
            train.train(quick(**leaves, max_steps=steps))
    assert checkpoint.load(tmp_path / "run")["step"] == at
    with monkeypatch.context() as patch:
        if when == "end":
            no_steps(patch)
        assert train.train(quick(**leaves, max_steps=steps)) == whole
    assert_as_uninterrupted(tmp_path / "run", tmp_path / "whole")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train.train(quick(**leaves, max_steps=steps)) == whole
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_missing_results_are_written_without_a_step_or_an_evaluation(
    quick: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fastrm.run.results.write_backbone", dies)
        with pytest.raises(Died):
            train.train(quick(max_steps=2, eval_every=1, verify_every=2))
    assert checkpoint.load(out)["step"] == 2
    lines = (out / "metrics.jsonl").read_text()
    no_steps(monkeypatch)
    monkeypatch.setattr("fastrm.hooks.evaluation.frozen_scores", dies)
    summary = train.train(quick(max_steps=2, eval_every=1, verify_every=2))
    assert (out / "metrics.jsonl").read_text() == lines
    scores = records(out)[-1]
    assert summary["knn_teacher"] == scores["knn_teacher"]
    assert summary["loss"] == records(out)[1]["loss"]
    assert not {"images_per_second", "verify_loss"} & summary.keys()
    assert (out / "backbone.safetensors").is_file()


def test_a_complete_run_in_a_new_folder_gets_its_results_there(
    quick: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train.train(quick(max_steps=2, eval_every=4))
    no_steps(monkeypatch)
    new = tmp_path / "deep" / "new"
    again = train.train(quick(max_steps=2, eval_every=4, resume=str(tmp_path / "run"), out=new))
    assert again == first
    for name in ("config.json", "checkpoint.pt", "backbone.safetensors", "summary.json", "metrics.jsonl"):
        assert (new / name).is_file(), name
    assert checkpoint.load(new)["step"] == 2
    assert train.train(quick(max_steps=2, eval_every=4, resume=str(tmp_path / "run"), out=tmp_path / "run")) == first


@pytest.mark.parametrize("resumed", [False, True])
def test_fewer_steps_than_made_give_the_results_of_the_steps_made(
    resumed: bool, quick: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def third(*_: object, **__: object) -> Asked:
        made = records(out)
        return Asked(save=True, end=15 if made and made[-1]["step"] == 3 else 0, stop=False, failed=False)

    with monkeypatch.context() as patch:
        patch.setattr("fastrm.machine.signals.Signals.asked", third)
        with pytest.raises(Stopped, match="after step 3"):
            train.train(quick(max_steps=5))
    new = tmp_path / "new" if resumed else out
    no_steps(monkeypatch)
    summary = train.train(quick(max_steps=2, resume=str(out) if resumed else "auto", out=new))
    assert "3 are complete, 2 were requested" in capsys.readouterr().out
    assert summary["step"] == 3
    assert json.loads((new / "summary.json").read_text()) == summary
    monkeypatch.undo()
    assert train.train(quick(max_steps=5, out=new))["step"] == 5  # and the run can continue


def test_a_summary_of_fewer_steps_does_not_complete_a_run(
    quick: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(quick(max_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr("fastrm.run.results.write_backbone", dies)
        with pytest.raises(Died):
            train.train(quick(max_steps=2))
    assert train.train(quick(max_steps=2))["step"] == 2


def test_a_profile_of_more_steps_than_the_run_has_is_skipped_and_reported(
    quick: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(quick(max_steps=3, profile=2))
    assert "profile    is skipped: 2 steps after the first 2 are more than the 3" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("trace*"))


def odd(text: str) -> str:
    """A name with a byte that is not UTF-8."""
    return os.fsdecode(text.encode() + b"\xff")


@pytest.fixture
def odd_pictures(pictures: Path, tmp_path: Path) -> Path:
    folder = tmp_path / odd("data")
    try:
        shutil.copytree(pictures / "classes", folder)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    return folder


def test_a_run_on_a_data_folder_with_an_invalid_name_completes(
    quick: Small, odd_pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = train.train(quick(data=str(odd_pictures), max_steps=2, eval_every=1, out=None))
    (out,) = Path("runs").iterdir()
    assert out.name == r"data\xff-mocov3-test_resnet"
    assert json.loads((out / "summary.json").read_text()) == summary
    with safe_open(out / "backbone.safetensors", "pt") as file:
        assert file.metadata()["data"] == as_utf8(odd_pictures.name)
    assert train.train(quick(data=str(odd_pictures), max_steps=2, eval_every=1, out=None)) == summary


def test_an_output_folder_with_an_invalid_name_is_refused_at_the_start(quick: Small, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(r"run\xff is not valid UTF-8")):
        train.train(quick(out=tmp_path / odd("run")))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_from_the_parent_folder_of_a_checkout_completes(tmp_path: Path) -> None:
    """In that folder, ``fastrm/`` is the checkout, which Python takes for a namespace package without ``__init__.py``.

    The finder of an editable installation still finds the modules below it, and so does the finder of this test.
    """
    checkout = tmp_path / "fastrm"
    checkout.mkdir()
    for name in ("fastrm", "kernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    finder = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder:\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name.startswith('fastrm.') and name.count('.') == 1:\n"
        f"            return PathFinder.find_spec(name, path=[{str(checkout / 'fastrm')!r}])\n"
        "sys.meta_path.append(Finder)\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(finder)
    arguments = (
        "--data digits --arch test_resnet --image-size 32 --batch-size 8 --epochs 1 --max-steps 1 --eval-every 0"
    )
    arguments += " --hidden-dim 8 --output-dim 8 --predictor-hidden-dim 8 --out out"
    # The finder of an installed fastrm would lead elsewhere, so it is removed.
    start = (
        "import sys, runpy; sys.path.insert(0, '')\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import fastrm; assert fastrm.__file__ is None, fastrm\n"
        f"sys.argv = ['train', *{arguments.split()!r}]\n"
        "runpy.run_module('fastrm.train', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["fastrm"] == version.__version__
    assert (tmp_path / "out" / "checkpoint.pt").is_file()


def test_the_source_of_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "fastrm"
    package.mkdir()
    monkeypatch.setattr(version, "__file__", str(package / "version.py"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 1.2")
    assert version._version() == "fastrm 1.2"  # installed
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "7"\n')
    assert version._version() == "fastrm 1.2"  # copied into another project
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fastrm"\nversion = "8"\n')
    assert version._version() == "8"  # a checkout has priority over an installed package
    (tmp_path / "pyproject.toml").unlink()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert version._version() == "unknown"
