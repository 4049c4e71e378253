"""Tensors without plain memory (sharded, fake, nested and others), and parameter names of wrapped modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from fastrm.kernels import (
    EMA,
    FeatureQueue,
    ema_avg_fn,
    enqueue_,
    fused_ema_,
    info_nce,
    residual_info_nce,
    residual_loss,
)
from fastrm.optim import LARS, SGD, AdamW

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

KINDS: dict[str, Callable[..., Any]] = {
    "lars": lambda params, **teacher: LARS(params, 0.1, weight_decay=0.1, trust_coefficient=0.1, **teacher),
    "sgd": lambda params, **teacher: SGD(params, 0.1, momentum=0.9, weight_decay=0.1, **teacher),
    "dampened": lambda params, **teacher: SGD(params, 0.1, momentum=0.9, dampening=0.5, **teacher),
    "adamw": lambda params, **teacher: AdamW(params, 0.1, **teacher),
}


def network() -> nn.Module:
    """A network with 5 rows in its first layer, which two processes cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def two_steps(student: nn.Module, teacher: nn.Module, kind: str) -> list[Tensor]:
    """The whole weights of student and teacher after two optimizer steps and three teacher updates."""
    optimizer = KINDS[kind](student.parameters(), teacher=teacher.parameters(), ema_momentum=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        student(torch.arange(6.0).reshape(2, 3)).square().mean().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    fused_ema_(teacher, student, 0.25)
    EMA(teacher, student).update_(0.75)
    ema_avg_fn(0.9)([p.detach() for p in teacher.parameters()], [p.detach() for p in student.parameters()])
    tensors = [*student.parameters(), *teacher.parameters()]
    return [x.full_tensor().detach() if isinstance(x, DTensor) else x.detach() for x in tensors]


def in_one_of_two(rank: int, file: str, want: dict[str, list[Tensor]]) -> None:
    """Compare the weights of an FSDP2 network in one of two processes with those of one process."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for kind, tensors in want.items():
        student, teacher = network(), network()
        for module in (student, teacher):
            fully_shard(module[0], mesh=mesh)  # type: ignore[index]
            fully_shard(module, mesh=mesh)
        torch.testing.assert_close(two_steps(student, teacher, kind), tensors, rtol=1e-5, atol=1e-6)
    dist.destroy_process_group()


def test_fsdp2_gives_the_weights_of_one_process(tmp_path: Any) -> None:
    want = {kind: two_steps(network(), network(), kind) for kind in KINDS}
    torch.multiprocessing.start_processes(in_one_of_two, (str(tmp_path / "store"), want), nprocs=2, start_method="fork")


@pytest.fixture
def mesh(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_that_are_not_sharded_alike_are_refused(mesh: DeviceMesh) -> None:
    plain = torch.ones(4, 2)
    rows, whole = distribute_tensor(plain, mesh, [Shard(0)]), distribute_tensor(plain, mesh, [Replicate()])
    partial = DTensor.from_local(plain, mesh, [Partial()])
    for teacher, student in ((rows, plain), (plain, rows), (rows, whole), (partial, partial)):
        for update in (lambda t, s: fused_ema_([t], [s], 0.5), lambda t, s: EMA([t], [s])):
            with pytest.raises(TypeError, match=r"fused_ema_: teacher\[0\] is a .*(sharded alike|must be alike)"):
                update(teacher, student)
        with pytest.raises(TypeError, match="must be"):
            SGD([nn.Parameter(student)], 0.1, teacher=[teacher], ema_momentum=0.5)
    with pytest.raises(TypeError, match=r"shadow\[0\] a Tensor"):
        fused_ema_([rows], [rows], 0.5, shadow=[plain])
    parameter = nn.Parameter(rows)
    parameter.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    with pytest.raises(TypeError, match=r"LARS: parameter is a DTensor .*gradient"):
        LARS([parameter], 0.1).step()
    with pytest.raises(ValueError, match="backend='triton'"):
        SGD([parameter], 0.1, backend="triton")
    state = SGD([nn.Parameter(plain.clone())], 0.1).state_dict()
    state["state"] = {0: {"momentum_buffer": plain}}
    with pytest.raises(TypeError, match="parameter is a DTensor and momentum_buffer a Tensor"):
        SGD([parameter], 0.1).load_state_dict(state)
    for call in (
        lambda: info_nce(rows, plain),
        lambda: info_nce(plain, rows),
        lambda: residual_loss(plain, whole),
        lambda: enqueue_(plain.clone(), torch.tensor(0), rows),
    ):
        with pytest.raises(TypeError, match=r"is a DTensor; it must be a plain tensor; pass its to_local\(\)"):
            call()
    assert (plain == 1).all()


def test_other_kinds_of_tensors_are_refused() -> None:
    plain = torch.ones(2, 3)
    masked = torch.masked.as_masked_tensor(plain, plain > 0)
    odd = {
        "nested": torch.nested.nested_tensor([plain, plain]),
        "layout torch.jagged": torch.nested.nested_tensor([plain, plain], layout=torch.jagged),
        "layout torch.sparse_coo": plain.to_sparse(),
        "quantized": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "a MaskedTensor": masked,
    }
    for message, tensor in odd.items():
        for call in (
            lambda x: fused_ema_([x], [x.clone()], 0.5),
            lambda x: EMA([plain], [x]),
            lambda x: ema_avg_fn(0.5)([plain], [x]),
            lambda x: info_nce(x, plain),
            lambda x: residual_loss(plain, x),
            lambda x: enqueue_(plain.clone(), torch.tensor(0), x),
            lambda x: SGD([x], 0.1),
        ):
            with pytest.raises(TypeError, match=message):
                call(tensor)


class Named(Tensor):
    """A tensor subclass that adds no behaviour."""


def test_subclasses_with_plain_memory_are_accepted() -> None:
    teacher, student = torch.zeros(3).as_subclass(Named), torch.ones(3).as_subclass(Named)
    fused_ema_([teacher], [student], 0.5)
    assert teacher.tolist() == [0.5] * 3
    query = torch.eye(3).as_subclass(Named)
    assert info_nce(query, query).item() == info_nce(torch.eye(3), torch.eye(3)).item()


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_operations_accept_fake_tensors(device: str) -> None:
    """Operations give fake tensors of the right shapes and dtypes, also on a device that does not exist."""
    with FakeTensorMode():
        query, key, queue = (torch.empty(n, 4, device=device) for n in (3, 3, 8))
        pointer = torch.zeros((), dtype=torch.int64, device=device)
        query.requires_grad_()
        for backend in (None, "reference"):
            loss, part, _ = residual_info_nce(query, key, key, queue, pointer, backend=backend)
            rows = info_nce(query, key, queue, reduction="none", backend=backend)
            assert [loss.shape, part.shape, rows.shape, rows.device.type] == [(), (), (3,), device]
            total = loss + rows.sum() + residual_loss(query, key, backend=backend)
            if device != "cuda" or torch.cuda.is_available():  # the backward pass of torch needs the device
                assert torch.autograd.grad(total, query)[0].shape == (3, 4)
            enqueue_(queue, pointer, key, backend=backend)
        teacher, student = [torch.empty(5, 2, device=device)], [torch.empty(5, 2, device=device)]
        fused_ema_(teacher, student, 0.9)
        fused_ema_(teacher, student, torch.tensor(0.9), shadow=[teacher[0].bfloat16()])
        EMA(teacher, student).update_(0.9)
        ema_avg_fn(0.9)(teacher, student)
        for make in KINDS.values():
            weight = nn.Parameter(torch.empty(5, 2, device=device))
            optimizer = make([weight], teacher=[torch.empty(5, 2, device=device)], ema_momentum=0.9)
            for _ in range(2):
                weight.grad = torch.empty_like(weight)
                optimizer.step()
        ring = FeatureQueue(8, 4).to(device)
        ring.enqueue_(key)
    with pytest.raises(ValueError, match=r"student\[0\] has shape"):
        fused_ema_(teacher, [teacher[0][:2]], 0.9)
    fused_ema_(teacher, student, 0.9)  # outside the mode


def test_operations_accept_meta_tensors_and_torch_export() -> None:
    on_meta = torch.empty(3, 4, device="meta")
    assert info_nce(on_meta, on_meta, reduction="none").shape == (3,)
    fused_ema_([on_meta], [on_meta.clone()], 0.5)

    class Loss(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return info_nce(query, key) + residual_loss(query, key)

    inputs = torch.randn(3, 4), torch.randn(3, 4)
    exported = torch.export.export(Loss(), inputs).module()
    torch.testing.assert_close(exported(*inputs), Loss()(*inputs))


class Inner(nn.Module):
    """A network that has a submodule called "module", which is also the name that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.zeros(2))


