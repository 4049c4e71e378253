"""Whose a run folder's files are, and who has it: nothing of others is touched, and two runs never share one."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from fastrm import checkpoint, folder, lock, own, train
from fastrm.config import Config
from fastrm.errors import TrainingError, UsageError
from fastrm.lock import Lock
from tests.conftest import run_of_one_step
from tests.test_run_folder import no_steps
from tests.test_train import records

ROOT = Path(__file__).parent.parent
Small = Callable[..., Config]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of_one_step("test_resnet", 32, tmp_path_factory.mktemp("own") / "run")


def theirs(path: Path) -> None:
    """Write a file of this name as another program would."""
    others: dict[str, Callable[[], object]] = {
        "config.json": lambda: path.write_text('{"model_type": "bert", "hidden_size": 768}'),
        "metrics.jsonl": lambda: path.write_text('{"step": 1, "epoch": 0.1, "loss": 3.2}\n'),
        "checkpoint.pt": lambda: torch.save({"config": {}, "step": 3, "method": {}, "format": 3}, path),
        "checkpoint-12.pt": lambda: torch.save({"state_dict": {}}, path),
        "backbone.safetensors": lambda: save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"}),
        "summary.json": lambda: path.write_text('{"step": 3, "accuracy": 0.9}'),
        "skipped.txt": lambda: path.write_text("a.jpg\nb.jpg\n"),
        "evaluation.json": lambda: path.write_text('{"sets": {}}'),
        "trace.json": lambda: path.write_text('{\n"schemaVersion": 1,\n"traceEvents": []}'),
        ".fastrm.lock": lambda: path.write_text("mine"),
        "tensorboard/other/notes.txt": lambda: path.write_text("mine"),
        "report/index.html": lambda: path.write_text("<html>mine</html>"),
        "checkpoint.pt/notes.txt": lambda: path.write_text("mine"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    name = next(name for name in others if path.as_posix().endswith(f"/{name}"))
    others[name]()


NAMES = [
    "config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-12.pt", "backbone.safetensors", "summary.json",
    "skipped.txt", "evaluation.json", "trace.json", ".fastrm.lock", "tensorboard/other/notes.txt", "report/index.html",
    "checkpoint.pt/notes.txt",
]  # fmt: skip


def content(where: Path) -> dict[str, bytes | None]:
    """All below a folder, by name; None for folders."""
    return {
        path.relative_to(where).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(where.rglob("*"))
    }


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_a_file_of_another_is_refused_and_left_as_it_is(
    name: str, resume: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    theirs(out / name)
    (out / "thesis.tex").write_text("mine")
    before = content(tmp_path)
    no_steps(monkeypatch)
    with pytest.raises(UsageError, match=f"--out .*out holds {name.split('/')[0]}") as caught:
        train.train(small(out=out, resume=resume))
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tensorboard")])
def test_so_is_a_run_in_which_one_was_replaced(name: str, a_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", a_run, out], check=True)
    folder.claim(out)
    if (out / name).parent.is_file():
        (out / name).parent.unlink()
    theirs(out / name)
    with pytest.raises(UsageError, match=f"holds {name.split('/')[0]}"), folder.held(out):
        pass


def test_a_link_to_nowhere_is_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"holds config\.json, which is a link to nowhere"):
        folder.claim(tmp_path)


def test_only_what_fastrm_wrote_is_removed_by_a_fresh_run(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny = {"batch_size": 8, "hidden_dim": 8, "output_dim": 8, "predictor_hidden_dim": 8, "resume": "never"}
    train.train(small(**tiny, max_steps=4, checkpoint_every=1, profile=1))
    written = content(out)
    assert {"trace.json", "checkpoint-3.pt"} <= written.keys()
    for name in ("thesis.tex", "checkpoint-best.pt", "my.json", "tensorboard/other/notes.txt", "tensorboard/notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    writer = SummaryWriter(str(out / "tensorboard"))
    for step in range(9):
        writer.add_scalar("my accuracy", step, step)
    writer.close()
    (out / "evaluation.json").write_text('{"fastrm": "0.1.0", "sets": {}}')
    (out / "skipped.txt").write_text("a.jpg\tbroken\n")
    mine = {name: text for name, text in content(out).items() if name not in written}
    del mine["evaluation.json"], mine["skipped.txt"]
    train.train(small(**tiny, max_steps=1))
    after = content(out)
    assert mine.items() <= after.items()
    assert after.keys() - mine.keys() == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "backbone.safetensors", "summary.json", "tensorboard",
        *(name for name in after if name.endswith(own.EVENTS)),
    }  # fmt: skip
    assert [record["step"] for record in records(out)] == [1]


def test_runs_from_before_files_said_whose_they_are_go_on(small: Small, tmp_path: Path) -> None:
    """Such runs have the same content, without the marks."""
    out = tmp_path / "run"
    tiny = {"batch_size": 8, "hidden_dim": 8, "output_dim": 8, "predictor_hidden_dim": 8}
    train.train(small(**tiny, max_steps=3, profile=1))
    for path in (out / "tensorboard").iterdir():
        path.rename(path.with_name(path.name.removesuffix(own.EVENTS)))
    profile = out / "trace.json"
    profile.write_text(profile.read_text().replace('"fastrm":', '"other":'))
    train.train(small(**tiny, max_steps=4, profile=1))
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4]
    train.train(small(**tiny, max_steps=1, resume="never"))
    (left,) = (out / "tensorboard").iterdir()
    assert left.name.endswith(own.EVENTS)
    assert not profile.exists()


def test_the_records_of_another_run_are_not_gone_on_with(small: Small, tmp_path: Path) -> None:
    """A folder of a run that ended before its first checkpoint, into which another is resumed."""
    tiny = {"batch_size": 8, "hidden_dim": 8, "output_dim": 8, "predictor_hidden_dim": 8}
    train.train(small(**tiny, max_steps=2, out=tmp_path / "first"))
    train.train(small(**tiny, max_steps=1, lr=0.1))
    (tmp_path / "run" / checkpoint.NAME).unlink()
    train.train(small(**tiny, max_steps=3, resume=str(tmp_path / "first")))
    assert [record["step"] for record in records(tmp_path / "run")] == [3]


HOLD = """
import sys, time, pathlib, multiprocessing
from fastrm import lock
sys.modules["fastrm.lock"].BEAT = float(sys.argv[2])
if sys.argv[3] == "unguarded":
    lock.fcntl = None
