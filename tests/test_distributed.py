"""Several processes on gloo: gradients of the full batch, one teacher and one queue in all, and the run folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.scaling import Machine, Run, share_of_evaluations
from fastrm import train
from fastrm.data import open_source
from fastrm.data.draws import BatchSampler
from fastrm.data.settling import settled
from fastrm.errors import UsageError
from fastrm.machine.distributed import processes
from fastrm.probes import Pixels, frozen_scores
from fastrm.probes.features import Setting
from fastrm.run import checkpoint
from fastrm.settings.fields import RunConfig
from tests.distributed_worker import EVAL_IMAGES, PARTS, QUEUE, STEPS, TRAINED, resumed, scores

ROOT = Path(__file__).parent.parent
METHODS = ["mocov3", "mocov2", "byol", "densecl", "dino"]


def worker(*arguments: str, launcher: Sequence[str] = (), timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run parts of tests/distributed_worker.py in two processes that it forks, or in those of a launcher."""
    command = [sys.executable, *launcher, "-m", "tests.distributed_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def torchrun(*arguments: str, processes: int = 2, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run parts of tests/distributed_worker.py under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return worker(*arguments, launcher=launcher, timeout=timeout)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of all parts in two processes. They are started once, because starting takes long."""
    folder = tmp_path_factory.mktemp("distributed")
    run = worker(str(folder), *PARTS, timeout=580)
    assert run.returncode == 0, run.stderr
    return folder


def test_loss_and_gradient_equal_those_of_the_full_batch(done: Path) -> None:
    """Loss and gradient of two processes equal those of one process on the whole batch within 1e-5, in float64.

    Each method has a backbone without BatchNorm, and two methods also have one with synchronised BatchNorm.
    """
    results = json.loads((done / "gradients.json").read_text())
    # All methods but DenseCL on the plain backbone, and BatchNorm where it is synchronised.
    assert set(results) == {*(f"{m} layernorm" for m in (*METHODS[:3], "dino")), "mocov3 batchnorm", "byol batchnorm"}
    for name, (loss, gradient) in results.items():
        assert loss < 1e-5, name
        assert gradient < 1e-5, name


def test_batchnorm_equals_that_of_the_whole_batch_with_one_collective_per_pass(done: Path) -> None:
    """The mean is far from 0, where E[x^2] - E[x]^2 would lose all its digits."""
    check_normalised(done)


def check_normalised(folder: Path, processes: int = 2) -> None:
    results = json.loads((folder / "normalised.json").read_text())
    assert len(results) == 10
    for name, found in results.items():
        assert found["exchanges"] == [1, 1], name
        for key, error in found["errors"].items():
            # A mean of about 300 is rounded to half of 2^-15 when it is computed and when it is added to the others,
            # and the standard deviation is 1. Gradients of parameters sum this over up to 140 values, weighted by the
            # upstream gradients.
            rounded = 2**-16 * 2 * processes * (140 if key.startswith("gradient of") else 1)
            assert error < (1e-11 if "float64" in name else rounded), (name, key)


def test_a_signal_to_one_process_reaches_all_without_a_wait(done: Path) -> None:
    assert all((done / f"signals{rank}").exists() for rank in (0, 1))


@pytest.mark.slow
def test_two_processes_read_one_value_per_step(tmp_path: Path) -> None:
    """The value tells whether the gradient is finite; on a GPU it stays on the device."""
    run = torchrun(str(tmp_path), "reads", timeout=580)
    assert run.returncode == 0, run.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"reads{rank}.json").read_text()) == dict.fromkeys(METHODS, 1)


@pytest.mark.slow
def test_networks_compile_without_graph_breaks_under_ddp(tmp_path: Path) -> None:
    run = torchrun(str(tmp_path), "compiled", timeout=580)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"compiled {m} {rank}" for m in METHODS for rank in (0, 1)}


def test_shuffled_batches_return_each_encoding_to_its_image(done: Path) -> None:
    assert all((done / f"shuffled{rank}").exists() for rank in (0, 1))


