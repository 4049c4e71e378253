"""Commands in shells, pipes and containers: each problem gives one line or silence, and nothing is lost."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrm import data, evaluate, export, report, train
from fastrm.data import __main__ as sheet
from fastrm.errors import UsageError
from fastrm.files import load_tensors
from fastrm.machine.distributed import own_device, processes
from fastrm.machine.signals import Signals
from fastrm.settings import command_line
from fastrm.settings.config import Config, build
from fastrm.terminal import shell
from tests.test_cli import ROOT, TINY

Small = Callable[..., Config]
LIGHT = "from fastrm.terminal.shell import run; import sys\n"  # without torch a process starts quickly


def light(code: str, *, env: dict[str, str] | None = None, before: tuple[str, ...] = (), **options: Any) -> Any:
    """Run ``code`` as a command in a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    surroundings = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **(env or {})}
    command = [*before, sys.executable, "-c", LIGHT + code]
    return subprocess.run(command, env=surroundings, text=True, timeout=300, **options)


def unknown_user() -> tuple[str, ...]:
    """The command that runs another command as a user without an entry in the system; skips the test if it cannot."""
    if not hasattr(os, "getuid") or os.getuid() != 0:
        pytest.skip("only root can become a user whom the system does not know")
    if subprocess.run(["which", "setpriv"], capture_output=True).returncode:
        pytest.skip("needs setpriv, of util-linux")
    return ("setpriv", "--reuid=54321", "--clear-groups")


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that every user can enter and write; pytest's own belongs to one user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_an_unknown_user_gets_a_home_for_caches(common: Path) -> None:
    before = unknown_user()
    code = (
        "import getpass, os; from pathlib import Path; from fastrm.files import cache_root\n"
        "run(lambda: print(getpass.getuser(), Path.home().stat().st_uid, cache_root(), os.environ.get('TRITON_HOME')))"
    )
    lent = f"{common}/fastrm-54321"
    done = light(code, before=before, env={"TMPDIR": str(common)})
    assert done.stdout.split() == ["54321", "54321", f"{lent}/.cache/fastrm", "None"], done.stderr
    # A home that the user cannot write, such as the "/" that Docker sets.
    done = light(code, before=before, env={"TMPDIR": str(common), "HOME": "/", "XDG_CACHE_HOME": "/cache"})
    assert done.stdout.split() == ["54321", "0", "/cache/fastrm", lent], done.stderr


def test_a_cache_folder_of_another_user_is_not_used(common: Path) -> None:
    before = unknown_user()
    (common / "fastrm-54321").mkdir(mode=0o777)  # it belongs to root, who could put compiled kernels there
    done = light(
        "from fastrm.files import home\nrun(lambda: print(home()))", before=before, env={"TMPDIR": str(common)}
    )
    assert done.stdout.startswith(f"{common}/fastrm-"), done.stderr
    assert done.stdout.strip() != f"{common}/fastrm-54321"


@pytest.mark.slow
def test_a_run_of_an_unknown_user_without_a_home(common: Path) -> None:
    """A complete training run, as a user without an entry in the system, in a folder that anyone can write."""
    command = [*unknown_user(), sys.executable, "-m", "fastrm.train", "--data", "digits", *TINY, "--max-steps", "1"]
    surroundings = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--eval-every", "0", "--out", "run"],
        cwd=common,
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in common.iterdir()] == ["run"]  # and no folder with the name "~"


