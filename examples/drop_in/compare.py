"""Compare each trainer of this folder with its changed version, which uses fastrm: results, time and memory.

    python examples/drop_in/compare.py --steps 12
    python examples/drop_in/compare.py dino --arch test_resnet

``NAME.diff`` is the change to ``NAME.py``; `git apply` applies it.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from host import Run
from torch import Tensor

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # run as a script
    sys.path.append(str(HERE.parents[1]))

from benchmarks._timing import extra_memory  # noqa: E402 (importable only now)

NAMES = sorted(path.stem for path in HERE.glob("*.diff"))


def versions(name: str) -> list[Any]:
    """The original trainer and the changed one, as modules."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / f"{name}.py", folder)
        subprocess.run(["git", "apply", HERE / f"{name}.diff"], cwd=folder, check=True)
        return [_module(HERE / f"{name}.py"), _module(Path(folder, f"{name}.py"))]


def differences(name: str, *, steps: int, arch: str) -> tuple[float, float]:
    """The largest differences of losses and of teacher weights between both versions, relative to the loss and to the
    largest weight of each tensor.

    They train in float64, because float32 training amplifies rounding errors of sums in another order.
    """
    torch.set_default_dtype(torch.float64)
    try:
        runs = [Run(steps, arch), Run(steps, arch)]
        old, new = (_trained(version, run) for version, run in zip(versions(name), runs, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)
    losses = max(abs(a - b) / abs(a) for a, b in zip(*(run.losses for run in runs), strict=True))
    return losses, max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in zip(old, new, strict=True)
    )


def times(name: str, *, steps: int, arch: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each part, before and after the change; both versions train in turn."""
    runs: list[list[Run]] = [[], []]
    both = versions(name)
    for _ in range(rounds):
        for version, done in zip(both, runs, strict=True):
            done.append(Run(steps, arch))
            _trained(version, done[-1])
    return {part: (_median(runs[0], part), _median(runs[1], part)) for part in runs[0][0].ms}


def memory(name: str, *, arch: str) -> tuple[float, float]:
    """Peak MiB of two steps, including networks and optimizer, before and after the change."""
    before, after = (
        extra_memory(lambda version=version: _trained(version, Run(2, arch))) for version in versions(name)
    )
    return before, after


def _trained(version: Any, run: Run) -> list[Tensor]:
    torch.manual_seed(0)
    return [parameter.detach() for parameter in version.train(run).parameters()]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _median(runs: list[Run], part: str) -> float:
    # the first step allocates what later steps reuse
    return statistics.median(ms for run in runs for ms in run.ms[part][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"trainers: {', '.join(NAMES)}; without, all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arch", default="resnet50")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    columns = ("losses differ by", "weights differ by", "MiB before", "MiB after", "part", "before, ms", "after, ms")
    print("| trainer |", " | ".join(columns), "| ratio |")
    print("|---|--:|--:|--:|--:|---|--:|--:|--:|")
    for name in options.names or NAMES:
        losses, weights = differences(name, steps=3, arch=options.arch)
        held = memory(name, arch=options.arch)
        found = times(name, steps=options.steps, arch=options.arch, rounds=options.rounds)
        for part, (before, after) in found.items():
            cells = f"{losses:.0e} | {weights:.0e} | {held[0]:.0f} | {held[1]:.0f} | {part} "
            cells += f"| {before:.1f} | {after:.1f} | {before / after:.2f}"
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
