"""The command line: wrong use ends with status 2 and one or two lines, and writes nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastrm import doctor, evaluate, export, train
from fastrm.data import named
from fastrm.settings.config import Config
from fastrm.settings.flags import read_flags
from fastrm.terminal import shell
from tests.test_train import METHODS

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "test_resnet", "--image-size", "32", "--hidden-dim", "16", "--output-dim", "8"]
TINY += ["--predictor-hidden-dim", "16", "--workers", "0", "--batch-size", "16"]


def fails(entry: Callable[[list[str]], None], flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run an entry point that must refuse its flags, and return its error message."""
    with pytest.raises(SystemExit) as stop:
        shell.run(lambda: entry(flags))
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("error: ")
    assert len(said.err.strip().splitlines()) <= 2
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], ["--data is missing"]),
        (["--data", "nowhere"], ["--data nowhere does not exist", "digits"]),
        (["--data", "empty"], ["--data empty holds no image"]),
        (["--data", "notes"], ["--data notes holds no image", ".jpg"]),
        (["--data", "notes/note.txt"], ["--data notes/note.txt is a file", "folder"]),
        (["--data", "digits", "--arch", "resnet5"], ["--arch resnet5 is not a timm model", "resnet50"]),
        (["--data", "digits", "--method", "simclr"], ["simclr", "--method", "mocov3"]),
        (["--data", "digits", "--method", "densecl", "--arch", "test_vit"], ["--method densecl", "feature map"]),
        (["--data", "digits", "--recipe", "best"], ["--recipe best is unknown", "mocov3-r50-100ep"]),
        (["--data", "digits", "--optimizer", "adam"], ["--optimizer", "adam", "adamw"]),
        (["--data", "digits", "--optimiser", "sgd"], ["--optimiser", "did you mean --optimizer"]),
        (["--data", "digits", "--epochs", "many"], ["--epochs", "many"]),
        (["--data", "digits", "--epochs"], ["--epochs"]),
        (["--data", "digits", "--lr", "-1"], ["--lr -1.0 is out of range", "above 0"]),
        (["--data", "digits", "--lr", "nan"], ["--lr nan is out of range"]),
        (["--data", "digits", "--temperature", "0"], ["--temperature 0.0 is out of range"]),
        (["--data", "digits", "--teacher-momentum", "1.1"], ["--teacher-momentum 1.1", "at most 1"]),
        (["--data", "digits", "--method", "mocov2", "--queue-size", "0"], ["--queue-size 0", "at least 1"]),
        (["--data", "digits", "--batch-size", "5000"], ["--batch-size 5000 is more than the 1437 images"]),
        (["--data", "digits", "--batch-size", "10", "--accumulate", "4"], ["--batch-size 10 must be a multiple of 4"]),
        (["--data", "digits", "--batch-size", "4", "--accumulate", "4"], ["--batch-size 4", "BatchNorm"]),
        (["--data", "digits", "--cuda-graph"], ["--cuda-graph cannot be used: it needs a GPU"]),
        (["--data", "digits", "--precision", "fp16"], ["--precision fp16 needs a GPU"]),
        (["--data", "digits", "--stem", "small", "--arch", "test_convnext"], ["--stem small is for ResNets"]),
        ([*TINY, "--data", "digits", "--optimizer", "lamb"], ["--optimizer lamb", "NVIDIA/apex"]),
        (["--data", "digits", "--loader", "dali"], ["--loader dali reads files only"]),
        ([*TINY, "--data", "digits", "--out", "notes/note.txt"], ["--out notes/note.txt cannot be written"]),
        ([*TINY, "--data", "digits", "--out", "notes/note.txt/deeper"], ["--out notes/note.txt/deeper cannot"]),
        ([*TINY, "--data", "digits", "--resume", "elsewhere"], ["elsewhere does not exist"]),
        ([*TINY, "--data", "digits", "--resume", "notes"], ["notes has no checkpoint.pt"]),
        ([*TINY, "--data", "digits", "--resume", "notes/note.txt"], ["notes/note.txt cannot be read as a checkpoint"]),
        (["--data", "digits", "stray"], ["stray"]),
    ],
    ids=lambda value: " ".join(value) or "no flags" if isinstance(value, list) else None,
)
def test_wrong_use_is_named_and_writes_nothing(
    flags: list[str],
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "note.txt").write_text("not an image")
    before = sorted(tmp_path.rglob("*"))
    said = fails(train.main, flags, capsys)
    assert all(part in said for part in says), said
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_that_need_a_gpu_are_refused_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    assert "--device cuda cannot be used" in fails(train.main, ["--data", "digits", "--device", "cuda"], capsys)
    if not torch.backends.mps.is_available():
        assert "--device mps cannot be used" in fails(train.main, ["--data", "digits", "--device", "mps"], capsys)
    assert "--kernels triton cannot be used" in fails(train.main, ["--data", "digits", "--kernels", "triton"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_help_groups_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for part in (
        "input options",
        "method options",
        "optim options",
        "--residual-weight FLOAT",
        "--compile {auto,on,off}",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("given", "meant"), [("--compile", "on"), ("--no-compile", "off"), ("--compile auto", "auto"), ("", "auto")]
)
def test_compile_has_short_forms(given: str, meant: str) -> None:
    for argv in ([*given.split(), "--data", "digits"], ["--data", "digits", *given.split()]):
        assert read_flags(argv).device.compile == meant


@pytest.mark.slow
def test_a_picture_folder_from_the_shell(tmp_path: Path) -> None:
    """Run the command once as users do: in another process, on a folder with an odd name, with the default output
    folder.
    """
    folder = tmp_path / "my pictures ü"
    folder.mkdir()
    for i in range(20):
        Image.effect_noise((40, 30), 60 + i).save(folder / f"{i}.jpg")
    command = [sys.executable, "-m", "fastrm.train", "--data", folder.name, *TINY, "--max-steps", "1"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / f"{folder.name}-mocov3-test_resnet" / "summary.json").is_file()
    assert "step      1" in done.stdout


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("method", METHODS)
def test_evaluate_scores_student_and_teacher(
    method: str, small: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train.train(small(method=method, eval_every=1, max_steps=2))
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(tmp_path / "run"), "--knn", "--gap", "--workers", "0"])
    shown = capsys.readouterr().out
    table = {line.split()[0]: line.split() for line in shown.splitlines() if "±" in line or "knn20" in line}
    # the row starts with "digits, % right"
    column = next(row for row in table.values() if "knn20" in row).index("knn20") - 3
    for name in ("student", "teacher"):
        assert table[name][1 + 2 * column] == f"{100 * summary[f'knn_{name}']:.2f}"
    for place in ("output", "projector", "backbone", "layer4"):
        assert f"gap at {place}" in shown
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]["digits"]
    assert set(found["scores"]) == {"student", "teacher", "random", "pixels"}
    low, high = found["scores"]["teacher"]["knn20"]["interval"]
    assert low <= found["scores"]["teacher"]["knn20"]["value"] == summary["knn_teacher"] <= high


