"""Several processes on gloo: the full batch's gradient, one teacher and one queue everywhere, and the run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
METHODS = ["mocov3", "mocov2", "byol", "densecl"]


def torchrun(*arguments: str, processes: int = 2, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_loss_and_gradient_are_those_of_the_full_batch(tmp_path: Path) -> None:
    """Each method on a backbone with LayerNorm alone, and with BatchNorm over all processes; float64 and 1e-5."""
    done = torchrun("-m", "tests.distributed_worker", "gradients", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gradients.json").read_text())
    # The plain backbone with every method; BatchNorm where it is synchronised.
    assert set(results) == {*(f"{m} layernorm" for m in METHODS[:3]), "mocov3 batchnorm", "byol batchnorm"}
    for name, (loss, gradient) in results.items():
        assert loss < 1e-5, name
        assert gradient < 1e-5, name


def test_shuffled_batches_give_every_image_its_own_encoding(tmp_path: Path) -> None:
    done = torchrun("-m", "tests.distributed_worker", "shuffle", str(tmp_path))
    assert done.returncode == 0, done.stderr


# Behind the pooling of the last two are layers that DenseCL's loss does not reach.
TRAINED: list[Any] = [*((method, "test_resnet") for method in METHODS), ("densecl", "test_convnext")]
TRAINED += [pytest.param("densecl", "mobilenetv3_small_050", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("method", "arch"), TRAINED)
def test_teacher_and_queue_are_the_same_everywhere_after_20_steps(method: str, arch: str, tmp_path: Path) -> None:
    done = torchrun("-m", "tests.distributed_worker", "train", str(tmp_path), method, arch)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    start = torch.load(tmp_path / "start.pt", weights_only=True)
    moved = 0
    for name, value in first.items():
        if name.endswith(("running_mean", "running_var")) and method in ("mocov2", "densecl"):
            continue  # each process has its own, since its BatchNorm sees its own images
        assert torch.equal(value, second[name]), name
        moved += name.startswith("teacher.") and not torch.equal(value, start[name])
    assert moved > 10
    assert method in ("mocov3", "byol") or int(first["queues.0.pointer"]) == 20 * 16 % 96
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 21), 20]  # one process records, and evaluates at the end
    assert np.isfinite([line["loss"] for line in lines[:-1]]).all()


def test_a_run_of_two_processes_goes_on_where_it_was(tmp_path: Path) -> None:
    """Bit for bit, and only with as many processes."""
    command = [
        "-m", "fastrm.train", "--data", "digits", "--arch", "test_resnet", "--image-size", "32", "--batch-size", "16",
        "--epochs", "2", "--hidden-dim", "32", "--output-dim", "16", "--method", "mocov2", "--queue-size", "96",
        "--log-every", "1", "--eval-every", "0", "--workers", "0",
    ]  # fmt: skip
    for out, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        done = torchrun(*command, "--out", str(tmp_path / out), "--max-steps", str(steps))
        assert done.returncode == 0, done.stderr
    whole, parts = (
        torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["method"] for out in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    alone = torchrun(*command, "--out", str(tmp_path / "parts"), "--max-steps", "7", processes=1)
    assert alone.returncode != 0
    assert "is of a run in 2 processes, and these are 1" in alone.stderr
    assert "fastrm/train.py" not in alone.stderr  # no traceback of ours; torchrun adds its own


def test_what_torchrun_did_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrm.distributed import processes
    from fastrm.errors import UsageError

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but RANK, .* is not set; start several with torchrun"):
        processes(torch.device("cpu")).__enter__()
