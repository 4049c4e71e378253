"""The parts of the distributed tests: tests/test_distributed.py starts this file in several processes."""

from __future__ import annotations

import copy
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from PIL import Image
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.spawn import start_processes

from fastrm import train
from fastrm.data import open_source
from fastrm.data.encoded import _whole
from fastrm.data.paths import stated
from fastrm.data.settling import settled
from fastrm.errors import UsageError
from fastrm.evaluate import EvaluateConfig, evaluate
from fastrm.machine.distributed import gather_rows, processes, replicate, shuffled, world
from fastrm.machine.joined import joined
from fastrm.machine.meeting import together
from fastrm.machine.signals import Asked, Signals
from fastrm.methods import Method, build_method, find, names
from fastrm.methods.base import Encoding
from fastrm.models.synchronised import synchronise_norms
from fastrm.optim.schedules import Rates
from fastrm.probes import Pixels, frozen_scores
from fastrm.probes.features import Setting
from fastrm.settings.config import Config, DeviceConfig, build

EVAL_IMAGES = 300  # two batches of evaluation images
QUEUE, STEPS = 48, 4  # 4 steps of 16 keys fill the queue and wrap around
SMALL: dict[str, Any] = {
    "data": "digits", "arch": "test_resnet", "image_size": 32, "batch_size": 16, "epochs": 1, "workers": 0,
    "hidden_dim": 24, "output_dim": 12, "predictor_hidden_dim": 24, "queue_size": QUEUE, "warmup_epochs": 0.0,
    "log_every": 1, "eval_every": 1, "eval_images": EVAL_IMAGES, "stem": "imagenet", "prototypes": 32,
}  # fmt: skip


class Tiny(nn.Module):
    """A backbone of two convolutions with one normalisation, "batchnorm" or a GroupNorm: [B, 3, H, W] to [B, 8]."""

    dim = map_dim = 8
    transformer = False

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
        self.norm: nn.Module = nn.BatchNorm2d(8) if norm == "batchnorm" else nn.GroupNorm(1, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(images)[0]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [B, 8] and the feature map [B, 8, h, w]."""
        features = self.second(self.norm(self.first(images)).relu())
        return features.mean(dim=(2, 3)), features


def layer_norms(module: nn.Module) -> None:
    """Replace each BatchNorm1d of the heads by a LayerNorm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.LayerNorm(child.num_features))
        else:
            layer_norms(child)


def made(method: str, norm: str) -> Method[Any]:
    """A float64 method on the Tiny backbone, the same in each process."""
    torch.manual_seed(0)
    backbone = Tiny(norm)
    config: Config = build(**{**SMALL, "method": method})
    built = find(method)(backbone, config.method, backend="reference")
    if norm == "layernorm":
        layer_norms(built)
        built.teacher.requires_grad_(False)
    with torch.no_grad():  # make the teacher different from the student
        for p in built.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return built.double()


