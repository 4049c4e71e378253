"""The launches of the library's kernels, which benchmarks/kernel_report.py compiles.

A new kernel is a function that yields its cases, added to CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A kernel with the arguments of one of its launches in the library.

    Attributes:
        name: name in the report.
        kernel: the ``triton.jit`` function.
        types: Triton types of the arguments that are passed at run time, ``{"x_ptr": "*fp32", "rows": "i32"}``.
        constants: values of all other arguments.
        options: options of the launch, such as ``num_warps``.
        elements: elements that the main path processes with the memory accesses in the code, or ``None`` if this
            cannot be read, for example in a loop over tiles.
        floor: minimum bytes per element.
        aligned: pointers that are known to be 16-byte aligned; all unless given.
        even: numbers that are multiples of 16.
        archs: compute capabilities on which it is launched; all unless given.
        stores: bits of the widest stores, for kernels that read single bytes at computed addresses. Other kernels are
            judged by ``elements``, and their loads have 128 bits.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    elements: int | None = None
    floor: float | None = None
    aligned: tuple[str, ...] | None = None
    even: tuple[str, ...] = ()
    archs: tuple[int, ...] | None = None
    stores: int | None = None


def ema_cases() -> Iterable[Case]:
    import torch

    from fastrm.kernels import _ema_kernel
    from fastrm.kernels import multi_tensor as shared

    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for teacher, student, shadow in ((f32, f32, None), (f32, bf16, None), (f32, bf16, bf16), (f32, f16, None),
                                     (bf16, bf16, None), (f64, f64, None)):  # fmt: skip
        for in_memory in (False, True) if student == f32 else (False,):
            wide = f64 if teacher == f64 else f32
            stored_in_memory = in_memory or wide == f64
            constants = dict(zip(("TEACHER", "STUDENT", "SHADOW"), _names(teacher, student, shadow), strict=True))
            yield Case(
                name=f"ema {_short(teacher)} <- {_short(student)}{_plus(shadow)}{', momentum tensor' * in_memory}",
                kernel=_ema_kernel._ema_kernel,
                types={
                    "table_ptr": "*i64",
                    "chunks_ptr": "*i64",
                    "momentum": f"*{_triton(wide)}" if stored_in_memory else "fp32",
                    "rest": "fp32",
                },
                constants={
                    **constants,
                    "COMPUTE": shared.DTYPES[wide],
                    "MOMENTUM_IN_MEMORY": stored_in_memory,
                    "BLOCK": shared.BLOCK,
                },
                options={"num_warps": shared.WARPS},
                elements=shared.BLOCK,
                floor=2 * teacher.itemsize + student.itemsize + (shadow.itemsize if shadow else 0),
            )


def optim_cases() -> Iterable[Case]:
    import torch

    from fastrm.kernels import _optim_kernels as kernels
    from fastrm.kernels import multi_tensor as shared
    from fastrm.kernels import optim

    f32, bf16 = torch.float32, torch.bfloat16
    tables = {"table_ptr": "*i64", "options_ptr": "*fp64"}
    options = {"num_warps": shared.WARPS}
    yield Case(
        name="lars norms f32",
        kernel=kernels._norms_kernel,
        types={**tables, "spans_ptr": "*i64", "partials_ptr": "*fp32"},
        constants={
            "grad_scale_ptr": None,
            "PARAM": shared.DTYPES[f32],
            "COMPUTE": shared.DTYPES[f32],
            "OPERANDS": 5,
            "BLOCK": shared.BLOCK,
        },
        options=options,
        floor=8,
    )
    for param, teacher, shadow in ((f32, None, None), (f32, f32, None), (f32, f32, bf16), (bf16, f32, None)):
        constants = {
            **dict(zip(("PARAM", "TEACHER", "SHADOW"), _names(param, teacher, shadow), strict=True)),
            "COMPUTE": shared.DTYPES[f32],
            "BLOCK": shared.BLOCK,
        }
        average = 2 * teacher.itemsize if teacher else 0
        average += shadow.itemsize if shadow else 0
        what = _short(param) + (f" + teacher {_short(teacher)}{_plus(shadow)}" if teacher else "")
        momentum = {**constants, "BUFFER": True, "MAX_SPANS": optim.MAX_SPANS}
        for scaled in (False, True) if param == f32 else (True,):
            scaler = {"grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32"} if scaled else {}
            absent = {} if scaled else {"grad_scale_ptr": None, "found_inf_ptr": None}
            name = f"{what}{', scaler' * scaled}"
            chunked = {**tables, "chunks_ptr": "*i64", **scaler}
            yield Case(
                name=f"lars {name}",
                kernel=kernels._momentum_kernel,
                types={**chunked, "partials_ptr": "*fp32"},
                constants={**momentum, **absent},
                options=options,
                elements=shared.BLOCK,
                floor=5 * param.itemsize + average,
            )
            yield Case(
                name=f"sgd {name}",
                kernel=kernels._momentum_kernel,
                types=chunked,
                constants={**momentum, **absent, "partials_ptr": None},
                options=options,
                elements=shared.BLOCK,
                floor=5 * param.itemsize + average,
            )
            yield Case(
                name=f"adamw {name}",
                kernel=kernels._adamw_kernel,
                types={**chunked, "finished_ptr": "*i32", "tensors": "i32"},
                constants={**constants, **absent},
                options=options,
                elements=shared.BLOCK,
                floor=7 * param.itemsize + average,
            )


def contrastive_cases() -> Iterable[Case]:
    import torch

    from fastrm.kernels import _finish, _push, _sweep, _sweep_kernel

    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

    for dtype, n, size, dim, in_batch, gradient, archs in (
        (bf16, 256, 65536, 128, False, True, None),
        (bf16, 256, 65536, 128, False, False, None),
        (f16, 256, 65536, 128, False, True, None),
        (f32, 256, 65536, 128, False, True, None),
        (bf16, 12544, 65536, 128, False, True, (90, 100)),
        (bf16, 512, 4096, 256, False, True, None),
        (bf16, 256, 256, 256, True, True, None),
        (bf16, 16384, 16384, 256, True, True, (90, 100)),
    ):
        kind = _sweep.product_kind(dtype)
        plan = _sweep.plan(n, size, dim, kind, slots=132, major=9 if archs else 8)
        assert plan is not None
        finish = _sweep.finishing(dim, plan.bank_splits)
        warps = finish.pop("num_warps")
        in_memory = dim == 256  # temperature and weights are tensors, like the weight in a trainer
        number = "*fp32" if in_memory else "fp32"
        name = f"{_short(dtype)} {n} x {size} x {dim}{' in batch' * in_batch}{', no gradient' * (not gradient)}"
        name += ", numbers in memory" * in_memory
        query = _matrices(dtype if in_batch else f32, "query")
        types = {"tickets_ptr": "*i64", "temperature": number, **_matrices(f32, "logsums"), **query}
        types |= dict.fromkeys(("n", "size", "key_offset"), "i32")
        types |= _matrices(dtype, "averages") if gradient else {}
        shared = {"D": dim, "BLOCK_D": _push.block_d(dim), "GRADIENT": gradient}
        shared |= {} if gradient else {"averages_ptr": None}
        push = {**_matrices(dtype, "queue"), **_matrices(f32, "push"), "pointer_ptr": "*i64"}
        yield Case(
            name=f"sweep {name}",
            kernel=_sweep_kernel.sweep_kernel,
            types={
                **types,
                **({} if in_batch else {"pointer_ptr": "*i64"}),
                **_matrices(dtype, "bank"),
                "tiles_per_split": "i32",
            },
            constants={
                **shared,
                **({"pointer_ptr": None} if in_batch else {}),
                **dict.fromkeys(("values_ptr", "shift_ptr")),
                "BLOCK_N": plan.block_n,
                "BLOCK_K": plan.block_k,
                "IN_BATCH": in_batch,
                "PRECISION": "tf32" if kind == "half" else kind,
                "UPCAST": False,
            },
            options={"num_warps": plan.warps, "num_stages": plan.stages},
            archs=archs,
        )
        yield Case(
            name=f"finish{'' if in_batch else ' and push'} {name}",
            kernel=_finish.finish_kernel,
            types={
                **types,
                **_matrices(dtype, "key", "same"),
                **_matrices(f32, "losses", "sums"),
                **(_matrices(f32, "gradient") if gradient else {}),
                **({} if in_batch else push),
                **{"residual_weight": number, "contrastive_weight": number, "scale": "fp32"},
                **dict.fromkeys(("splits", "count"), "i32"),
            },
            constants={
                **shared,
                **({} if gradient else {"gradient_ptr": None}),
                **(dict.fromkeys(push) if in_batch else {}),
                **finish,
                "PUSH_R": _push.block_r(dim),
            },
            options={"num_warps": warps},
        )
    yield Case(
        name="enqueue f32 into bf16 x 128",
        kernel=_push.push_kernel,
        types={
            **_matrices(bf16, "queue"),
            **_matrices(f32, "keys"),
            **dict.fromkeys(("start_ptr", "pointer_ptr"), "*i64"),
            "skip_ptr": "*fp32",
            **dict.fromkeys(("count", "size"), "i32"),
        },
        constants={"D": 128, "BLOCK_D": _push.block_d(128), "BLOCK_R": _push.block_r(128)},
    )


def view_cases() -> Iterable[Case]:
    from fastrm.kernels import _augment, _augment_kernel

    strides = ("image_stride", "row_stride", "column_stride", "band_stride")
    for side, dtype, boxes, radius, blurs in (
        (224, "fp32", False, 6, (False,)),
        (32, "bf16", True, 1, (True, False)),
        (224, "bf16", False, 6, (True, False)),
    ):
        name = f"{dtype} {side}{' of boxes' * boxes}"
        plan = _augment.plan(side, side, 3, radius)
        types = {"images_ptr": "*u8", "table_ptr": "*i32", "first": "i32", **dict.fromkeys(strides, "i32")}
        types |= {"sums_ptr": "*fp32"} if plan.sums else {}
        constants = {"BANDS": 3, "OUT_H": side, "OUT_W": side, "BOXES": boxes, "BICUBIC": False}
        if dtype == "bf16" and plan.sums:
            yield Case(
                name=f"gray {side}",
                kernel=_augment_kernel.gray_kernel,
                types=types,
                constants={**constants, **plan.gray()},
                options={"num_warps": plan.warps(False)},
                stores=32,
            )
        for blur in blurs:
            yield Case(
                name=f"view {name}{', blurred' * blur}",
                kernel=_augment_kernel.view_kernel,
                types={**types, "out_ptr": f"*{dtype}", "numbers_ptr": "*fp32", "radius": "i32"},
                constants={
                    **constants,
                    **({} if plan.sums else {"sums_ptr": None}),
                    "CHANNELS": 3,
                    **plan.view(blur),
                },
                options={"num_warps": plan.warps(blur)},
                stores=128,
            )


def wide_cases() -> Iterable[Case]:
    import torch

    from fastrm.kernels import _finish, _push, _sweep, _wide, _wide_kernels

    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

    for dtype, kind, n, dim, in_batch, gradient in (
        (bf16, "half", 256, 1024, False, True),
        (bf16, "half", 256, 1024, False, False),
        (f16, "half", 64, 128, False, True),  # for example for an 8-bit queue
        (f32, "tf32", 256, 1000, True, True),
        (f32, "tf32x3", 256, 512, False, True),
        (bf16, "half", 16384, 2048, True, True),
    ):
        work = _wide.plan(n, 65536, dim, kind, slots=132, gradient=gradient)
        tiles = work.tiles
        name = f"{_short(dtype)} {n} x {dim}, {kind}{' in batch' * in_batch}{', no gradient' * (not gradient)}"
        absent = {} if gradient else {"weights_ptr": None}
        shared = {"D": dim, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
        shared |= {"PRECISION": "tf32" if kind == "half" else kind, "UPCAST": False}
        types = {**_matrices(dtype, "bank"), **_matrices(f32, "tops", "totals")}
        types |= dict.fromkeys(("n", "columns", "width"), "i32")
        types |= _matrices(dtype, "weights") if gradient else {}
        yield Case(
            name=f"score {name}",
            kernel=_wide_kernels.score_kernel,
            types={**types, **_matrices(dtype, "unit"), "tickets_ptr": "*i64", "temperature": "fp32", "shift": "i32"},
            constants={**shared, **absent, "BLOCK_D": tiles.inner, "IN_BATCH": in_batch, "pointer_ptr": None},
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
            even=("width",),
        )
        yield Case(
            name=f"average {name}",
            kernel=_wide_kernels.average_kernel,
            types={
                **types,
                **_matrices(f32, "logsums"),
                **(_matrices(dtype, "averages") if gradient else {}),
                **dict.fromkeys(("tiles", "tiles_per_split", "every"), "i32"),
            },
            constants={
                **shared, **absent, **({} if gradient else {"averages_ptr": None}), "BLOCK_D": tiles.block_d,
                "STEP": tiles.step,
            },
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
            even=("width",),
            stores=None if gradient else 32,
        )  # fmt: skip
    for dim in (1024, 8192):
        finish = _sweep.finishing(dim, 16)
        options = {"num_warps": finish.pop("num_warps")}
        push = {**_matrices(bf16, "queue"), **_matrices(f32, "push"), "pointer_ptr": "*i64"}
        yield Case(
            name=f"finish and push bf16 x {dim}, 16 parts",
            kernel=_finish.finish_kernel,
            types={
                **_matrices(f32, "query", "key", "same", "logsums", "losses", "sums", "gradient"),
                **_matrices(bf16, "averages"),
                **push,
                "tickets_ptr": "*i64",
                **dict.fromkeys(("temperature", "residual_weight", "contrastive_weight", "scale"), "fp32"),
                **dict.fromkeys(("n", "size", "key_offset", "splits", "count"), "i32"),
            },
            constants={
                "D": dim, "BLOCK_D": _push.block_d(dim), "GRADIENT": True, **finish, "PUSH_R": _push.block_r(dim),
            },
            options=options,
        )  # fmt: skip


def prototype_cases() -> Iterable[Case]:
    import torch

    from fastrm.kernels import _finish, _prototypes_kernel, _prototypes_swept, _push, _sweep, _sweep_kernel

    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

    for dtype, kind, dim, in_pairs in (
        (f16, "half", 64, False),
        (bf16, "half", 128, True),
        (bf16, "half", 256, True),
        (bf16, "half", 512, True),
        (f32, "tf32", 64, False),
        (f32, "tf32", 128, False),
        (f32, "tf32", 256, True),
        (f32, "tf32", 512, True),
        (f32, "tf32x3", 64, False),
        (f32, "tf32x3", 128, False),
    ):
        plan = _sweep.plan(1280, 65536, dim, kind, slots=132, major=9, two=True)
        assert plan is not None
        gather = _prototypes_swept.gathering(dim, plan.bank_splits)
        number = "*fp32" if in_pairs else "fp32"
        name = f"{_short(dtype)} x {dim}, {kind}{', pairs' * in_pairs}"
        shared = {"D": dim, "BLOCK_D": _push.block_d(dim)}
        product = {"PRECISION": "tf32" if kind == "half" else kind, "UPCAST": False}
        yield Case(
            name=f"sweep of two {name}",
            kernel=_sweep_kernel.sweep_kernel,
            types={
                **_matrices(dtype, "bank", "values"),
                **_matrices(f32, "query", "shift", "averages", "logsums"),
                **dict.fromkeys(("n", "size", "key_offset", "tiles_per_split"), "i32"),
                "temperature": number,
            },
            constants={
                **shared,
                **product,
                **dict.fromkeys(("tickets_ptr", "pointer_ptr")),
                **{"BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, "IN_BATCH": False, "GRADIENT": True},
            },
            options={"num_warps": plan.warps, "num_stages": plan.stages},
        )
        if kind == "half":
            yield Case(
                name=f"gather {name}",
                kernel=_finish.gather_kernel,
                types={
                    **_matrices(f32, "averages", "logsums", "average", "logsum"),
                    **dict.fromkeys(("n", "splits"), "i32"),
                },
                options={"num_warps": gather.pop("num_warps")},
                constants={**shared, **gather},
            )
        tiles = _prototypes_swept.TILES[kind][dim]
        yield Case(
            name=f"push {name}",
            kernel=_prototypes_kernel.push_prototypes_kernel,
            types={
                **_matrices(dtype, "student", "teacher", "values", "prototypes", "its_prototypes", "gradient"),
                **_matrices(f32, "student_logsums", "teacher_logsums", "shift", "factor"),
                **(_matrices(f32, "shares") if in_pairs else {}),
                "temperature": number,
                **dict.fromkeys(("n", "m", "size"), "i32"),
            },
            constants={
                **shared,
                **product,
                **({} if in_pairs else {"shares_ptr": None}),
                **{"BLOCK_K": tiles.block_k, "BLOCK_N": tiles.block_n, "BOOST": 10 if dtype == f16 else 0},
            },
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
        )


CASES: list[Callable[[], Iterable[Case]]] = [
    ema_cases, optim_cases, contrastive_cases, wide_cases, prototype_cases, view_cases,
]  # fmt: skip


def _names(*dtypes: Any) -> list[Any]:
    from fastrm.kernels.multi_tensor import DTYPES

    return [DTYPES[dtype] for dtype in dtypes]


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")


def _plus(shadow: Any) -> str:
    return f" + shadow {_short(shadow)}" if shadow else ""


def _triton(dtype: Any) -> str:
    return {"f32": "fp32", "f64": "fp64", "f16": "fp16", "bf16": "bf16"}[_short(dtype)]


def _matrices(dtype: Any, *names: str) -> dict[str, str]:
    """The types of pointers to matrices."""
    return {f"{name}_ptr": f"*{_triton(dtype)}" for name in names}
