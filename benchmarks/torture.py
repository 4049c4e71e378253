"""Kills runs at random moments, continues them with the same command, and compares them with uninterrupted runs.

python -m benchmarks.torture --kills 60

The kills are divided among two data sets (digits in memory, JPEG files through a loader process) and three methods.
SIGKILL may hit before the first step, in steps and in saves, which follow each other without a pause. In the end, every
tensor, random state and logged number must have the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastrm.data import open_source
from fastrm.run import checkpoint
from fastrm.run.resume import FREE_ON_RESUME

STEPS = 110
FLAGS = [
    "--arch", "test_resnet", "--image-size", "32", "--batch-size", "32", "--epochs", "4", "--hidden-dim", "1024",
    "--output-dim", "16", "--predictor-hidden-dim", "1024", "--queue-size", "96", "--log-every", "1",
    "--eval-every", "0", "--checkpoint-every", "1", "--max-steps", str(STEPS), "--no-scan",
]  # fmt: skip


def start(method: str, data: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastrm.train", *FLAGS, "--method", method, "--data", data, "--out", str(out)]
    if data != "digits":
        command += ["--loader", "torch", "--workers", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen[str]) -> None:
    said = run.communicate()[0]
    if run.returncode:
        raise SystemExit(f"a run failed:\n{said}")


def killed(run: subprocess.Popen[str], moment: random.Random) -> bool:
    """Kill a run before or shortly after its first step; return whether it was still alive."""
    assert run.stdout is not None
    if moment.random() < 0.2:
        time.sleep(moment.uniform(0, 4))
    else:
        for line in run.stdout:
            if line.startswith("step"):
                break
        time.sleep(moment.uniform(0, 0.7))
    alive = run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.communicate()
    return alive


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def trial(method: str, data: str, kills: int, folder: Path, moment: random.Random) -> tuple[int, int]:
    """Kill a run repeatedly, and compare its end; return (kills, kills during a save)."""
    whole, cut = folder / f"{method}-whole", folder / f"{method}-cut"
    finish(start(method, data, whole))
    done = saving = 0
    while done < kills:
        partial = cut / f".{checkpoint.NAME}.partial"
        partial.unlink(missing_ok=True)
        if not killed(start(method, data, cut), moment):
            break  # the run was complete
        done += 1
        saving += partial.exists() or not (cut / checkpoint.NAME).exists()
    finish(start(method, data, cut))
    states = [checkpoint.load(out) for out in (whole, cut)]
    for state in states:
        for free in FREE_ON_RESUME:
            state["config"].pop(free, None)
    if checkpoint.checksum(states[0]) != checkpoint.checksum(states[1]) or metrics(whole) != metrics(cut):
        raise SystemExit(f"{method} on {data}: the run that was killed {done} times ended differently")
    return done, saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moment = random.Random(options.seed)
    begin, total, inside = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        pictures = Path(name, "pictures")
        pictures.mkdir()
        digits = open_source("digits").train
        for i in range(960):
            digits[i].resize((40, 40)).save(pictures / f"{i}.jpg")
        trials = list(itertools.product(("digits", str(pictures)), ("mocov3", "mocov2", "byol")))
        for number, (data, method) in enumerate(trials):
            folder = Path(name, str(number))
            folder.mkdir()
            share = (options.kills * (number + 1)) // len(trials) - (options.kills * number) // len(trials)
            done, saving = trial(method, data, share, folder, moment)
            total, inside = total + done, inside + saving
            print(f"{method:7} {Path(data).name:9} {done:3} kills, {saving} during a save: the same bits", flush=True)
    print(f"{total} kills, {inside} during a save, in {time.monotonic() - begin:.0f} s: all with the same bits")


if __name__ == "__main__":
    main()
