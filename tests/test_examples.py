"""The examples run, on small networks and small data."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastrm
from examples.dino_vit import small_vit
from fastrm import export
from fastrm.data import open_source
from fastrm.run import checkpoint
from tests.conftest import run_of_one_step

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example in an empty folder, in this process, because importing torch again takes longer than most
    examples.
    """
    monkeypatch.chdir(tmp_path)

    def of_name(name: str, *arguments: str | Path) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return of_name


@pytest.mark.parametrize("digits", ["few_digits", pytest.param("all", marks=pytest.mark.slow)])
def test_the_quickstart_trains_and_evaluates(
    digits: str, request: pytest.FixtureRequest, run: Callable[..., str], tmp_path: Path
) -> None:
    if digits != "all":
        request.getfixturevalue(digits)
    shown = run("quickstart.py", "--epochs", "1")
    assert "kNN of the teacher" in shown
    assert "features (4, 96)" in shown
    assert (tmp_path / "runs" / "quickstart" / "evaluation.json").is_file()


def test_dino_trains_a_small_vit(pictures: Path, run: Callable[..., str], tmp_path: Path) -> None:
    shown = run("dino_vit.py", pictures / "split", "--epochs", "2", "--batch-size", "4", "--out", tmp_path / "dino")
    assert "'knn_untrained'" in shown
    assert fastrm.load(tmp_path / "dino", arch=small_vit())(torch.zeros(2, 3, 32, 32)).shape == (2, 64)


def test_an_exported_backbone_is_fine_tuned_with_timm(pictures: Path, run: Callable[..., str], tmp_path: Path) -> None:
    of = run_of_one_step("test_resnet", 96, tmp_path / "run")
    export.main(["--checkpoint", str(of), "--format", "timm", "--out", str(tmp_path / "mine")])
    data = ["--data", pictures / "split", "--epochs", "1", "--workers", "0"]
    assert "% of val right" in run("finetune_timm.py", "--backbone", "mine", *data)


def test_the_exported_half_precision_weights_give_the_same_features(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "cifar10.py"))
    settings = {**example["SETTINGS"], "method": "mocov2", **example["OF_METHOD"]["mocov2"]}
    settings |= {"batch_size": 4, "eval_every": 0, "epochs": 1, "log_to": ()}
    images, file = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8), tmp_path / "half.safetensors"
    clock = example["Clock"]()
    clock.load_state_dict({"hours": 2.0})  # the state of an interrupted run
    result = fastrm.pretrain(images, arch=example["SmallResNet"](), hooks=[clock], out=tmp_path / "run", **settings)
    assert 2 < result.scores["cpu_hours"] < 2.1
    example["export_half"](result.folder, file, "student")
    assert hashlib.sha256(file.read_bytes()).hexdigest() in file.with_name(f"{file.name}.md").read_text()
    assert file.stat().st_size < 1.5e6 < sum(4 * p.numel() for p in result.student.parameters())
    half = fastrm.load(file, arch=example["SmallResNet"]())
    views = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(half(views), result.student(views), rtol=0.02, atol=0.02)


def test_the_weights_of_the_cifar10_example_match_their_card() -> None:
    file, example = ROOT / "examples" / "cifar10.safetensors", runpy.run_path(str(ROOT / "examples" / "cifar10.py"))
    assert file.stat().st_size < 2e6
    assert hashlib.sha256(file.read_bytes()).hexdigest() in file.with_name(f"{file.name}.md").read_text("utf-8")
    model = fastrm.load(file, arch=example["SmallResNet"]())
    views = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = model(views)
    assert features.shape == (2, 192)
    assert features.isfinite().all()


def scenes(folder: Path, count: int) -> None:
    """Write dark images with a green and a blue square, and masks of the squares; rows with 255 are not counted."""
    rng = np.random.default_rng(count)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        image, mask = rng.integers(0, 90, (80, 100, 3), dtype=np.uint8), np.zeros((80, 100), np.uint8)
        for label in (1, 2):
            y, x = rng.integers(0, 40), rng.integers(0, 60)
            image[y : y + 40, x : x + 40, label], mask[y : y + 40, x : x + 40] = 230, label
        mask[:2] = 255
        Image.fromarray(image).save(folder / "images" / f"{number}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def test_segmentation_learns_from_the_map_of_a_vit(run: Callable[..., str], tmp_path: Path) -> None:
    run_of_one_step("test_vit", 96, tmp_path / "run")
    scenes(tmp_path / "scenes" / "train", 12)
    scenes(tmp_path / "scenes" / "val", 4)
    small = ["--size", "96", "--epochs", "5", "--batch-size", "4", "--workers", "0", "--lr", "0.01"]
    torch.manual_seed(0)
    shown = run("segmentation_torchvision.py", "--backbone", "run", "--data", "scenes", "--classes", "3", *small)
    found = re.findall(r"epoch \d: loss ([\d.]+), mean IoU ([\d.]+) %", shown)
    assert len(found) == 5
    assert float(found[-1][0]) < float(found[0][0])
    assert float(found[-1][1]) > 60  # predicting one class has less than 20


@pytest.fixture
def resnet18(tmp_path: Path) -> Path:
    """The exported backbone of a run in torchvision's format."""
    of, out = run_of_one_step("resnet18", 96, tmp_path / "run"), tmp_path / "mine.safetensors"
    export.main(["--checkpoint", str(of), "--format", "torchvision", "--out", str(out)])
    return out


def test_a_detector_takes_the_backbone(resnet18: Path) -> None:
    detector = runpy.run_path(str(ROOT / "examples" / "detector_torchvision.py"))["detector"]
    network = detector("resnet18", resnet18, 11, 96).eval()
    assert set(network([torch.rand(3, 96, 96)])[0]) == {"boxes", "labels", "scores"}


@pytest.mark.slow
@pytest.mark.usefixtures("resnet18")
@pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="needs pycocotools")
def test_detection_with_torchvision(run: Callable[..., str], tmp_path: Path) -> None:
    digits = open_source("digits").train
    assert digits.labels is not None
    (tmp_path / "images").mkdir()
    images, boxes = [], []
    for i in range(4):
        picture = digits.picture(i).resize((64, 64))
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
        "--annotations", "boxes.json", "--epochs", "1", "--batch-size", "2", "--size", "96",
    )  # fmt: skip
    assert "loss_box_reg" in shown