held = lock.Lock(pathlib.Path(sys.argv[1]))
held.acquire()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
child.start()
print("held", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Start another process that holds the lock of a folder, and has forked one of its own."""
    started: list[subprocess.Popen[str]] = []
    children: list[int] = []

    def start(out: Path, beat: float = 10.0, guarded: bool = True) -> subprocess.Popen[str]:
        arguments = [str(out), str(beat), "guarded" if guarded else "unguarded"]
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        word, child = process.stdout.readline().split()
        assert word == "held"
        children.append(int(child))
        return process

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("guarded", [True, False])
def test_a_second_run_is_refused_until_the_first_is_dead(
    guarded: bool, holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a process that the first one forked lives on, and where the file system has no lock."""
    if not guarded:
        monkeypatch.setattr(lock, "fcntl", None)
    process = holder(tmp_path, guarded=guarded)
    with pytest.raises(
        UsageError, match=f"in use by process {process.pid} on {socket.gethostname()} since 2"
    ) as caught:
        Lock(tmp_path).acquire()
    assert "\n" not in str(caught.value)
    process.kill()
    process.wait()
    begin = time.monotonic()
    mine = Lock(tmp_path)
    mine.acquire()
    assert time.monotonic() - begin < 10  # at once: it does not wait for silence
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_another_machine_is_listened_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lock is seen by none but what the file says, and by its signs of life."""
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "STALE", 2.0)
    path = tmp_path / lock.NAME
    about = {"fastrm": lock.NAME, "host": "node7", "process": 12, "machine": "another", "since": "2026-01-01"}
    path.write_text(json.dumps(about))
    end = threading.Event()

    def live() -> None:
        while not end.wait(0.05):
            os.utime(path)

    beats = threading.Thread(target=live)
    beats.start()
    try:
        with pytest.raises(UsageError, match="process 12 on node7"):
            Lock(tmp_path).acquire()
    finally:
        end.set()
        beats.join()
    assert "waiting 2 s for a sign of life" in capsys.readouterr().out
    silent = Lock(tmp_path)
    silent.acquire()
    silent.release()
    path.write_text(json.dumps(about))
    os.utime(path, (1e9, 1e9))  # years ago: it is not waited for
    monkeypatch.setattr(lock, "STALE", 1e9)
    silent = Lock(tmp_path)
    silent.acquire()
    silent.release()


def test_a_file_system_without_locks_is_told_by_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", missing)
    mine = Lock(tmp_path)
    mine.acquire()
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == socket.gethostname()
    mine.release()


def test_a_run_that_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    mine = Lock(tmp_path)
    mine.acquire()
    mine.check()
    (tmp_path / lock.NAME).write_text("{}")
    limit = time.monotonic() + 20
    while not mine._lost and time.monotonic() < limit:
        pass
    with pytest.raises(TrainingError, match="taken over by another run"):
        mine.check()
    mine.release()
    assert (tmp_path / lock.NAME).exists()  # it is the other's


def test_a_run_holds_its_folder_and_leaves_no_lock(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"batch_size": 8, "hidden_dim": 8, "output_dim": 8, "predictor_hidden_dim": 8, "max_steps": 1}
    plain = folder.prepare
    seen: list[str] = []

    def prepare(*arguments: Any, **options: Any) -> None:
        with pytest.raises(UsageError) as caught:
            train.train(small(**tiny))
        seen.append(str(caught.value))
        plain(*arguments, **options)

    monkeypatch.setattr(folder, "prepare", prepare)
    train.train(small(**tiny))
    assert [f"in use by process {os.getpid()} on" in text for text in seen] == [True]
    assert not (tmp_path / "run" / lock.NAME).exists()
    with pytest.raises(UsageError, match="nowhere does not exist"):
        train.train(small(**tiny, out=tmp_path / "deep" / "new", resume=str(tmp_path / "nowhere")))
    assert not (tmp_path / "deep").exists()


@pytest.mark.slow  # four commands, two of them two processes
def test_after_sigkill_the_same_command_goes_on_at_once(tmp_path: Path, pictures: Path) -> None:
    """With loader processes, which live on for a moment; and meanwhile the command is refused in all processes."""
    command = [
        sys.executable, "-m", "fastrm.train", "--data", str(pictures / "flat"), "--arch", "test_resnet",
        "--image-size", "32", "--batch-size", "8", "--epochs", "500", "--max-steps", "5000", "--hidden-dim", "8",
        "--output-dim", "8", "--predictor-hidden-dim", "8", "--log-every", "1", "--workers", "1",
        "--checkpoint-every", "2", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    options: dict[str, Any] = {"cwd": ROOT, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    assert run.stdout is not None
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert run.stdout.readline()
    several = [*command[:1], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command[1:]]
    second = subprocess.run(several, capture_output=True, check=False, **options)
    assert second.returncode != 0
    said = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 2
    assert all(f"in use by process {run.pid} on" in line for line in said), second.stderr[-3000:]
    run.kill()
    run.wait()
    run.stdout.close()
    done = checkpoint.load(tmp_path / "run")["step"]
    again = subprocess.run(
        [*command, "--max-steps", str(done + 1)], capture_output=True, check=False, timeout=200, **options
    )
    assert again.returncode == 0, again.stderr
    assert f"continued after step {done}" in again.stdout
    assert "waiting" not in again.stdout


@pytest.mark.parametrize("number", range(3))
def test_photographs_are_never_taken_for_fastrms(number: int, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    assert not own.picture(path)
    for wrote in {*own.RUN.values(), own.card, own.onnx, own.state, own.timm_config, own.page, own.plot}:
        with pytest.raises(UsageError, match="move it away"):
            own.require("--out", path, wrote)