class Outer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def wrapped(module: nn.Module, name: str) -> nn.Module:
    outer = nn.Module()
    outer.add_module(name, module)
    return outer


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda module: module,
    "like DDP": Outer,
    "twice": lambda module: Outer(wrapped(module, "_orig_mod")),
    "FSDP": lambda module: wrapped(module, "_fsdp_wrapped_module"),
    "Fabric": lambda module: wrapped(Outer(module), "_forward_module"),
    "checkpointed": checkpoint_wrapper,
    "AveragedModel": AveragedModel,
    "compiled": lambda module: torch.compile(module),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("kind", [Inner, network])
@pytest.mark.parametrize("name", WRAPPERS)
def test_names_of_wrappers_are_ignored(name: str, kind: Callable[[], nn.Module]) -> None:
    teacher, student = kind(), kind()
    with torch.no_grad():
        for value, (p, q) in enumerate(zip(teacher.parameters(), student.parameters(), strict=True)):
            p.zero_()
            q.fill_(value + 1)
    inner = copy.deepcopy(student)
    fused_ema_(teacher, WRAPPERS[name](inner), 0.5)
    for value, p in enumerate(teacher.parameters()):
        assert (p == (value + 1) / 2).all()
    outer = WRAPPERS[name](teacher)
    fused_ema_(outer, student, 0)
    for p, q in zip(outer.parameters(), student.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoint_wrappers_inside_a_network_are_ignored() -> None:
    teacher, student = network(), network()
    student[0] = checkpoint_wrapper(student[0])  # type: ignore[operator]
    fused_ema_(teacher, Outer(student), 0)
    with pytest.raises(ValueError, match="without a partner"):
        fused_ema_(teacher, nn.Linear(2, 2), 0)