def gradients(folder: Path) -> None:
    """Gradients of DDP, where each process has a part of the batch, against those of one process on the whole batch.

    The largest differences of loss and gradient go to gradients.json.
    """
    rank, size = world()
    results = {}
    cases = [(m, "layernorm") for m in ("mocov3", "mocov2", "byol", "dino")] + [
        (m, "batchnorm") for m in ("mocov3", "byol")
    ]
    weight = torch.tensor(0.7, dtype=torch.float64)
    for method, norm in cases:
        torch.manual_seed(1)
        views = torch.randn(2, 16, 3, 16, 16, dtype=torch.float64)
        shared = made(method, norm)
        if not shared.queues:
            synchronise_norms(shared)
        network = replicate(shared, torch.device("cpu"))
        mine = views[:, 16 // size * rank : 16 // size * (rank + 1)]
        small = torch.randn(1, 16, 3, 8, 8, dtype=torch.float64) if method == "dino" else views[:0]
        more = list(small[:, 16 // size * rank : 16 // size * (rank + 1)])
        output = network(mine[0], mine[1], weight, **({"more": more} if more else {}))
        output.loss.backward()
        if method == "dino":
            shared.push(output.keys)
        loss = gather_rows(output.loss.detach().reshape(1))[0].mean()

        alone = made(method, norm)
        want = whole_batch(alone, views, weight, list(small))
        worst = 0.0
        # Errors are relative to the largest gradient: the true gradient of a bias before a normalisation is 0.
        largest = max(float(q.grad.abs().max()) for q in alone.parameters() if q.grad is not None)
        for p, q in zip(shared.parameters(), alone.parameters(), strict=True):
            if p.requires_grad:
                assert p.grad is not None
                assert q.grad is not None
                worst = max(worst, float((p.grad - q.grad).abs().max()) / largest)
        for a, b in zip(shared.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=f"{method} {norm}: a buffer differs")
        results[f"{method} {norm}"] = (abs(float(loss - want)), worst)
    if rank == 0:
        (folder / "gradients.json").write_text(json.dumps(results))


def whole_batch(method: Method[Any], views: Tensor, weight: Tensor, more: list[Tensor]) -> Tensor:
    """Loss on the whole batch in this process alone: the collectives are replaced by functions for one process."""
    alone = {"gather_rows": lambda rows: (rows, 0), "world": lambda: (0, 1)}
    alone["world"] = lambda: mock.Mock(size=1, rank=0)
    with (
        mock.patch.multiple("fastrm.methods.base", **alone),
        mock.patch("fastrm.methods.contrastive.gather_rows", alone["gather_rows"]),
    ):
        output = method(views[0], views[1], weight, more=more)
    output.loss.backward()
    if method.name == "dino":
        with mock.patch("fastrm.methods.dino.mean", lambda values: values):
            method.push(output.keys)
    return output.loss.detach()


def shuffle(folder: Path) -> None:
    """Shuffled batches mix the rows of all processes, and the encodings return in the original order."""
    rank, size = world()
    images = torch.arange(8.0 * rank, 8.0 * rank + 8)[:, None, None, None].expand(8, 3, 4, 4)
    seen: list[Tensor] = []
    exchange = dist.all_to_all_single

    def network(batch: Tensor) -> Encoding:
        seen.append(batch[:, 0, 0, 0])
        rows = batch.mean(dim=(2, 3))
        twice = 2 * rows
        return Encoding(rows, twice, twice)

    for last in (False, True):
        mine = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        with CommDebugMode() as exchanges, mock.patch.object(dist, "all_to_all_single", wraps=exchange) as moved:
            encoding = shuffled(network, mine)
        assert torch.equal(encoding.backbone, images.mean(dim=(2, 3)))
        assert torch.equal(encoding.output, 2 * images.mean(dim=(2, 3)))
        # One exchange for the batch and two for its encodings, whatever the number of processes.
        assert exchanges.get_total_counts() == len(moved.call_args_list) == 3
        assert [rows.numel() for call in moved.call_args_list for rows in call.args[:2]] == 2 * [8 * 48] + 4 * [8 * 3]
    everyone = gather_rows(torch.stack(seen).T.contiguous())[0].T
    for row in everyone:
        assert sorted(row.tolist()) == list(range(8 * size))
    foreign = sum(int(value) // 8 != rank for value in seen[0])
    assert 0 < foreign < 8
    (folder / f"shuffled{rank}").touch()


def normalised(folder: Path) -> None:
    """Synchronised BatchNorm on unequal shares of 7 images against torch's BatchNorm on all 7 in float64.

    Largest errors and the number of collectives go to normalised.json.
    """
    rank, size = world()
    mine = slice(*{2: (0, 5, 7), 4: (0, 3, 5, 6, 7)}[size][rank : rank + 2])
    results = {}
    for (name, (layer, shape)), dtype in product(LAYERS.items(), (torch.float32, torch.float64)):
        torch.manual_seed(2)
        images = torch.randn(7, *shape) + 300  # a mean far from 0, where a naive variance loses its digits
        upstream = torch.randn(7, *shape)
        whole, own = layer().double(), nn.Sequential(layer().to(dtype))
        synchronise_norms(own)
        everyone, part = images.double().requires_grad_(), images[mine].to(dtype).requires_grad_()
        want = whole(everyone)
        want.backward(upstream.double())
        with CommDebugMode() as forward:
            output = own(part)
        with CommDebugMode() as backward:
            output.backward(upstream[mine].to(dtype))
        assert everyone.grad is not None
        pairs = {"output": (output, want[mine]), "gradient": (part.grad, everyone.grad[mine])}
        pairs |= {key: (value, whole.state_dict()[key[2:]]) for key, value in own.state_dict().items()}
        for key, parameter in whole.named_parameters():
            total = own.get_parameter(f"0.{key}").grad.clone()
            dist.all_reduce(total)
            pairs[f"gradient of {key}"] = total, parameter.grad
        results[f"{name} {str(dtype)[6:]}"] = {
            "errors": {key: float((ours - theirs).abs().max()) for key, (ours, theirs) in pairs.items()},
            "exchanges": (forward.get_total_counts(), backward.get_total_counts()),
        }
        alone = layer().to(dtype)
        alone.load_state_dict(own[0].state_dict())
        assert name == "no statistics" or torch.equal(copy.deepcopy(own).eval()(part), alone.eval()(part))
    if rank == 0:
        (folder / "normalised.json").write_text(json.dumps(results))


def compiled(folder: Path, *methods: str) -> None:
    """Compiling student, teacher and predictor as one graph each under DDP does not change the gradients."""
    for method in methods:
        gradients = []
        for fast in (False, True):
            torch.manual_seed(3)
            built = build_method(build(**{**SMALL, "method": method}), trained=True).train()
            for part in (built.student, built.teacher, built.predictor):
                if fast:
                    part.compile(backend="aot_eager", fullgraph=True)
            views = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(world().rank))
            replicate(built, torch.device("cpu"))(*views, torch.tensor(0.7)).loss.backward()
            gradients.append([p.grad for p in built.parameters() if p.grad is not None])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        (folder / f"compiled {method} {world().rank}").touch()


def signals(folder: Path) -> None:
    """A signal to one process reaches all at their next call of ``asked``, and no call waits for the others."""
    rank, _ = world()
    with Signals() as heard:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            dist.barrier()  # the others reach this barrier only if their call does not wait for this process
        assert heard.asked() == Asked(save=False, end=0, stop=False, failed=False)
        if rank != 1:
            dist.barrier()
        assert heard.asked(stop=rank == 0) == Asked(save=True, end=0, stop=False, failed=False)
        assert heard.asked(failed=rank == 1, wait=True) == Asked(save=False, end=0, stop=True, failed=True)
        assert heard.asked() == Asked(save=False, end=0, stop=False, failed=False)
    (folder / f"signals{rank}").touch()


def reads(folder: Path) -> None:
    """Write the number of values that the host reads in one step of each method to reads{rank}.json."""
    from tests.test_step import Reads, ready  # imported here because it takes a while

    counts = {}
    for method in names():
        step, batches = ready(build(**{**SMALL, "method": method}), torch.device("cpu"))
        for _ in range(2):
            with Reads() as found:
                step(batches, Rates(0.1, 1.0, 0.9), measure=False)
        counts[method] = found.count
    (folder / f"reads{world().rank}.json").write_text(json.dumps(counts))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6, momentum=None), (6, 5, 4)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6, affine=False), (6, 2, 5, 4)),
    "no statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (6, 3, 3)),
    "BatchNormAct2d": (lambda: BatchNormAct2d(6, act_layer=nn.GELU), (6, 5, 4)),
}


