"""Checks and measures on a GPU machine: correctness, loader, whole runs and benchmarks, as Markdown and JSON.

    make gpu PHOTOS=FOLDER        (or: python -m benchmarks.gpu --photos FOLDER --out gpu-report)

Parts that are not timed run at the same time, then timed parts run one after the other. Each part has its own limit,
and the report is written again after each. Parts that read photographs get many links to those in FOLDER; without a
folder they are left out. Needs the packages of a stock PyTorch image with pytest and pytest-benchmark, tyro, pydantic
and DALI, and no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from fastrm.machine.device import available_cores

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TESTED = ("ema", "optimizers", "contrastive", "queue", "step", "fuzz_kernels", "augment", "dali_views")
COPIES = 60
"""Links per photograph; 192 photographs make 11,520 images in classes for evaluations."""
CLASSES = 8


# The last alternatives match the lines of a profile.
_TOLD = re.compile(r"\d+ (passed|failed)|cut off|^E  |^FAILED|Error:|^warning|left out|\d%$|^step +[\d.]+$")


class Part(NamedTuple):
    """A command with its time limit in seconds."""

    command: list[str]
    seconds: int
    timed: bool = True
    """Whether it is timed, and so runs without other parts."""
    photos: bool = False
    """Whether it needs photographs."""


def parts(work: Path, photos: Path | None) -> dict[str, Part]:
    """All parts by name, in order, correctness first.

    Args:
        work: folder for their output, NAME and NAME.json.
        photos: folder with train/CLASS.
    """
    several = ["-n", str(min(available_cores(), 8))] if importlib.util.find_spec("xdist") else []
    root, cores = str(photos), str(available_cores())
    run = [sys.executable, "-m", "fastrm.train", "--data", root, "--arch", "resnet50", "--batch-size", "256"]
    run += ["--loader", "dali", "--workers", cores, "--eval-every", "0", "--log-every", "10", "--resume", "never"]
    compiled = [*run, "--compile", "on", "--verify-every", "20"]
    plain = [*run, "--compile", "off", "--profile", "5"]

    def check(name: str) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu_checks", name, "--photos", root]

    def bench(name: str, file: str, *only: str) -> list[str]:
        return [
            *PYTEST,
            "--benchmark-only",
            f"--benchmark-json={work}/{name}.json",
            f"benchmarks/bench_{file}.py",
            *only,
        ]

    tests = [*PYTEST, *several, "-m", "gpu", *(f"tests/test_{name}.py" for name in TESTED)]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return {
        "tests": Part(tests, 140, timed=False),
        "crops": Part(check("crops"), 60, timed=False, photos=True),
        "two processes": Part([*ranks, "benchmarks.gpu_checks", "ranks"], 140, timed=False),
        "NCCL": Part(check("nccl"), 60, timed=False),
        # Fills the compiler's caches, which takes longest.
        "compiling": Part([*compiled, "--max-steps", "2", "--out", f"{work}/compiling"], 140, timed=False, photos=True),
        "loader": Part(check("rates"), 60, photos=True),
        "copies": Part(check("copies"), 30, photos=True),
        "compiled run": Part([*compiled, "--max-steps", "60", "--out", f"{work}/compiled run"], 90, photos=True),
        "plain run": Part([*plain, "--max-steps", "40", "--out", f"{work}/plain run"], 60, photos=True),
        "evaluation": Part(check("evaluation"), 45, photos=True),
        "losses": Part(bench("losses", "contrastive"), 90),
        "teacher": Part(bench("teacher", "ema"), 45),
        "optimizers": Part(bench("optimizers", "optim"), 60),
        "views": Part(bench("views", "views"), 60),
        "queue": Part(bench("queue", "queue"), 20),
        "step": Part(bench("step", "step", "-m", "gpu"), 60),
        "kernel report": Part([sys.executable, "-m", "benchmarks.kernel_report"], 90),
    }  # fmt: skip


class Result(NamedTuple):
    """The result of a part."""

    status: int
    seconds: float
    output: str

    @property
    def told(self) -> list[str]:
        """Its tables, warnings and outcome; for a failed part, also its last lines."""
        lines = self.output.splitlines()
        found = [line for line in lines if line.startswith("|") or _TOLD.search(line)]
        return found + (["", "```", *lines[-30:], "```"] if self.status else [])


def ran(part: Part) -> Result:
    """Run a part, and stop it at its time limit."""
    begin = time.monotonic()
    with subprocess.Popen(
        part.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=part.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output = f"{process.communicate()[0]}\ncut off after {part.seconds} s"
    return Result(process.returncode, time.monotonic() - begin, output)


def in_order(chosen: dict[str, Part]) -> Iterator[tuple[str, Result]]:
    """Yield results: parts that are not timed run together, then the others one by one."""
    untimed = [name for name, part in chosen.items() if not part.timed]
    with ThreadPoolExecutor(max(1, len(untimed))) as pool:
        under_way = {pool.submit(ran, chosen[name]): name for name in untimed}
        for done in as_completed(under_way):
            yield under_way[done], done.result()
    for name, part in chosen.items():
        if part.timed:
            yield name, ran(part)


def logged(folder: Path) -> list[str]:
    """The speed and the verification that a run logged."""
    file = folder / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rates = [record["images_per_second"] for record in records if "images_per_second" in record]
    told = [f"| images per second | {', '.join(f'{rate:,.0f}' for rate in rates)} |"] if rates else []
    checked = {name: value for record in records for name, value in record.items() if name.startswith("verify")}
    return told + [f"| {name} | {value:.1e} |" for name, value in checked.items()]


def many(photos: Path, folder: Path) -> Path:
    """Make many links to the photographs of a folder, in classes."""
    for number, path in enumerate(sorted(file.resolve() for file in photos.rglob("*") if file.is_file())):
        into = folder / "train" / f"class{number % CLASSES}"
        into.mkdir(parents=True, exist_ok=True)
        for copy in range(COPIES):
            (into / f"{copy:03}-{path.name}").symlink_to(path)
    return folder


def write(out: Path, found: dict[str, object], lines: list[str]) -> None:
    """Write the report of all results so far."""
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def report(out: Path, chosen: dict[str, Part], work: Path) -> int:
    """Run parts, and write the report after each; return the status of the first failed part, or 0."""
    begin, status = time.monotonic(), 0
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    found: dict[str, object] = {"machine": machine}
    lines = ["# GPU report", "", " · ".join(machine.values())]
    for name, result in in_order(chosen):
        status = status or result.status
        about = [*logged(work / name), *result.told]
        lines += ["", f"## {name}", "", *about]
        found[name] = result._asdict()
        shutil.rmtree(work / name, ignore_errors=True)  # a run folder with checkpoints
        if (figures := work / f"{name}.json").exists() and (text := figures.read_text(encoding="utf-8")):
            found[f"{name}, figures"] = {b["name"]: b["extra_info"] for b in json.loads(text)["benchmarks"]}
        write(out, found, lines)
        verdict = "ok" if result.status == 0 else f"status {result.status}"
        print(f"{name}: {verdict}, {result.seconds:.0f} s", flush=True)
    print(f"{out / 'report.md'} and report.json, in {time.monotonic() - begin:.0f} s")
    return status


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder for report.md and report.json")
    parser.add_argument("--photos", type=Path, help="folder with photographs; needed by some parts")
    names = list(parts(Path(), Path()))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run; all unless given")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch finds none; `make test` runs everything that needs none")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chosen = parts(work, options.photos and many(options.photos, work / "photos"))
        chosen = {name: part for name, part in chosen.items() if name in options.only}
        for name in [name for name, part in chosen.items() if part.photos and options.photos is None]:
            print(f"{name}: left out, because --photos is not given")
            del chosen[name]
        return report(options.out, chosen, work)


if __name__ == "__main__":
    sys.exit(main())