@pytest.mark.usefixtures("small_heads")
def test_a_custom_dataset_is_trained_on(pictures: Path, run: Callable[..., str], tmp_path: Path) -> None:
    files = sorted((pictures / "classes").rglob("*.jpg"))
    rows = [f"{file},{file.parent.name}" for file in files]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]))
    small = ["--arch", "test_resnet", "--image-size", "32", "--batch-size", "48", "--epochs", "1"]
    shown = run("own_dataset.py", "labels.csv", *small, "--out", "run")
    assert "96 items of Table; 10 classes; kNN is tested on a tenth" in shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 2
    assert 0 <= summary["knn_student"] <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("few_digits", "small_heads")
def test_a_custom_logger_records_metrics(run: Callable[..., str], tmp_path: Path) -> None:
    for steps in ("1", "2"):
        run("own_logger.py", "--max-steps", steps, "--out", "run")
    logged = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(int(step), float(value)) for step, name, value in logged if name == "loss"] == [
        (record["step"], record["loss"]) for record in records if "loss" in record
    ]
    assert [step for step, name, _ in logged if name == "knn_student"] == ["1", "2"]


SHELL = [ROOT / "examples" / name for name in ("elastic.sh", "slurm.sh")]
TINY = [
    "--data", "digits", "--arch", "test_resnet", "--image-size", "32", "--stem", "imagenet", "--batch-size", "32",
    "--hidden-dim", "32", "--output-dim", "16", "--predictor-hidden-dim", "32", "--epochs", "1", "--eval-every", "0",
    "--log-every", "1", "--checkpoint-every", "2", "--max-steps", "24", "--workers", "0", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize("script", SHELL, ids=lambda script: script.name)
def test_shell_scripts_have_valid_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def started(script: Path, out: Path, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a shell script of the examples, with stand-ins for SLURM's commands in ``folder``."""
    folder.mkdir(exist_ok=True)
    stubs = {
        "srun": 'shift; exec "$@"\n',  # drops the option of srun
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {folder}/asked; fi\n',
    }
    for name, text in stubs.items():
        (folder / name).write_text("#!/bin/bash\n" + text)
        (folder / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    given = {"PATH": path, "PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        ["bash", str(script), *TINY, "--out", str(out)],
        env={**os.environ, **given}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has logged a step."""
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[1][-2000:]
        threading.Event().wait(0.2)


def below(pid: int) -> list[int]:
    """The ids of all descendants of a process."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [each for child in map(int, found) for each in (child, *below(child))]


@pytest.mark.slow
def test_torchrun_restarts_a_run_after_a_process_was_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    agent = started(SHELL[0], out, tmp_path / "stubs", NODES="1:1", PROCESSES="2")
    until_step(out, 4, agent)
    os.kill(below(agent.pid)[-1], signal.SIGKILL)
    _, said = agent.communicate(timeout=400)
    assert agent.returncode == 0, said
    assert json.loads((out / "summary.json").read_text())["step"] == 24
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))


@pytest.mark.slow
def test_a_slurm_job_saves_requeues_and_continues(tmp_path: Path) -> None:
    out, stubs = tmp_path / "run", tmp_path / "stubs"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    job = started(SHELL[1], out, stubs, **slurm)
    until_step(out, 3, job)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=300)
    assert (stubs / "asked").read_text() == "requeue 7\n"
    done = checkpoint.load(out)["step"]
    assert 3 <= done < 24
    job = started(SHELL[1], out, stubs, **slurm, SLURM_RESTART_COUNT="1")
    _, said = job.communicate(timeout=400)
    assert job.returncode == 0, said
    assert checkpoint.load(out)["step"] == 24
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))
