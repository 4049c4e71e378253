"""Insufficient memory ends in one line and keeps the last checkpoint; a dry run reports memory and writes nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrm import evaluate, export, train
from fastrm.data import decode
from fastrm.data.torch_loader import _Views
from fastrm.errors import TrainingError, UsageError
from fastrm.machine import memory
from fastrm.run import checkpoint
from fastrm.run.step import Step
from fastrm.settings.config import Config
from tests.conftest import run_of_one_step
from tests.test_train import METHODS, assert_as_uninterrupted

ROOT = Path(__file__).parent.parent
Small = Callable[..., Config]


def torch_has_none() -> None:
    torch.empty(1 << 50)


def numpy_has_none() -> None:
    np.empty(1 << 60, np.uint8)


def python_has_none() -> None:
    bytearray(1 << 62)


def cuda_has_none() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 8 GiB")


def cudnn_has_none() -> None:
    try:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def the_system_has_none() -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


SHORTAGES = [torch_has_none, numpy_has_none, python_has_none, cuda_has_none, cudnn_has_none, the_system_has_none]


@pytest.mark.parametrize("short", SHORTAGES)
def test_errors_of_memory_are_recognised(short: Callable[[], None]) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as caught:
        short()
    assert memory.exhausted(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "std::bad_alloc",
        "encountered:\n\nCUDA allocation failed",
        "Caught _ArrayMemoryError in DataLoader worker process 0.\nOriginal Traceback: …",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
        "unable to mmap 1024 bytes from file </torch_1_2>: Cannot allocate memory (12)",
        "unable to write to file </torch_1_2>: No space left on device (28)",
    ],
)
def test_messages_of_memory_errors_are_recognised(text: str) -> None:
    assert memory.exhausted(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"), RuntimeError("shape '[2]' is invalid for input"),
        OSError(errno.ENOSPC, "No space left on device"), FileNotFoundError(errno.ENOENT, "none", "out of memory.jpg"),
        UsageError("out of memory"), ValueError("out of memory"),
        RuntimeError("out of resource: shared memory, Required: 300, Hardware limit: 200"),
    ],
    ids=repr,
)  # fmt: skip
def test_other_errors_are_not_taken_for_memory_errors(error: Exception) -> None:
    assert not memory.exhausted(error)


@pytest.mark.parametrize("short", SHORTAGES)
def test_a_step_without_memory_ends_in_one_line_and_keeps_the_last_checkpoint(
    short: Callable[[], None], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = {"method": "byol", "max_steps": 3, "accumulate": 2, "checkpoint_every": 1}
    plain, steps = Step._move, iter(range(10))
    monkeypatch.setattr(Step, "_move", lambda self: short() if next(steps) == 2 else plain(self))
    with pytest.raises(TrainingError) as caught:
        train.train(small(**leaves))
    said = str(caught.value)
    assert "\n" not in said
    for part in ("has not enough memory", "byol with test_resnet on 16 images of 32 pixels", "--batch-size 32"):
        assert part in said
    assert "raise --accumulate" in said
    if short is torch_has_none:
        assert "(for 4194304.00 GiB more)" in said
    assert checkpoint.load(tmp_path / "run")["step"] == 2
    if short is torch_has_none:
        monkeypatch.undo()
        train.train(small(**leaves))
        train.train(small(**leaves, out=tmp_path / "whole"))
        assert_as_uninterrupted(tmp_path / "run", tmp_path / "whole")


def test_an_evaluation_without_memory_reports_how_to_continue(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrm.hooks.evaluation.frozen_scores", lambda *args, **options: numpy_has_none())
    with pytest.raises(TrainingError, match=r"evaluation of test_resnet .* 1,437 features.*--eval-every 0"):
        train.train(small(max_steps=1, eval_every=1))
    assert checkpoint.load(tmp_path / "run")["step"] == 1
    train.train(small(max_steps=1, eval_every=0))
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_network_that_does_not_fit_is_reported_as_a_memory_error(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrm.methods.freeze_unused", lambda *args, **options: torch_has_none())
    with pytest.raises(TrainingError, match="has not enough memory"):
        train.train(small())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("short", [torch_has_none, numpy_has_none])
def test_a_loader_without_memory_ends_in_one_line(
    short: Callable[[], None], workers: int, small: Small, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Views, "_views", lambda *args: short())
    with pytest.raises(TrainingError, match=r"has not enough memory.*--workers") as caught:
        train.train(small(data=str(pictures / "flat"), workers=workers, scan=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("short", [torch_has_none, numpy_has_none, the_system_has_none])
def test_valid_files_are_not_called_broken_without_memory(
    short: Callable[[], None], small: Small, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(small(max_steps=1))
    picture = next((pictures / "flat").glob("*.jpg")).read_bytes()
    monkeypatch.setattr(decode, "_unknown_values", lambda image: short())
    with pytest.raises((MemoryError, RuntimeError, OSError)) as caught:
        decode.decode(picture)
    assert not isinstance(caught.value, decode.BrokenImage)
    monkeypatch.setattr(torch, "load", lambda *args, **options: short())
    with pytest.raises(TrainingError, match="has not enough memory"):
        train.train(small(max_steps=2))


def test_other_commands_report_insufficient_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_one_step("test_resnet", 32, tmp_path / "run")
    monkeypatch.setattr("fastrm.evaluate.gap", lambda *args: torch_has_none())
    with pytest.raises(TrainingError, match=r"an evaluation of .*run, 256 images at a time. Lower --workers"):
        evaluate.main(["--checkpoint", str(run), "--gap", "--device", "cpu"])
    monkeypatch.setattr("fastrm.export.read_pretrained", lambda *_, **__: numpy_has_none())
    with pytest.raises(TrainingError, match=r"has not enough memory.*an export of"):
        export.main(["--checkpoint", str(run), "--format", "timm", "--out", str(tmp_path / "out.safetensors")])
    assert not (tmp_path / "out.safetensors").exists()
    assert not (run / "evaluation.json").exists()
    from fastrm.terminal.shell import run as entry

    for short in SHORTAGES:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            entry(short)
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("error: ")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which Linux heeds")
@pytest.mark.slow
def test_a_run_that_is_too_large_for_its_process_ends_in_one_line(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from fastrm import train; from fastrm.terminal import shell\n"
        "most = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most)); shell.run(lambda: train.main(sys.argv[1:]))"
    )
    flags = ["--data", "digits", "--arch", "test_resnet", "--image-size", "512", "--batch-size", "1024", "--workers",
             "0", "--hidden-dim", "16", "--out", str(tmp_path / "run"), "--device", "cpu"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "warn" not in line.lower()]
    assert line.startswith("error: the host, with ")
    assert "mocov3 with test_resnet on 1024 images of 512 pixels" in line


def files(folder: Path) -> dict[str, Any]:
    """Modification time and content of every path below a folder."""
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in folder.rglob("*")}


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_reports_time_and_memory_and_writes_nothing(
    method: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = train.train(small(method=method, dry_run=True, max_steps=None, epochs=3, accumulate=2, out=None))
    assert files(tmp_path) == {}
    assert found["steps_per_epoch"] == 1437 // 32
    assert found["images_per_epoch"] == 32 * (1437 // 32)
    assert found["steps"] == 3 * (1437 // 32)
    assert found["epoch_seconds"] == pytest.approx(found["step_seconds"] * found["steps_per_epoch"])
    assert found["peak_memory"] > 2**26
    said = capsys.readouterr().out
    for part in (
        "memory     ",
        "step       ",
        "epoch      44 steps, 1,408 images",
        "run        132 steps",
        "nothing was",
    ):
        assert part in said


def test_a_dry_run_does_not_change_the_run_in_its_folder(small: Small, pictures: Path, tmp_path: Path) -> None:
    leaves = {"data": str(pictures / "flat"), "max_steps": 4}
    train.train(small(**{**leaves, "max_steps": 2}))
    before = files(tmp_path / "run")
    for changed in ({}, {"lr": 9.0, "method": "mocov2", "workers": 1}):
        train.train(small(**leaves, **changed, dry_run=True, eval_every=1, profile=2, verify_every=1))
    assert files(tmp_path / "run") == before
    train.train(small(**leaves))
    train.train(small(**leaves, out=tmp_path / "whole"))
    assert_as_uninterrupted(tmp_path / "run", tmp_path / "whole")


def test_a_dry_run_reports_foreign_files_in_the_folder(small: Small, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"--out .*config\.json"):
        train.train(small(dry_run=True))
    assert (tmp_path / "run" / "config.json").read_text() == "mine"


@pytest.mark.slow
def test_a_dry_run_in_two_processes(tmp_path: Path) -> None:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastrm.train"]
    flags = ["--data", "digits", "--arch", "test_resnet", "--image-size", "32", "--batch-size", "32", "--dry-run",
             "--hidden-dim", "16", "--method", "mocov2", "--queue-size", "96", "--device", "cpu"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *arguments, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch      44 steps, 1,408 images") == 1
    assert files(tmp_path) == {}


def test_a_dry_run_setting_does_not_prevent_a_resume(small: Small, tmp_path: Path) -> None:
    """Checkpoints of older versions, which lack this setting, also continue."""
    train.train(small(max_steps=1))
    path = tmp_path / "run" / checkpoint.NAME
    state = checkpoint.load(path)
    del state["config"]["dry_run"]
    torch.save({**state, "checksum": checkpoint.checksum(state)}, path)
    assert train.train(small(max_steps=2))["step"] == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dry_run"] is False