@pytest.mark.parametrize(("method", "arch"), TRAINED)
def test_teacher_and_queue_are_equal_in_all_processes(method: str, arch: str, done: Path) -> None:
    first, second = (torch.load(done / f"rank{rank} {method} {arch}.pt", weights_only=True) for rank in (0, 1))
    start = torch.load(done / f"start {method} {arch}.pt", weights_only=True)
    moved = 0
    for name, value in first.items():
        if name.endswith(("running_mean", "running_var")) and method in ("mocov2", "densecl"):
            continue  # the BatchNorm of each process sees only the images of that process
        assert torch.equal(value, second[name]), name
        moved += name.startswith("teacher.") and not torch.equal(value, start[name])
    assert moved > 10
    assert method in ("mocov3", "byol", "dino") or int(first["queues.0.pointer"]) == STEPS * 16 % QUEUE
    lines = [json.loads(line) for line in (done / f"{method} {arch}" / "metrics.jsonl").read_text().splitlines()]
    scores = [STEPS] if method == "mocov3" else []
    assert [line["step"] for line in lines] == [
        *range(1, STEPS + 1),
        *scores,
    ]  # one process records, and evaluates at the end
    assert np.isfinite([line["loss"] for line in lines[:STEPS]]).all()


def test_a_run_of_two_processes_resumes_in_two_and_in_one(done: Path, tmp_path: Path) -> None:
    """A run continues bit for bit in two processes. In one process it keeps batch size, queue and schedule."""
    whole, parts = (torch.load(done / out / "checkpoint.pt", weights_only=True)["method"] for out in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    shutil.copytree(done / "parts", tmp_path / "parts")
    before = checkpoint.load(tmp_path / "parts")
    train.train(resumed(tmp_path / "parts", 7))
    after = checkpoint.load(tmp_path / "parts")
    assert (after["step"], len(after["random"]), after["config"]["batch_size"]) == (7, 1, 16)
    assert int(after["method"]["queues.0.pointer"]) == 7 * 16 % QUEUE
    first, second = (state["method"]["queues.0.features"] for state in (before, after))
    assert torch.equal(first[16:], second[16:])  # the seventh batch replaces the first
    assert not torch.equal(first[:16], second[:16])


def test_the_images_of_a_step_are_the_same_in_any_number_of_processes() -> None:
    def step(number: int, processes: int) -> list[int]:
        samplers = [BatchSampler(100, 24 // processes, 3, rank, processes) for rank in range(processes)]
        for sampler in samplers:
            sampler.seek(number)
        return [index for sampler in samplers for index in next(iter(sampler)).images]

    for number in (0, 5, 11):
        assert step(number, 1) == step(number, 2) == step(number, 4)


@pytest.mark.slow
def test_a_run_continues_in_four_processes_after_two_and_in_one_after_four(tmp_path: Path) -> None:
    for part, number in (("first half", 2), ("second half", 4)):
        run = torchrun(str(tmp_path), part, processes=number)
        assert run.returncode == 0, run.stderr
    said = "the run used 2 processes, and continues with 4; their views differ from here on"
    assert f"{said}; --batch-size stays 16, 4 per process" in run.stdout
    train.train(resumed(tmp_path / "parts", 8))
    state = checkpoint.load(tmp_path / "parts")
    assert (state["step"], int(state["method"]["queues.0.pointer"])) == (8, 8 * 16 % QUEUE)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.slow
def test_four_processes_give_the_same_results(tmp_path: Path) -> None:
    run = torchrun(str(tmp_path), *PARTS, processes=4, timeout=1200)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "gradients.json").read_text())
    assert max(max(pair) for pair in results.values()) < 1e-5
    check_normalised(tmp_path, 4)
    agreed = [json.loads((tmp_path / f"agreeing{rank}.json").read_text())[0] for rank in range(4)]
    assert agreed == ["fp16"] * 4
    run_folder = tmp_path / "mocov3 test_resnet"
    scores(run_folder, tmp_path / "alone.json")
    ours, alone = (json.loads((tmp_path / name).read_text()) for name in ("evaluation.json", "alone.json"))
    assert numbers(ours) == numbers(alone)


@pytest.mark.slow
def test_a_run_survives_an_evaluation_longer_than_the_time_limit(tmp_path: Path) -> None:
    run = torchrun(str(tmp_path), "slowed")
    assert run.returncode == 0, run.stderr
    assert "knn_student" in json.loads((tmp_path / "slowed" / "summary.json").read_text())


def test_evaluations_of_imagenet_take_at_most_two_percent_by_the_cost_model() -> None:
    resnet50 = Run(forward=8.2e9, trained=0, averaged=0, norms=0, batch=512)
    share = share_of_evaluations(resnet50, 8, Machine(), RunConfig().eval_images)
    assert 0.005 < share < 0.02
    assert share_of_evaluations(resnet50, 8, Machine(), 1_281_167) > 0.05


def numbers(scored: dict[str, Any]) -> dict[str, Any]:
    """All values of evaluation.json by their path, apart from the gaps."""
    flat: dict[str, Any] = {}
    for name, value in scored.items():
        inner = numbers(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}/{further}": each for further, each in inner.items() if name != "gap"}
    return flat


def test_two_processes_give_the_scores_of_one(done: Path, tmp_path: Path) -> None:
    run = done / "mocov3 test_resnet"
    scores(run, tmp_path / "alone.json", neighbours=tmp_path / "alone.png")
    ours, alone = (json.loads(path.read_text()) for path in (done / "evaluation.json", tmp_path / "alone.json"))
    assert numbers(ours) == numbers(alone)
    assert len(numbers(ours)) > 40
    gaps, gaps_alone = (found["sets"]["digits"]["gap"] for found in (ours, alone))
    for place, gap in gaps_alone.items():
        assert gaps[place]["value"] == pytest.approx(gap["value"], rel=1e-9)
    assert (done / "neighbours.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
    # The evaluation within the run used the same images.
    summary = json.loads((run / "summary.json").read_text())
    for name in ("student", "teacher", "pixels"):
        assert summary[f"knn_{name}"] == ours["sets"]["digits"]["scores"][name]["knn20"]["value"]
    assert (summary["knn_bank"], summary["knn_test"]) == (EVAL_IMAGES, EVAL_IMAGES)


def test_an_evaluation_may_take_longer_than_the_time_limit(done: Path) -> None:
    first, second = (json.loads((done / f"slow{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    source = settled(open_source("digits")).limited(EVAL_IMAGES)
    alone = frozen_scores({"it": Pixels(8)}, source, Setting(16, torch.device("cpu"), 0), knn=True)["it"]
    assert first == [value.value for value in alone.values()]


def test_an_error_of_one_process_ends_all_with_one_line(done: Path) -> None:
    first, second = (json.loads((done / f"failing{rank}.json").read_text()) for rank in (0, 1))
    assert second == ["UsageError: --data is wrong", "KeyError: 'a bug'"]
    assert first == ["UsageError: --data is wrong", "TrainingError: process 1 failed: 'a bug'"]


def test_the_first_process_lists_for_all(done: Path) -> None:
    """The second process has an empty cache, lists nothing, and does not find some of the files."""
    first, second = (json.loads((done / f"started{rank}.json").read_text()) for rank in (0, 1))
    assert first[:2] == [2, [".index"]]
    assert second[:2] == [0, []]
    assert first[2] == second[2]
    assert (first[3], second[3] > 0) == (0, True)
    assert "of 48 files that process 0 on" in first[2]
    assert "misses 20 and finds 0 of another size; the first is" in first[2]
    assert not (done / "other").exists()
    assert json.loads((done / "started" / "summary.json").read_text())["images"] == 48


def test_processes_on_different_gpus_choose_one_precision(done: Path) -> None:
    found = [json.loads((done / f"agreeing{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [["fp16", "--precision bf16: this GPU does not have it; use fp16 or fp32"]] * 2


def test_a_run_uses_the_process_group_of_a_script_and_leaves_it(done: Path) -> None:
    first, second = (json.loads((done / f"borrowed{rank}.json").read_text()) for rank in (0, 1))
    assert "of this script has gloo for tensors on cuda, and a run there needs nccl" in first[0]
    assert first[0] == second[0]
    assert first[1].startswith("1 of the 2 processes of this script's process group have started a run within")
    assert first[2:] == ["0 of 2", True]
    assert second[1:] == ["1 of 2", True]


def test_missing_variables_of_torchrun_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but RANK, .* is not set; start several with torchrun"):
        processes(torch.device("cpu")).__enter__()
