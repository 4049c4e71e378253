"""Scripts that use the loaders end with the right status, also after an error or a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastrm.data.dali import dali_problem

ROOT = Path(__file__).parent.parent
KINDS = ("torch", "eval", "memory", *(() if dali_problem() else ("dali",)))
ENDINGS = (("comes to its end", "0"), ("raises", "1"))  # with the exit status
LIMIT = 60  # seconds until a script must have ended
SCRIPT = """\
import os, sys
from fastrm.data import eval_loader, make_loader, open_source

kind, ending, folder = sys.argv[1:]
if kind == "eval":
    loader = eval_loader(open_source(folder).train, image_size=32, batch_size=16, workers=1)
else:
    data = "digits" if kind == "memory" else folder
    options = {"image_size": 32, "batch_size": 16, "device": "cpu", "workers": 1, "seed": 0, "loader": kind}
    loader = make_loader(data, method="mocov2", **options)
batches = iter(loader)  # stays alive, in mid-epoch
next(batches)
print("one batch", flush=True)
if ending == "raises":
    raise ValueError("as scripts do")
if ending == "is killed":
    os.kill(os.getpid(), 9)
"""
# A script that imports everything once and then forks one child per case. Each child runs the test script at the end of
# the file.
MANY = """\
import os, runpy, sys, time
import fastrm.data, torch.utils.data
script, folder, limit, *cases = sys.argv[1:]
for case in cases:
    child = os.fork()
    if child == 0:
        break
    deadline = time.monotonic() + float(limit)
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    print(case, os.waitstatus_to_exitcode(done[1]) if done[0] else "does not end", sep=":", flush=True)
else:
    sys.exit()
sys.argv[1:] = *case.split(","), folder
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripts") / "script.py"
    path.write_text(SCRIPT)
    return path


def run(*command: str) -> tuple[int, str, str]:
    """Status, output and errors of a process.

    A loader process that outlives its script keeps the pipes open, which raises a timeout.
    """
    with subprocess.Popen(
        [sys.executable, *command], env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as started:  # fmt: skip
        try:
            said = started.communicate(timeout=4 * LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            raise
    return started.returncode, *said


@pytest.mark.parametrize(
    ("kinds", "endings"),
    [(("torch",), ENDINGS[:1]), pytest.param(KINDS, ENDINGS, marks=pytest.mark.slow)],
    ids=["often", "all"],
)
def test_a_script_ends_with_its_own_status_with_any_loader(
    kinds: tuple[str, ...], endings: tuple[tuple[str, str], ...], script: Path, pictures: Path
) -> None:
    want = {f"{kind},{ending}": status for kind in kinds for ending, status in endings}
    want["torch,is killed"] = str(-signal.SIGKILL)
    many = script.with_name("many.py")
    many.write_text(MANY)
    _, said, errors = run(str(many), str(script), str(pictures / "flat"), str(LIMIT), *want)
    assert dict(line.split(":") for line in said.splitlines() if ":" in line) == want, errors


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "status"), [("comes to its end", 0), ("raises", 1)])
def test_a_script_under_torchrun_ends(ending: str, status: int, script: Path, pictures: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    code, said, errors = run(*launch, str(script), "torch", ending, str(pictures / "flat"))
    assert (code, said.count("one batch")) == (status, 2), errors
