"""The cost model of a step in docs/scaling.md: checked on this machine, and applied to clusters.

python -m benchmarks.scaling
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._timing import NETWORKS, tensors
from fastrm.kernels import info_nce
from fastrm.methods import Method, build_method
from fastrm.optim import SGD
from fastrm.settings.config import build
from fastrm.settings.fields import RunConfig


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU and its links per second, which are assumed, not measured."""

    name: str = "H100 SXM"
    flops: float = 75e12  # of 989e12 in dense bf16, because memory bandwidth limits a ResNet in part
    memory: float = 0.9 * 3.35e12
    inside: float = 0.8 * 450e9  # bytes per second to another GPU of the same machine, in one direction
    outside: float = 0.8 * 50e9  # bytes per second to a GPU of another machine: 400 Gbit/s per GPU
    latency: float = 20e-6  # seconds of a small collective over machines
    gpus: int = 8  # per machine
    exact: float = 50e12  # FLOPs per second in float32, for kNN
    decoded: float = 8 * 150  # images per second that the 8 loader processes of a GPU decode, 150 each


@dataclass(frozen=True)
class Run:
    """The size of a training run."""

    forward: float  # FLOPs of one network on one image
    trained: int  # parameters with a gradient
    averaged: int  # parameters with a counterpart in the teacher
    norms: int  # BatchNorm layers of the student
    batch: int  # images per process
    width: int = 256
    queue: int = 0  # rows of the queue; 0 for in-batch negatives of all processes
    directions: int = 2
    image_bytes: int = 3 * 224 * 224 * 2


def flops(run: Run, ranks: int) -> dict[str, float]:
    """FLOPs of a process per step. A backward pass counts as two forward passes, and the loss as two products."""
    bank = run.queue or run.batch * ranks
    return {
        "student": run.directions * run.batch * run.forward,
        "teacher": 2 * run.batch * run.forward,  # the residual term needs both views
        "backward": 2 * run.directions * run.batch * run.forward,
        "loss": run.directions * 4 * run.batch * bank * run.width,
    }


def moved(run: Run) -> float:
    """Bytes of a LARS step with teacher in float32: one pass for the norms, and one for the rest."""
    return run.trained * 4 * (2 + 5) + run.averaged * 4 * 2


def exchanged(run: Run, ranks: int) -> dict[str, float]:
    """Bytes that a process receives per step; it sends as many."""
    others = (ranks - 1) / ranks
    keys = run.directions * run.batch * (ranks - 1) * run.width * 4
    exchange = {"all-reduce": 2 * others * run.trained * 4, "keys": keys}
    if run.queue:  # shuffle-BN: images and encodings of both views
        exchange["shuffle"] = 2 * others * run.batch * (run.image_bytes + 4 * (2048 + 2 * run.width))
    return exchange


def predict(run: Run, ranks: int, machine: Machine) -> dict[str, float]:
    """Milliseconds of the parts of a step, without overlap."""
    link = machine.inside if ranks <= machine.gpus else machine.outside
    times = {name: count / machine.flops for name, count in flops(run, ranks).items()}
    times["optimizer, teacher"] = moved(run) / machine.memory
    if ranks > 1:
        times |= {name: count / link for name, count in exchanged(run, ranks).items()}
        if not run.queue:  # SyncBN: one small exchange per direction, layer, view and network
            times["SyncBN"] = run.norms * (2 * run.directions + 2) * machine.latency
    return {name: 1e3 * value for name, value in times.items()}


def evaluation(run: Run, ranks: int, machine: Machine, bank: int, *, test: int = 50_000, width: int = 2048) -> float:
    """Seconds of a kNN evaluation of student and teacher: decoding, which hides the forward passes, and the search."""
    images = bank + test
    read = max(images / machine.decoded, 2 * images * run.forward / machine.flops)
    return (read + 2 * 2 * bank * test * width / machine.exact) / ranks


def share_of_evaluations(run: Run, ranks: int, machine: Machine, bank: int, *, every: int = 10) -> float:
    """Share of the evaluations in the time of a run on ImageNet that is evaluated every ``every`` epochs."""
    epoch = 1_281_167 / (ranks * run.batch) * sum(predict(run, ranks, machine).values()) / 1e3
    spent = evaluation(run, ranks, machine, bank) / every
    return spent / (epoch + spent)


def counted(method: Method) -> float:  # type: ignore[type-arg]
    """FLOPs of the student on one image, counted operation by operation."""
    size = 224
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        method.student.eval()(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops())


def milliseconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def checks() -> list[tuple[str, float, float]]:
    """(what grows, factor by the model, measured factor)."""
    method = build_method(build(data="synthetic", method="mocov2", arch="resnet18", image_size=32, queue_size=1024))
    images = {n: torch.randn(n, 3, 32, 32).contiguous(memory_format=torch.channels_last) for n in (16, 64)}

    def forward(n: int) -> torch.Tensor:
        return method.student(images[n]).output.sum()  # type: ignore[no-any-return]

    def no_gradient(n: int) -> None:
        with torch.no_grad():
            forward(n)

    def loss(n: int, bank: int) -> Callable[[], object]:
        query, key, queue = (torch.randn(rows, 128) for rows in (n, n, bank))
        query.requires_grad_(True)
        return lambda: info_nce(query, key, torch.nn.functional.normalize(queue, dim=1), temperature=0.2).backward()

    def step(network: str) -> Callable[[], object]:
        student, teacher = (tensors(network, seed=seed) for seed in (0, 1))
        for p in student:
            p.requires_grad_(True).grad = torch.ones_like(p)
        optimizer = SGD(student, lr=0.1, momentum=0.9, teacher=teacher, ema_momentum=0.99)
        return optimizer.step

    alone, both = milliseconds(lambda: no_gradient(64)), milliseconds(lambda: forward(64).backward())
    sizes = {name: sum(torch.Size(shape).numel() for shape in shapes()) for name, shapes in NETWORKS.items()}
    return [
        ("forward, batch 16 to 64", 4, alone / milliseconds(lambda: no_gradient(16))),
        ("forward to forward and backward", 3, both / alone),
        ("loss, queue 16,384 to 65,536", 4, milliseconds(loss(256, 65_536)) / milliseconds(loss(256, 16_384))),
        ("loss, batch 128 to 512", 4, milliseconds(loss(512, 16_384)) / milliseconds(loss(128, 16_384))),
        ("SGD and teacher, ResNet-50 to ViT-B", sizes["ViT-B"] / sizes["ResNet-50"],
         milliseconds(step("ViT-B")) / milliseconds(step("ResNet-50"))),
    ]  # fmt: skip


def runs() -> dict[str, Run]:
    """ResNet-50 at 224 pixels: MoCo-v3 with 4,096 images in total, and MoCo-v2 with 32 images per process."""
    found = {}
    for name, method, options in (
        ("MoCo-v3", "mocov3", {}),
        ("MoCo-v2, queue 65,536", "mocov2", {"width": 128, "queue": 65_536, "directions": 1}),
    ):
        built = build_method(build(data="synthetic", method=method, arch="resnet50"))
        norms = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in built.student.modules())
        averaged = sum(p.numel() for p in built.student.parameters())
        trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
        found[name] = Run(counted(built), trained, averaged, norms, batch=0, **options)  # type: ignore[arg-type]
    return found


def main() -> None:
    """Print the checks and the predictions as Markdown."""
    print(f"Checks on {torch.get_num_threads()} threads of a CPU:\n")
    print("| what grows | model | measured |\n|---|--:|--:|")
    for what, model, measured in checks():
        print(f"| {what} | {model:.2f} | {measured:.2f} |")
    machine = Machine()
    for name, run in runs().items():
        print(f"\n{name}, ResNet-50, 224 pixels, on {machine.name}: predicted ms per step, nothing overlapped")
        print(f"({run.forward / 1e9:.1f} GFLOP a forward, {run.trained / 1e6:.1f} M parameters)\n")
        rows = []
        for ranks in (8, 16, 64, 128, 512):
            batch = 32 if run.queue else max(8, 4096 // ranks)
            sized = Run(**{**run.__dict__, "batch": batch})
            times = predict(sized, ranks, machine)
            rows.append((ranks, batch, times))
        sums = [sum(times.values()) for *_, times in rows]
        print(f"| GPUs | {' | '.join(str(ranks) for ranks, *_ in rows)} |")
        print(f"|---|{'--:|' * len(rows)}")
        print(f"| images per GPU | {' | '.join(str(batch) for _, batch, _ in rows)} |")
        for name in rows[0][2]:
            print(f"| {name} | {' | '.join(f'{times[name]:.2f}' for *_, times in rows)} |")
        print(f"| sum | {' | '.join(f'{total:.1f}' for total in sums)} |")
        speeds = (1e3 * ranks * batch / total for (ranks, batch, _), total in zip(rows, sums, strict=True))
        print(f"| images per second | {' | '.join(f'{speed:,.0f}' for speed in speeds)} |")
        whole, part = 1_281_167, RunConfig().eval_images
        sized = Run(**{**run.__dict__, "batch": rows[0][1]})
        for bank in (part, whole):
            share = share_of_evaluations(sized, 8, machine, bank)
            print(f"\nEvaluations with {bank:,} images in the bank take {share:.1%} of a run on 8 GPUs")


if __name__ == "__main__":
    main()