@pytest.mark.parametrize(
    ("kind", "flags", "name"),
    [
        (Config, [], "out"),
        (Config, [], "init-from"),
        (Config, [], "data"),
        (Config, [], "data-root"),
        (Config, [], "resume"),
        (evaluate.EvaluateConfig, ["--checkpoint", "run"], "out"),
        (evaluate.EvaluateConfig, ["--checkpoint", "run"], "transfer"),
        (evaluate.EvaluateConfig, ["--checkpoint", "run"], "data"),
        (export.ExportConfig, ["--checkpoint", "run", "--format", "timm"], "out"),
        (report.ReportConfig, ["run"], "out"),
        (sheet.Options, ["--data", "digits"], "out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_home_folder_is_expanded_in_flags(
    kind: type, flags: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = command_line.parse(kind, [*flags, f"--{name}=~/x"], prog="command")
    leaves = parsed.flat() if isinstance(parsed, Config) else vars(parsed)
    assert str(leaves[name.replace("-", "_")]) == f"{tmp_path}/x"
    with pytest.raises(UsageError, match="~nobody-here/x cannot be found: there is no such user"):
        command_line.parse(kind, [*flags, f"--{name}=~nobody-here/x"], prog="command")


def test_the_home_folder_is_expanded_in_arguments_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    runs = command_line.parse(report.ReportConfig, ["~/a", "b/~"], prog="command").runs
    assert runs == (tmp_path / "a", Path("b/~"))
    assert build(data="digits", out="~/x").run.out == tmp_path / "x"
    with pytest.raises(UsageError, match="--data ~/none does not exist"):
        data.open_source("~/none")


def test_relative_data_paths_are_found_from_any_folder(
    small: Small, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pictures)
    train.train(small(data="classes", max_steps=1))
    monkeypatch.chdir(tmp_path)
    evaluate.main(["--checkpoint", "run", "--knn", "--workers", "0"])
    assert "classes, % right" in capsys.readouterr().out
    card = export.export(export.ExportConfig(checkpoint=Path("run"), format="safetensors", out=Path("x.safetensors")))
    assert "| data | classes |" in card.read_text()
    with pytest.raises(UsageError, match=f"--data classes does not exist in {tmp_path}; give"):
        data.open_source("classes")


def test_characters_that_a_stream_cannot_encode_are_replaced(tmp_path: Path) -> None:
    score = "'71.00 ±1.50…', 'caf\\xe9', b'\\xff.jpg'.decode(errors='surrogateescape')"
    done = light(f"run(lambda: print({score}))", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert (done.returncode, done.stdout) == (0, "71.00 +-1.50... caf\\xe9 \\udcff.jpg\n"), done.stderr
    done = light(f"run(lambda: print({score}))", env={"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stdout) == (0, "71.00 ±1.50… café \\udcff.jpg\n"), done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_a_command_silently(unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = light("run(lambda: print('line'))", env={"PYTHONUNBUFFERED": unbuffered}, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk_gives_one_line(unbuffered: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        done = light("run(lambda: print('line'))", env={"PYTHONUNBUFFERED": unbuffered}, stdout=full)
    said = "error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)
    # An error in a file of the command is not an error of standard output.
    done = light("def main():\n    raise BrokenPipeError(32, 'Broken pipe')\nrun(main)")
    assert "BrokenPipeError" in done.stderr


def test_closed_standard_streams(tmp_path: Path) -> None:
    """A file that a command opens must not get the number of a closed stream, because output for that stream would go
    to it.
    """
    code = "import os; run(lambda: (print('line'), sys.exit(os.open('file', os.O_CREAT) > 2)))"
    shut = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    assert light(code, before=tuple(shut), cwd=tmp_path).returncode == 1
    assert light("run(lambda: print('line'))", before=tuple(shut), cwd=tmp_path).returncode == 0


def test_a_deleted_current_folder_is_reported(tmp_path: Path) -> None:
    gone = ("sh", "-c", f'mkdir "{tmp_path}/gone"; cd "{tmp_path}/gone"; rmdir ../gone; exec "$@"', "sh")
    done = light("run(lambda: print('line'))", before=gone)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the current folder cannot be used: No such file or directory")


def test_a_run_continues_without_standard_output(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as stop:
            shell.run(lambda: train.train(small(max_steps=2)))
    assert stop.value.code == 0
    assert (tmp_path / "run" / "summary.json").is_file()
    said = capsys.readouterr().err
    assert said == "notice: standard output cannot be written: Broken pipe; the run continues, and logs to its folder\n"


def test_a_signal_during_the_collective_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.tensor

    def meanwhile(values: object) -> torch.Tensor:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGUSR1)
        return plain(values)

    with Signals() as signals:
        monkeypatch.setattr(torch, "tensor", meanwhile)
        assert [signals.asked().save for _ in range(3)] == [False, True, False]


def test_a_lost_terminal_saves_and_ends_a_run_unless_nohup_is_set() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started these tests
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked()[:2] == (True, signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked()[:2] == (False, 0)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("WORLD_SIZE", "auto", "a number of 1 or more"),
        ("WORLD_SIZE", "0", "a number of 1 or more"),
        ("WORLD_SIZE", "-2", "a number of 1 or more"),
        ("WORLD_SIZE", "", "a number of 1 or more"),
        ("RANK", "2", "a number from 0 to 1"),
        ("RANK", "first", "a number from 0 to 1"),
        ("LOCAL_RANK", "1.5", "a number of 0 or more"),
        ("MASTER_PORT", "http", "a number from 0 to 65535"),
    ],
)
def test_invalid_variables_of_torchrun_are_named(
    name: str, value: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for key, setting in {**whole, name: value}.items():
        monkeypatch.setenv(key, setting)
    with pytest.raises(UsageError, match=f"{name}='{value}', which must be {wanted}"), processes(torch.device("cpu")):
        pass
    if name == "LOCAL_RANK":
        with pytest.raises(UsageError, match=f"{name}='{value}'"):
            own_device(torch.device("cuda"))


def test_a_file_of_another_kind_is_refused_without_advice_to_run_its_code(tmp_path: Path) -> None:

    import pickle

    foreign = tmp_path / "foreign.pt"
    text, pickled = tmp_path / "README.md", tmp_path / "pickled.pt"
    text.write_text("# A project\n")
    others = {"args": argparse.Namespace(a=1), "log": defaultdict(list, loss=[1.0]), "best": np.float64(0.5)}
    for old in (True, False):
        torch.save({"x": torch.ones(2), **others}, foreign, _use_new_zipfile_serialization=not old)
        read = load_tensors(foreign, other_objects=True)
        assert read["x"].tolist() == [1, 1]
        assert read["log"] == {"loss": [1.0]}
        assert [type(read[name]).__name__ for name in ("args", "best")] == ["NotRead"] * 2
        assert read["args"].kind == "argparse.Namespace"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    for path, why in (
        (text, "it has another format or is damaged"),
        (pickled, "it has another format or is damaged"),
        (foreign, "it holds argparse.Namespace, and only plain data is read"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(UsageError) as refused:
            load_tensors(path)
        assert str(refused.value) == f"{path} cannot be read as a checkpoint: {why}"


def test_threads_of_a_command_wait_passively_unless_the_user_chose() -> None:
    code = "import os, fastrm.machine.threads as t; t.os.environ.pop('OMP_WAIT_POLICY', None); sys.orig_argv[:] = {}\n"
    code += "t.let_threads_sleep(); print(os.environ.get('OMP_WAIT_POLICY'))"
    for command, want in (
        (["python", "-u", "-m", "fastrm.train", "--data", "digits"], "passive"),
        (["python", "-m", "fastrm"], "passive"),
        (["python", "-m", "fastrmore"], "None"),
        (["python", "train.py", "fastrm"], "None"),
    ):
        assert light(code.format(command)).stdout.strip() == want
    module = [sys.executable, "-m", "fastrm", "--version"]
    probe = "import atexit, os; atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY']))"
    for said in ({}, {"OMP_WAIT_POLICY": "active"}):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "sitecustomize.py").write_text(probe)
            surroundings = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **said}
            done = subprocess.run(module, env=surroundings, capture_output=True, text=True, timeout=300, check=True)
        assert done.stdout.split()[-1] == said.get("OMP_WAIT_POLICY", "passive")