@pytest.mark.usefixtures("few_digits")
def test_an_evaluation_is_added_to_the_earlier_ones(
    small: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = dataclasses.replace(named._digits(), name="synthetic")
    monkeypatch.setattr(named, "_synthetic", lambda: few)
    train.train(small(max_steps=1))
    run = [str(tmp_path / "run"), "--workers", "0"]
    evaluate.main([*run, "--gap"])
    evaluate.main([*run, "--linear", "--linear-epochs", "1", "--semi", "0.05", "--transfer", "synthetic"])
    shown = capsys.readouterr().out
    assert "synthetic, % right" in shown
    sets = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]
    assert set(sets["digits"]) == {"gap", "scores", "left_out", "bank", "test"}
    assert sets["digits"]["left_out"] == 0
    assert set(sets["digits"]["scores"]["teacher"]) == {"linear", "semi_0.05"}
    assert set(sets["synthetic"]["scores"]["pixels"]) == {"linear_quick"}
    (tmp_path / "run" / "evaluation.json").write_text("[]")
    assert "is there and not an evaluation" in fails(evaluate.main, [*run, "--gap"], capsys)
    assert (tmp_path / "run" / "evaluation.json").read_text() == "[]"


def test_evaluate_refuses_what_it_cannot_do(
    small: Callable[..., Config], tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(small(max_steps=1))
    run = str(tmp_path / "run")
    assert "--knn, --linear" in fails(evaluate.main, ["--checkpoint", run], capsys)
    assert "does not exist" in fails(evaluate.main, ["--checkpoint", f"{run}/none", "--knn"], capsys)
    assert "name a run folder" in fails(evaluate.main, ["--knn"], capsys)
    assert "are both given" in fails(evaluate.main, [run, "--checkpoint", run, "--knn"], capsys)
    flat = ["--checkpoint", run, "--knn", "--data", str(pictures / "flat")]
    assert "no labels" in fails(evaluate.main, flat, capsys)
    for wrong in (["--semi", "0.0"], ["--semi", "nan"], ["--linear", "--linear-epochs", "0"]):
        assert f"{wrong[-2]} {wrong[-1]} is out of range" in fails(evaluate.main, ["--checkpoint", run, *wrong], capsys)
    exported = ["--checkpoint", f"{run}/backbone.safetensors", "--gap"]
    assert "--gap needs student and teacher" in fails(evaluate.main, exported, capsys)
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_doctor_prints_one_line_per_part(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(doctor.PARTS)
    assert all(len(line) > 13 for line in lines)


@pytest.mark.parametrize(
    ("entry", "flags", "said"),
    [
        (doctor.main, ["--data", "digits"], "Unrecognized options: --data, digits; --help lists all flags"),
        (export.main, ["run"], "--format and --out are missing; --help describes all flags"),
        (export.main, ["run", "--out", "x.onnx"], "--format is missing; --help describes all flags"),
    ],
)
def test_unknown_and_missing_flags_are_named_in_one_line(
    entry: Any, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(entry, flags, capsys) == f"error: {said}\n"
