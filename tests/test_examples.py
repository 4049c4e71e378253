"""The examples run, on real networks and small data."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastrm import export
from fastrm.data import open_source
from tests.conftest import run_of_one_step

ROOT = Path(__file__).parent.parent


def run(name: str, *arguments: str | Path, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a step."""
    return run_of_one_step("resnet18", 96, tmp_path_factory.mktemp("resnet18"))


def test_quickstart(tmp_path: Path) -> None:
    shown = run("quickstart.py", "--epochs", "1", cwd=tmp_path)
    assert "kNN of the teacher" in shown
    assert "features (4, 96)" in shown
    assert (tmp_path / "runs" / "quickstart" / "evaluation.json").is_file()


def test_fine_tuning_with_timm(resnet18: Path, pictures: Path, tmp_path: Path) -> None:
    export.main(["--checkpoint", str(resnet18), "--format", "timm", "--out", str(tmp_path / "mine")])
    data = ["--data", pictures / "split", "--epochs", "1", "--workers", "0"]
    assert "% of val right" in run("finetune_timm.py", "--backbone", "mine", *data, cwd=tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="needs pycocotools")
def test_detection_with_torchvision(resnet18: Path, tmp_path: Path) -> None:
    export.main(["--checkpoint", str(resnet18), "--format", "torchvision", "--out", str(tmp_path / "mine.safetensors")])
    digits = open_source("digits").train
    assert digits.labels is not None
    (tmp_path / "images").mkdir()
    images, boxes = [], []
    for i in range(4):
        picture = digits[i].resize((64, 64))
        canvas = picture.copy().resize((160, 128))
        canvas.paste(picture, (20 * i, 10 * i))
        canvas.save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 160, "height": 128})
        box = [20 * i, 10 * i, 64, 64]
        boxes.append({"id": i + 1, "image_id": i, "category_id": int(digits.labels[i]) + 1, "bbox": box,
                      "area": float(np.prod(box[2:])), "iscrowd": 0})  # fmt: skip
    categories = [{"id": c + 1, "name": str(c)} for c in range(10)]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    shown = run(
        "detector_torchvision.py", "--backbone", "mine.safetensors", "--arch", "resnet18", "--images", "images",
        "--annotations", "boxes.json", "--epochs", "1", "--batch-size", "2", "--size", "96", cwd=tmp_path,
    )  # fmt: skip
    assert "loss_box_reg" in shown
