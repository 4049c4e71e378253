"""Ownership of run folders: files of other programs are never changed, and two runs never share a folder."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
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

from fastrm import evaluate, export, own, report, train
from fastrm.data.__main__ import main as contact_sheet
from fastrm.errors import TrainingError, UsageError
from fastrm.machine import lock
from fastrm.machine.lock import Lock
from fastrm.run import checkpoint, folder
from fastrm.settings.config import Config
from tests.conftest import run_of_one_step
from tests.test_cli import fails
from tests.test_run_folder import no_steps
from tests.test_train import records

ROOT = Path(__file__).parent.parent
Small = Callable[..., Config]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of_one_step("test_resnet", 32, tmp_path_factory.mktemp("own") / "run")


def theirs(path: Path) -> None:
    """Write a file with a name that fastrm uses, but with the content of another program."""
    others: dict[str, Callable[[], object]] = {
        "config.json": lambda: path.write_text('{"model_type": "bert", "hidden_size": 768}'),
        "metrics.jsonl": lambda: path.write_text('{"step": 1, "epoch": 0.1, "loss": 3.2}\n'),
        "checkpoint.pt": lambda: torch.save({"config": {}, "step": 3, "method": {}, "format": 3}, path),
        "checkpoint-best.pt": lambda: torch.save({"state_dict": {}}, path),
        "best.json": lambda: path.write_text('{"value": 0.7}'),
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
    "config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-best.pt", "best.json", "checkpoint-12.pt",
    "backbone.safetensors", "summary.json",
    "skipped.txt", "evaluation.json", "trace.json", ".fastrm.lock", "tensorboard/other/notes.txt", "report/index.html",
    "checkpoint.pt/notes.txt",
]  # fmt: skip


def content(where: Path) -> dict[str, bytes | None]:
    """The content of every path below a folder; None for folders."""
    return {
        path.relative_to(where).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(where.rglob("*"))
    }


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_a_foreign_file_is_refused_and_not_changed(
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
def test_a_run_with_a_replaced_file_is_refused(name: str, a_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", a_run, out], check=True)
    folder.claim(out)
    if (out / name).parent.is_file():
        (out / name).parent.unlink()
    theirs(out / name)
    with pytest.raises(UsageError, match=f"holds {name.split('/')[0]}"), folder.held(out):
        pass


def test_a_broken_link_with_a_name_of_fastrm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"holds config\.json, which is a link to nowhere"):
        folder.claim(tmp_path)


def test_a_fresh_run_removes_only_files_that_fastrm_wrote(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny = {"batch_size": 8, "hidden_dim": 8, "output_dim": 8, "predictor_hidden_dim": 8, "resume": "never"}
    train.train(small(**tiny, max_steps=4, checkpoint_every=1, profile=1))
    written = content(out)
    assert {"trace.json", "checkpoint-3.pt"} <= written.keys()
    for name in ("thesis.tex", "checkpoint-mine.pt", "my.json", "tensorboard/other/notes.txt", "tensorboard/notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    writer = SummaryWriter(str(out / "tensorboard"))
    for step in range(9):
        writer.add_scalar("my accuracy", step, step)
    writer.close()
    (out / "evaluation.json").write_text('{"fastrm": "0.1.0", "sets": {}}')
    (out / "skipped.txt").write_text("a.jpg\tbroken\n")
    (out / ".checkpoint.pt.partial").write_bytes(b"half")
    (out / ".mine.partial").write_text("mine")
    mine = {name: text for name, text in content(out).items() if name not in written}
    del mine["evaluation.json"], mine["skipped.txt"], mine[".checkpoint.pt.partial"]
    train.train(small(**tiny, max_steps=1))
    after = content(out)
    assert mine.items() <= after.items()
    assert after.keys() - mine.keys() == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "backbone.safetensors", "summary.json", "tensorboard",
        *(name for name in after if name.endswith(own.EVENTS)),
    }  # fmt: skip
    assert [record["step"] for record in records(out)] == [1]


def test_runs_of_older_versions_without_marks_continue(small: Small, tmp_path: Path) -> None:
    """Such runs have the same content, but their files do not name fastrm."""
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


def test_the_metrics_of_another_run_are_not_continued(small: Small, tmp_path: Path) -> None:
    """A run ended before its first checkpoint, and another run is resumed in its folder."""
    tiny = {"batch_size": 8, "hidden_dim": 8, "output_dim": 8, "predictor_hidden_dim": 8}
    train.train(small(**tiny, max_steps=2, out=tmp_path / "first"))
    train.train(small(**tiny, max_steps=1, lr=0.1))
    (tmp_path / "run" / checkpoint.NAME).unlink()
    train.train(small(**tiny, max_steps=3, resume=str(tmp_path / "first")))
    assert [record["step"] for record in records(tmp_path / "run")] == [3]


def test_a_disk_too_small_for_the_checkpoints_is_reported_at_the_start(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"batch_size": 8, "hidden_dim": 8, "output_dim": 8, "predictor_hidden_dim": 8, "max_steps": 1}
    train.train(small(**tiny))
    assert "MB left" not in capsys.readouterr().out
    size = (tmp_path / "run" / checkpoint.NAME).stat().st_size
    for share, said in ((3.1, False), (2.5, True)):  # two are kept, and a third is written before one is removed
        disk = lambda _, free=share * size: shutil._ntuple_diskusage(0, 0, free)  # type: ignore[attr-defined]  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", disk)
        train.train(small(**tiny, out=tmp_path / f"{share}"))
        assert ("MB left, and its checkpoints need about" in capsys.readouterr().out) == said


HOLD = """
import os, sys, time, pathlib, multiprocessing
from fastrm.machine import lock
sys.modules["fastrm.machine.lock"].BEAT = float(sys.argv[2])
if sys.argv[3] == "unguarded":
    lock.fcntl = None