def resumed(out: Path, steps: int) -> Config:
    """Settings of a MoCo-v2 run up to ``steps``, which the tests make in one part or in two."""
    return build(**{**SMALL, "method": "mocov2", "epochs": 2, "eval_every": 0, "max_steps": steps, "out": out})


def going_on(folder: Path, name: str, steps: int) -> None:
    """Train up to ``steps``, with a different state of torch's random numbers in each process."""

    def apart(*args: Any, **options: Any) -> Method[Any]:
        built = build_method(*args, **options)
        torch.rand(world().rank)
        return built

    with mock.patch("fastrm.run.assemble.build_method", apart):
        train.train(resumed(folder / name, steps))


def trained(folder: Path, method: str, arch: str) -> None:
    """Train a few steps, and save the state of the method in each process."""
    built: list[Method[Any]] = []
    ranks: list[int] = []

    def kept(*args: Any, **options: Any) -> Method[Any]:
        """Build the method, and keep it and its rank; rank 0 saves its initial state."""
        built.append(build_method(*args, **options))
        ranks.append(world().rank)
        if ranks == [0]:
            torch.save(built[0].state_dict(), folder / f"start {method} {arch}.pt")
        return built[0]

    with mock.patch("fastrm.run.assemble.build_method", kept):
        out = folder / f"{method} {arch}"
        leaves = {"method": method, "arch": arch, "max_steps": STEPS, "eval_every": int(method == "mocov3"), "out": out}
        train.train(build(**{**SMALL, **leaves}))
    torch.save(built[0].state_dict(), folder / f"rank{ranks[0]} {method} {arch}.pt")


