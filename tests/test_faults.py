"""Interrupted and failing runs: they continue bit for bit, or end with one line and keep the last good checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrm import Trainer, train
from fastrm.errors import Stopped, TrainingError, UsageError
from fastrm.machine.distributed import world
from fastrm.machine.lock import NAME, Lock
from fastrm.machine.signals import Deaths, Signals
from fastrm.methods import build_method
from fastrm.methods.verify import verify
from fastrm.methods.verify import warning as verification_warning
from fastrm.run import checkpoint
from fastrm.run.faults import faults
from fastrm.settings.config import Config
from tests.test_train import METHODS, assert_as_uninterrupted, records, same

ROOT = Path(__file__).parent.parent
Small = Callable[..., Config]
FLAGS = [
    "--data", "digits", "--arch", "test_resnet", "--image-size", "32", "--batch-size", "32", "--epochs", "8",
    "--stem", "imagenet",
    "--hidden-dim", "32", "--output-dim", "16", "--predictor-hidden-dim", "32", "--log-every", "1", "--eval-every", "0",
]  # fmt: skip


def command(out: Path, *more: str) -> list[str]:
    """The command of a small run."""
    return [sys.executable, "-m", "fastrm.train", *FLAGS, "--out", str(out), *more]


def until_step(process: subprocess.Popen[str], step: int) -> None:
    """Read the output of a run until it has logged a step."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1]) >= step:
            return
    raise AssertionError(process.communicate()[1][-2000:])


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """A function that calls ``do`` after a step of a run in this process."""

    def patch(step: int, do: Callable[[], object]) -> None:
        plain = Signals.asked

        def asked(self: Signals, **wishes: bool) -> Any:
            asked.calls += 1  # type: ignore[attr-defined]
            if asked.calls == step:  # type: ignore[attr-defined]
                do()
            return plain(self, **wishes)

        asked.calls = -1  # type: ignore[attr-defined] (it is asked once before the first step)
        monkeypatch.setattr(Signals, "asked", asked)

    return patch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_the_same_command_continues(
    number: signal.Signals, small: Small, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(small(max_steps=5, out=tmp_path / "whole"))
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    stop_after(2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="after step 2 and saved") as stopped:
        train.train(small(max_steps=5, out=tmp_path / "cut"))
    assert stopped.value.status == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    monkeypatch.undo()
    train.train(small(max_steps=5, out=tmp_path / "cut"))
    assert_as_uninterrupted(tmp_path / "cut", tmp_path / "whole")


def test_sigusr1_saves_and_the_run_continues(small: Small, tmp_path: Path, stop_after: Any) -> None:
    stop_after(2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    train.train(small(max_steps=5))
    assert [step for step, _ in checkpoint.older(tmp_path / "run")] == [2]
    assert checkpoint.load(tmp_path / "run")["step"] == 5


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = (
        "import os, signal, time; from fastrm.machine.signals import Signals\n"
        "with Signals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert signals.asked()[:2] == (True, 15)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=50, check=False)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_shell_command_saves(tmp_path: Path) -> None:
    """The signal also reaches the loader processes, as it does from a scheduler."""
    run = subprocess.Popen(
        command(tmp_path / "run", "--loader", "torch", "--workers", "1"), cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until_step(run, 3)
    os.killpg(run.pid, signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143, said
    assert "Traceback" not in said
    done = checkpoint.load(tmp_path / "run")["step"]
    assert f"stopped after step {done} and saved" in said
    assert [record["step"] for record in records(tmp_path / "run")] == [*range(1, done + 1)]


@pytest.mark.parametrize(
    "moment", [pytest.param("in a step", marks=pytest.mark.slow), "in a save", "between two names"]
)
def test_a_killed_run_continues_and_ends_like_an_uninterrupted_one(
    moment: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL is simulated by an exception that nothing catches, and after which nothing is cleaned up."""
    options = {"max_steps": 7, "checkpoint_every": 2, "method": "mocov2"}
    train.train(small(**options, out=tmp_path / "whole"))

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        saves = iter(range(100))
        if moment == "in a step":
            from fastrm.run.step import Step

            plain_check = Step.check

            def check(step: Step, done: int) -> int:
                if next(saves) == 4:
                    raise Killed
                return plain_check(step, done)

            patch.setattr(Step, "check", check)
        elif moment == "in a save":
            plain_save = torch.save

            def half(state: Any, path: Path) -> None:
                plain_save(state, path)
                if next(saves) == 1:
                    path.write_bytes(path.read_bytes()[:5000])
                    raise Killed

            patch.setattr(torch, "save", half)
        else:
            plain_replace = os.replace

            def replace(source: Path, target: Path) -> None:
                if Path(target).name == checkpoint.NAME and next(saves) == 1:
                    raise Killed
                plain_replace(source, target)

            patch.setattr(os, "replace", replace)
        with pytest.raises((Killed, TrainingError)):
            train.train(small(**options, out=tmp_path / "cut"))
    assert checkpoint.load(tmp_path / "cut")["step"] in (2, 4)
    train.train(small(**options, out=tmp_path / "cut"))
    assert_as_uninterrupted(tmp_path / "cut", tmp_path / "whole")


def test_keep_and_keep_every_decide_which_checkpoints_stay(small: Small, tmp_path: Path) -> None:
    train.train(small(max_steps=10, checkpoint_every=1, keep=3, keep_every=4))
    assert [step for step, _ in checkpoint.older(tmp_path / "run")] == [9, 8, 4]
    assert checkpoint.load(tmp_path / "run")["step"] == 10
    for step, path in checkpoint.older(tmp_path / "run"):
        assert checkpoint.load(path)["step"] == step
    train.train(small(max_steps=1, resume="never"))
    assert checkpoint.older(tmp_path / "run") == []


@pytest.mark.parametrize("damage", ["flipped", *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "gone"))])
def test_a_damaged_newest_checkpoint_is_replaced_by_the_previous_one(
    damage: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"checkpoint_every": 2}
    train.train(small(**options, max_steps=6, out=tmp_path / "whole"))
    train.train(small(**options, max_steps=4))
    newest = tmp_path / "run" / checkpoint.NAME
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[:-1000])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    else:
        newest.unlink()
    capsys.readouterr()
    train.train(small(**options, max_steps=6))
    said = capsys.readouterr().out
    assert (damage == "gone") or "continuing from checkpoint-2.pt" in said
    assert "continued after step 2" in said
    assert_as_uninterrupted(tmp_path / "run", tmp_path / "whole")
    assert [step for step, _ in checkpoint.older(tmp_path / "run")] == [4]


def test_the_checksum_detects_any_changed_byte(small: Small, tmp_path: Path) -> None:
    train.train(small(max_steps=1, stem="small"))
    state = checkpoint.load(tmp_path / "run")
    right = checkpoint.checksum(state)
    weight = state["method"]["student.backbone.net.conv1.weight"]
    plain = weight[3, 1, 2, 0].clone()
    weight[3, 1, 2, 0] = torch.nextafter(plain, torch.tensor(9.0))
    assert checkpoint.checksum(state) != right
    weight[3, 1, 2, 0] = plain
    assert checkpoint.checksum(state) == right
    state["step"] += 1
    assert checkpoint.checksum(state) != right


def test_a_save_does_not_delay_the_next_step(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Any
) -> None:
    """The next step runs while a checkpoint is written, and the file has the state at the time of the save."""
    written, stepped = threading.Event(), threading.Event()
    plain = torch.save

    def slow(state: Any, path: Path) -> None:
        if state["step"] == 2:
            assert stepped.wait(60)
            written.set()
        plain(state, path)

    monkeypatch.setattr(torch, "save", slow)
    stop_after(3, lambda: (not written.is_set()) and stepped.set())
    train.train(small(max_steps=4, checkpoint_every=2))
    assert written.is_set()
    monkeypatch.undo()
    train.train(small(max_steps=2, out=tmp_path / "two"))
    ((_, path),) = checkpoint.older(tmp_path / "run")
    assert same(checkpoint.load(path)["method"], checkpoint.load(tmp_path / "two")["method"])


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(small: Small, little_disk: Path, tmp_path: Path) -> None:
    options = {"checkpoint_every": 1, "hidden_dim": 16, "output_dim": 8, "predictor_hidden_dim": 16, "keep": 1}
    train.train(small(**options, max_steps=1, out=tmp_path / "size"))
    size = (tmp_path / "size" / checkpoint.NAME).stat().st_size
    subprocess.run(["mount", "-o", f"remount,size={round(1.6 * size)}", little_disk], check=True)
    with pytest.raises(TrainingError, match="cannot be written: No space left on device"):
        train.train(small(**options, max_steps=6, out=little_disk / "run"))
    kept = checkpoint.load(little_disk / "run")["step"]
    assert kept >= 1
    assert not list((little_disk / "run").glob(".*partial"))
    subprocess.run(["mount", "-o", f"remount,size={20 * size}", little_disk], check=True)
    train.train(small(**options, max_steps=6, out=little_disk / "run"))
    train.train(small(**options, max_steps=6, out=tmp_path / "whole"))
    assert_as_uninterrupted(little_disk / "run", tmp_path / "whole")


def test_too_many_open_files_are_not_blamed_on_the_run_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(TrainingError, match=r"too many files are open; raise their limit \(ulimit -n\)"),
        faults(tmp_path, world(), Deaths(), resumes=True),
    ):
        raise OSError(errno.EMFILE, "Too many open files")


# TensorBoard's own thread prints a traceback if its file is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_output_folder_that_vanishes_ends_the_run_in_one_line(small: Small, tmp_path: Path, stop_after: Any) -> None:
    # The folder is renamed and not deleted, because TensorBoard's thread may write into it meanwhile.
    stop_after(2, lambda: (tmp_path / "run").rename(tmp_path / "gone"))
    with pytest.raises(TrainingError, match=r"No such file or directory|does not exist") as caught:
        train.train(small(max_steps=4, checkpoint_every=1))
    assert "\n" not in str(caught.value)


def test_a_file_deleted_or_truncated_during_an_epoch_is_left_out_and_listed(
    small: Small, pictures: Path, tmp_path: Path, stop_after: Any
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures / "flat", folder)
    files = sorted(folder.rglob("*.jpg"))

    def harm() -> None:
        files[0].unlink()
        files[1].write_bytes(files[1].read_bytes()[:100])

    stop_after(1, harm)
    with pytest.warns(UserWarning, match="left out"):
        # this loader reads the files in each epoch
        train.train(small(data=str(folder), max_steps=12, workers=1, loader="torch"))
    listed = (tmp_path / "run" / "skipped.txt").read_text()
    assert {line.split("\t")[0] for line in listed.splitlines()} == {str(files[0]), str(files[1])}


def test_a_loader_process_that_is_killed_ends_the_run_in_one_line(
    small: Small, pictures: Path, tmp_path: Path, stop_after: Any
) -> None:
    import multiprocessing

    stop_after(2, lambda: [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()])
    options = {"data": str(pictures / "flat"), "max_steps": 12, "workers": 1, "checkpoint_every": 1}
    with pytest.raises(TrainingError, match="loader process ended"):
        train.train(small(**options))
    assert checkpoint.load(tmp_path / "run")["step"] >= 1  # the signal may arrive during the second save
    train.train(small(**options))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr)
def test_a_broken_pipe_to_a_loader_process_is_reported_as_its_death(
    error: Exception, small: Small, stop_after: Any
) -> None:
    def broken() -> None:
        raise error

    stop_after(2, broken)
    with pytest.raises(TrainingError, match="loader process ended"):
        train.train(small(max_steps=4))


def test_a_dead_loader_process_is_not_reported_again_while_the_run_is_closed(
    small: Small, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torchs(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def broken() -> None:
        raise EOFError

    plain = Lock.release

    def release(self: Lock) -> None:
        os.kill(os.getpid(), signal.SIGCHLD)
        plain(self)

    monkeypatch.setattr(Lock, "release", release)
    stop_after(2, broken)
    before = signal.signal(signal.SIGCHLD, torchs)
    try:
        with pytest.raises(TrainingError, match="loader process ended"):
            train.train(small(max_steps=4))
        assert signal.getsignal(signal.SIGCHLD) is torchs
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not (tmp_path / "run" / NAME).exists()


def test_a_clock_that_is_set_back_changes_nothing(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(small(max_steps=4, out=tmp_path / "whole"))
    train.train(small(max_steps=2))
    monkeypatch.setattr(time, "time", lambda: 1e8)
    os.utime(tmp_path / "run" / checkpoint.NAME, (1e8, 1e8))
    train.train(small(max_steps=4))
    assert_as_uninterrupted(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_one_of_two_processes_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastrm.train", *FLAGS]
    run = subprocess.Popen(
        [sys.executable, *arguments, "--out", str(tmp_path / "run"), "--checkpoint-every", "1"], cwd=ROOT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    until_step(run, 2)
    ours = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    ranks = [pid for pid in ours if "fastrm/train.py" in Path(f"/proc/{pid}/cmdline").read_text()
             or "fastrm.train" in Path(f"/proc/{pid}/cmdline").read_text()]  # fmt: skip
    begin = time.monotonic()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, said = run.communicate(timeout=90)
    assert time.monotonic() - begin < 60
    assert run.returncode != 0
    assert (
        "another process ended or can no longer be reached" in said or "stopped after step" in said or "SIGKILL" in said
    )
    assert checkpoint.load(tmp_path / "run")["step"] >= 1


@pytest.mark.parametrize("method", METHODS)
def test_verification_compares_fused_and_reference_on_the_current_batch(
    method: str, small: Small, tmp_path: Path
) -> None:
    options = {"method": method, "max_steps": 4}
    train.train(small(**options, out=tmp_path / "plain"))
    train.train(small(**options, verify_every=2, out=tmp_path / "watched"))
    assert same(*(checkpoint.load(tmp_path / name)["method"] for name in ("plain", "watched")))
    found = [r for r in records(tmp_path / "watched") if "verify_loss" in r]
    assert [r["step"] for r in found] == [2, 4]
    assert all(r["verify_loss"] < 1e-5 and r["verify_gradient"] < 1e-4 for r in found)


def test_verification_detects_a_wrong_fused_gradient(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrm.methods import contrastive

    plain = contrastive.residual_info_nce

    def wrong(*args: Any, backend: str | None, **options: Any) -> Any:
        loss, *others = plain(*args, backend=backend, **options)
        return loss * (1 if backend == "reference" else 1.05), *others

    monkeypatch.setattr(contrastive, "residual_info_nce", wrong)
    method = build_method(small(method="mocov3"))
    found = verify(method, (torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)), torch.tensor(1.0))
    np.testing.assert_allclose([found["verify_loss"], found["verify_gradient"]], 0.05, rtol=1e-3)
    assert "--kernels reference" in str(verification_warning(found))
    assert verification_warning({"verify_loss": 1e-4, "verify_gradient": 1e-3}) is None


def as_of_two_processes(out: Path) -> None:
    """Change a checkpoint to one of a run in two processes with the same batches."""
    path = out / checkpoint.NAME
    state = checkpoint.load(path)
    state["random"] *= 2
    torch.save({**state, "checksum": checkpoint.checksum(state)}, path)


def test_a_run_continues_in_another_number_of_processes_and_reports_the_changes(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampler, queue, random states and schedule continue, and the batch size of the checkpoint is kept."""
    leaves = {"method": "mocov2", "queue_size": 256}
    train.train(small(**leaves, max_steps=5, out=tmp_path / "whole"))
    train.train(small(**leaves, max_steps=2))
    as_of_two_processes(tmp_path / "run")
    batch = checkpoint.load(tmp_path / "run")["config"]["batch_size"]
    assert batch != 256
    train.train(small(**leaves, max_steps=5, batch_size=None))
    said = capsys.readouterr().out
    assert "the run used 2 processes, and continues with 1; their views differ from here on" in said
    assert f"--batch-size stays {batch}, {batch} per process" in said
    assert_as_uninterrupted(tmp_path / "run", tmp_path / "whole")


def test_a_run_continues_at_the_next_epoch_with_other_processes_and_batch_size(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(small(max_steps=1, epochs=4))
    before = checkpoint.load(tmp_path / "run")
    with pytest.raises(UsageError, match="--batch-size was"):
        train.train(small(max_steps=3, epochs=4, batch_size=480))
    as_of_two_processes(tmp_path / "run")
    train.train(small(max_steps=4, epochs=4, batch_size=480))
    then = before["config"]["batch_size"]
    said = f"--batch-size was {then}, is 480: the run continues at epoch 1, with the learning rate of the new batch"
    assert said in capsys.readouterr().out
    after = checkpoint.load(tmp_path / "run")
    assert after["step"] == 4
    assert after["images"]["shift"] == 1  # the batch size gives 2 steps per epoch, and 1 step was made
    assert records(tmp_path / "run")[-1]["epoch"] == 2.5


def test_a_checkpoint_is_saved_after_checkpoint_minutes(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes two minutes on the simulated clock."""
    now = [0.0]
    monkeypatch.setattr("fastrm.hooks.checkpoints.time.monotonic", lambda: now[0])
    saved: list[int] = []

    class Watch:
        def on_step(self, run: Any, step: int, _: object) -> None:
            now[0] += 120.0

        def on_checkpoint(self, run: Any, path: Path) -> None:
            saved.append(run.step)

    def steps_saved(**leaves: Any) -> list[int]:
        saved.clear()
        narrow = {"batch_size": 4, "hidden_dim": 16, "predictor_hidden_dim": 16, "output_dim": 8}
        config = small(epochs=1, max_steps=14, checkpoint_every=8, resume="never", **narrow, **leaves).flat()
        Trainer(**config, hooks=[Watch()]).fit()
        return list(saved)

    assert steps_saved(checkpoint_minutes=5) == [3, 6, 8, 11, 14]
    assert steps_saved() == [8, 14]  # after 8 steps of two minutes, the next checkpoint is due
    assert steps_saved(checkpoint_minutes=0) == [8, 14]