held = lock.Lock(pathlib.Path(sys.argv[1]))
held.acquire()


def live():
    print("held", os.getpid(), flush=True)  # said by the forked process, once it lives a life of its own
    time.sleep(600)


multiprocessing.get_context("fork").Process(target=live, daemon=True).start()
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A function that starts a process which holds the lock of a folder and has forked a child."""
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
    """The second run is also refused if a child of the first is alive, or if the file system has no locks."""
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
    assert time.monotonic() - begin < 10  # at once, without waiting for a sign of life
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_is_respected_while_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Locks of another machine are not visible. Its file and its signs of life show that it runs."""
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
    os.utime(path, (1e9, 1e9))  # years ago, so nothing waits for it
    monkeypatch.setattr(lock, "STALE", 1e9)
    silent = Lock(tmp_path)
    silent.acquire()
    silent.release()


def test_a_file_system_without_locks_is_recognised_by_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", missing)
    mine = Lock(tmp_path)
    mine.acquire()
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == socket.gethostname()
    mine.release()


def test_a_run_whose_folder_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert (tmp_path / lock.NAME).exists()  # it belongs to the other run


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


@pytest.mark.slow  # four commands, two of them in two processes
def test_after_sigkill_the_same_command_continues_at_once(tmp_path: Path, pictures: Path) -> None:
    """Loader processes outlive the run for a moment. While it is alive, all processes of the command are refused."""
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
def test_photographs_are_never_taken_for_files_of_fastrm(number: int, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    for wrote in {*own.RUN.values(), own.card, own.onnx, own.state, own.export_config, own.page, own.sheet}:
        with pytest.raises(UsageError, match="move it away"):
            own.require("--out", path, wrote)


PHOTOGRAPH = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
EXPORTS = [
    ("safetensors", "it.safetensors"), pytest.param("onnx", "it.onnx", marks=pytest.mark.slow), ("timm", "folder"),
    ("timm", "it.pth"),
]  # fmt: skip


@pytest.fixture(scope="module")
def a_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of_one_step("test_resnet", 96, tmp_path_factory.mktemp("own") / "run")


def write(run: Path, kind: str, out: Path, which: str = "student") -> dict[str, bytes | None]:
    """Export a run, and return the content of the folder."""
    export.main(["--checkpoint", str(run), "--format", kind, "--which", which, "--out", str(out)])
    return content(out.parent)


@pytest.mark.parametrize(("kind", "name"), EXPORTS)
def test_an_export_replaces_only_exports(kind: str, name: str, a_resnet: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / name
    first = write(a_resnet, kind, out)
    assert write(a_resnet, kind, out, "teacher").keys() == first.keys()
    files = [path for path in out.parent.rglob("*") if path.is_file()]
    assert len(files) == (3 if name == "folder" else 2)
    for path in files:
        kept = path.read_bytes()
        path.write_text("---\ntitle: mine\n---\n")
        before = content(tmp_path)
        with pytest.raises(UsageError, match=r"fastrm did not write|that fastrm wrote") as caught:
            write(a_resnet, kind, out)
        assert path.name in str(caught.value)
        assert content(tmp_path) == before
        path.write_bytes(kept)


def test_exports_in_one_folder_have_separate_cards(a_resnet: Path, tmp_path: Path) -> None:
    for kind, name, which in (
        ("timm", "it.safetensors", "teacher"), ("timm", "it.pth", "student"),
        ("safetensors", "own.safetensors", "teacher"),
    ):  # fmt: skip
        write(a_resnet, kind, tmp_path / name, which)
    cards = {path.name: path.read_text() for path in tmp_path.glob("*.md")}
    assert {name: ", teacher of" in text for name, text in cards.items()} == {
        "it.safetensors.md": True, "it.pth.md": False, "own.safetensors.md": True,
    }  # fmt: skip


def test_an_export_over_other_files_or_a_run_is_refused(a_resnet: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    (tmp_path / "model.safetensors").write_bytes(b"")
    before = content(tmp_path)
    with pytest.raises(UsageError, match=r"holds README\.md, which fastrm did not write"):
        write(a_resnet, "timm", tmp_path)
    assert content(tmp_path) == before
    before = content(a_resnet)
    for kind, name in (("timm", "."), ("safetensors", "backbone.safetensors")):
        with pytest.raises(UsageError, match=r"config\.json|backbone\.safetensors"):
            write(a_resnet, kind, a_resnet / name)
    assert content(a_resnet) == before


def test_exports_of_older_versions_without_marks_are_replaced(a_resnet: Path, tmp_path: Path) -> None:
    """The card beside a ``.pth`` had a name without its ending, and a folder's config.json did not name fastrm."""
    out = tmp_path / "it.pth"
    write(a_resnet, "timm", out)
    card = tmp_path / "it.pth.md"
    old = re.sub("generator: .*\n", "", card.read_text())
    card.unlink()
    torch.save(dict(torch.load(out, weights_only=True)), out)
    with pytest.raises(UsageError, match=r"it\.pth is there and not an export"):
        write(a_resnet, "timm", out)
    (tmp_path / "it.md").write_text(old)
    write(a_resnet, "timm", out)
    assert (tmp_path / "it.md").read_text() == old
    write(a_resnet, "timm", tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "fastrm"}))
    write(a_resnet, "timm", tmp_path / "folder")
    assert "fastrm" in json.loads(config.read_text())


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "views.png"])
def test_a_contact_sheet_never_replaces_a_photograph(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    flags = ["--data", "digits", "--image-size", "16", "--images", "2", "--out", str(out)]
    contact_sheet(flags)
    contact_sheet(flags)  # a sheet that fastrm wrote is replaced
    PHOTOGRAPH.save(out)
    before = out.read_bytes()
    assert "is there and not a contact sheet that fastrm wrote" in fails(contact_sheet, flags, capsys)
    assert out.read_bytes() == before
    assert "does not exist" in fails(contact_sheet, [*flags[:-1], str(tmp_path / "none" / name)], capsys)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["config.json", "summary.json", "backbone.safetensors", "metrics.jsonl"])
def test_an_evaluation_replaces_only_evaluations(
    name: str, a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(a_run)
    flags = ["--checkpoint", str(a_run), "--gap", "--out", str(a_run / name)]
    assert "is there and not an evaluation" in fails(evaluate.main, flags, capsys)
    (tmp_path / "mine.json").write_text('{"sets": {"a": 1}}')
    assert "not an evaluation" in fails(evaluate.main, [*flags[:-1], str(tmp_path / "mine.json")], capsys)
    assert content(a_run) == before


def test_a_report_replaces_only_reports(a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = tmp_path / "pages"
    report.main([str(a_run), "--out", str(pages)])
    report.main([str(a_run), "--out", str(pages)])
    (pages / "index.html").write_text("<html>mine</html>")
    before = content(pages)
    said = fails(report.main, [str(a_run), "--out", str(pages)], capsys)
    assert "holds index.html, which fastrm did not write" in said
    assert content(pages) == before
    assert "is a run folder itself" in fails(report.main, [str(a_run), "--out", str(a_run)], capsys)
