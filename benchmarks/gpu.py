"""What a GPU machine shows in one go: correctness, benchmarks and the kernel report, as Markdown and JSON.

    make gpu        (or: python -m benchmarks.gpu --out gpu-report)

Needs only the packages of a stock PyTorch image with pytest and pytest-benchmark, and no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastrm.machine.device import available_cores

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def parts(out: Path) -> dict[str, list[str]]:
    """Commands by name, in order: figures mean nothing before correctness."""
    bench = [*PYTEST, "-s", "--benchmark-only"]
    # The tests compile a kernel for nearly every case, on the host.
    several = ["-n", str(min(available_cores(), 12))] if importlib.util.find_spec("xdist") else []
    files = ("ema", "optimizers", "contrastive", "queue", "step", "fuzz_kernels")
    return {
        "correctness": [*PYTEST, *several, "-m", "gpu", *(f"tests/test_{name}.py" for name in files)],
        "teacher update": [*bench, f"--benchmark-json={out}/ema.json", "benchmarks/bench_ema.py"],
        "optimizers": [*bench, f"--benchmark-json={out}/optim.json", "benchmarks/bench_optim.py"],
        "losses": [*bench, f"--benchmark-json={out}/contrastive.json", "benchmarks/bench_contrastive.py"],
        "queue": [*bench, f"--benchmark-json={out}/queue.json", "benchmarks/bench_queue.py"],
        "step": [*bench, f"--benchmark-json={out}/step.json", "-m", "gpu", "benchmarks/bench_step.py"],
        "kernel report": [sys.executable, "-m", "benchmarks.kernel_report"],
    }  # fmt: skip


def main() -> int:
    """Run the parts; the status is that of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder for report.md and report.json")
    names = [*parts(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run; all unless given")
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything; later parts are left out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch finds none; `make test` runs everything that does without")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    status, begin = 0, time.monotonic()
    report: dict[str, object] = {"machine": machine}
    lines = ["# GPU report", "", " · ".join(machine.values())]
    for name, command in parts(options.out.resolve()).items():
        if name not in options.only:
            continue
        start = time.monotonic()
        left = options.limit - (start - begin)
        if left <= 0:
            lines += ["", f"## {name}", "", "left out: no time"]
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
            output, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as cut:
            output, code = f"{(cut.stdout or b'').decode()}\ncut off after {left:.0f} s", 124
        status = status or code
        tables = re.findall(r"^\|.*$", output, flags=re.MULTILINE)
        closing = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed)|cut off|^E  ", line)]
        lines += ["", f"## {name}", "", *tables, "", *closing]
        report[name] = {"status": code, "output": output}
        verdict = "ok" if code == 0 else f"status {code}"
        print(f"{name}: {verdict}, {time.monotonic() - start:.0f} s  {' '.join(closing[-1:])}", flush=True)
    for file in options.out.glob("*.json"):
        if file.name != "report.json":
            benchmarks = json.loads(file.read_text(encoding="utf-8") or "{}").get("benchmarks", [])
            report[file.stem] = {b["name"]: b["extra_info"] for b in benchmarks}
            file.unlink()
    (options.out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{options.out / 'report.md'} and report.json, in {time.monotonic() - begin:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