def scores(run: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Scores of a run on 300 images of its data set."""
    wanted: dict[str, Any] = {"knn": True, "linear_quick": True, "gap": True, **more}
    return evaluate(EvaluateConfig(run=run, out=out, eval_images=EVAL_IMAGES, device="cpu", workers=0, **wanted))


def evaluated(folder: Path) -> None:
    """Evaluate a run in all processes together."""
    with mock.patch("fastrm.evaluate.processes", return_value=nullcontext(world())):
        scores(folder / "mocov3 test_resnet", folder / "evaluation.json", neighbours=folder / "neighbours.png")


def slowed(folder: Path) -> None:
    """A run whose evaluation delays one process by 40 s, in a group with a timeout of 15 s."""
    from fastrm.data.eval_loader import eval_view

    waits = [40.0] if world().rank == 1 else []

    def late(*args: Any) -> Tensor:
        if waits:
            time.sleep(waits.pop())
        return eval_view(*args)

    with mock.patch("fastrm.data.eval_loader.eval_view", late):
        train.train(build(**{**SMALL, "method": "byol", "max_steps": 2, "out": folder / "slowed"}))


class Disturbed(Pixels):
    """A network of raw pixels that calls ``do`` once, in process 1."""

    def __init__(self, do: Callable[[], object]) -> None:
        super().__init__(8)
        self.to_do = [do]

    def forward(self, images: Tensor) -> Tensor:
        if world().rank == 1 and len(images) > 1 and self.to_do:
            self.to_do.pop()()
        return super().forward(images)


def slow(folder: Path) -> None:
    """An evaluation in which one process takes 5 s, in a group with a timeout of 3 s."""
    group = dist.distributed_c10d
    limits = getattr(group, "set_timeout", None) or group._set_pg_timeout  # the name before torch 2.14
    source, setting = settled(open_source("digits")).limited(EVAL_IMAGES), Setting(16, torch.device("cpu"), 0)
    dist.barrier()
    limits(datetime.timedelta(seconds=3))
    try:
        found = frozen_scores({"it": Disturbed(lambda: time.sleep(5))}, source, setting, knn=True)
    finally:
        limits(datetime.timedelta(minutes=30))
    (folder / f"slow{world().rank}.json").write_text(json.dumps([value.value for value in found["it"].values()]))


def raised(error: Exception) -> None:
    raise error


def failing(folder: Path) -> None:
    """Write what each process raises if process 1 fails in an evaluation to failing{rank}.json."""
    source, setting = settled(open_source("digits")).limited(EVAL_IMAGES), Setting(16, torch.device("cpu"), 0)
    said = []
    for error in (UsageError("--data is wrong"), KeyError("a bug")):
        network = Disturbed(partial(raised, error))
        try:
            with together():
                frozen_scores({"it": network}, source, setting, knn=True)
        except Exception as heard:
            said.append(f"{type(heard).__name__}: {heard}")
    (folder / f"failing{world().rank}.json").write_text(json.dumps(said))


def refused(call: Callable[[], object]) -> str:
    """The message of the UsageError that a call raises, or "" if it raises none."""
    try:
        call()
    except UsageError as error:
        return str(error)
    return ""


def started(folder: Path) -> None:
    """A run on files that rank 0 lists. The cache of rank 1 is empty, and 4 of the files do not exist there.

    Also a run that is refused, because the files of rank 1 differ from those of rank 0.
    """
    rank, pictures = world().rank, folder / "pictures"
    if rank == 0:
        for number in range(48):
            path = pictures / f"class{number % 3}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (5 * number, 90, 120)).save(path)
    dist.barrier()
    options = {**SMALL, "data": str(pictures), "batch_size": 8, "method": "mocov2", "eval_every": 0}
    lost = {str(pictures / f"class{number % 3}" / f"{number:02}.png") for number in (1, 11, 21, 31)}
    missed: set[str] = set()

    def read(path: str) -> tuple[bytes, int]:
        if rank and path in lost:
            missed.add(path)
            raise FileNotFoundError(2, "No such file or directory", path)
        return _whole(path)

    def sizes(paths: Any, number: int) -> Any:
        found, changed = stated(paths, number)
        found[: 20 * rank] = -1
        return found, changed

    with (
        mock.patch.dict("os.environ", {"XDG_CACHE_HOME": str(folder / f"cache{rank}")}),
        mock.patch("fastrm.run.images.open_source", wraps=open_source) as opens,
        mock.patch("fastrm.data.encoded._whole", read),
    ):
        train.train(build(**options, out=folder / "started"))
        with mock.patch("fastrm.data.sent.stated", sizes):
            said = refused(lambda: train.train(build(**options, out=folder / "other")))
    cached = sorted(path.suffix for path in (folder / f"cache{rank}").rglob("*.index"))
    (folder / f"started{rank}.json").write_text(json.dumps([opens.call_count, cached, said, len(missed)]))


def agreeing(folder: Path) -> None:
    """Two GPUs that differ choose a precision that both have. If one cannot meet a request, all raise its error."""
    rank = world().rank

    def lacking(*_: object) -> str:
        if rank:
            raise UsageError("--precision bf16: this GPU does not have it; use fp16 or fp32")
        return "bf16"

    best = mock.patch("fastrm.machine.joined.choose_precision", return_value="fp16" if rank else "bf16")
    with best, joined(DeviceConfig(), optimizer="lars") as machine:
        found = machine.precision
    with mock.patch("fastrm.machine.joined.choose_precision", lacking):
        said = refused(lambda: joined(DeviceConfig(), optimizer="lars").__enter__())
    (folder / f"agreeing{rank}.json").write_text(json.dumps([found, said]))


def borrowed(folder: Path) -> None:
    """Write what a run says that cannot use the process group of the script, or whose other process does not come."""
    rank = world().rank
    said = [refused(lambda: processes(torch.device("cuda")).__enter__())]
    with mock.patch("fastrm.machine.distributed.TIMEOUT", datetime.timedelta(seconds=0.2)):
        if rank == 0:
            said.append(refused(lambda: processes(torch.device("cpu")).__enter__()))
    dist.barrier()
    with processes(torch.device("cpu")) as here:
        said.append(f"{here.rank} of {here.size}")
    (folder / f"borrowed{rank}.json").write_text(json.dumps([*said, dist.is_initialized()]))


# These two networks have layers behind the pooling, which DenseCL's loss does not reach.
TRAINED = [*((m, "test_resnet") for m in names()), ("densecl", "test_convnext"), ("densecl", "mobilenetv3_small_050")]
SLOW: dict[str, Callable[[Path], object]] = {
    "slowed": slowed,
    "reads": reads,
    "compiled": lambda folder: compiled(folder, *names()),
}
PARTS: dict[str, Callable[[Path], object]] = {
    "gradients": gradients,
    "shuffle": shuffle,
    "normalised": normalised,
    "signals": signals,
    **{" ".join(pair): partial(trained, method=pair[0], arch=pair[1]) for pair in TRAINED},
    "evaluated": evaluated,
    "failing": failing,
    "slow": slow,
    "started": started,
    "agreeing": agreeing,
    "borrowed": borrowed,
    "whole": lambda folder: going_on(folder, "whole", 6),
    "first half": lambda folder: going_on(folder, "parts", 2),
    "second half": lambda folder: going_on(folder, "parts", 6),
}


def main(where: Path, *names: str) -> None:
    """Run parts by name in one process group, because leaving a group and joining the next is a race.

    The runs of the parts use this group, as they use the one of any script.
    """
    limit = 15 if names == ("slowed",) else 1800
    with (
        mock.patch("fastrm.machine.distributed.TIMEOUT", datetime.timedelta(seconds=limit)),
        processes(torch.device("cpu")),
    ):
        for name in names:
            (PARTS | SLOW)[name](where)


def rank_of_two(rank: int, port: int, where: Path, names: Sequence[str]) -> None:
    """Run the parts as the process ``rank`` of two, in the environment that torchrun would set."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update({"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    main(where, *names)


if __name__ == "__main__":
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    if "RANK" in os.environ:
        main(folder, *parts)
    else:  # fork two processes here, because importing everything in each takes ten seconds
        import sklearn.datasets  # noqa: F401 - the parts import it

        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        start_processes(rank_of_two, (store.port, folder, parts), nprocs=2, start_method="fork")
