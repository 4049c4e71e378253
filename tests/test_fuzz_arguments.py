"""Arguments of the wrong kind: every public operation raises a ValueError or TypeError that names one, and writes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrm.kernels import (
    EMA,
    FeatureQueue,
    enqueue_,
    fused_ema_,
    info_nce,
    prototype_cross_entropy,
    residual_info_nce,
    residual_loss,
)


def rows(*shape: int) -> Tensor:
    """Normally distributed float32 numbers of this shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def contrast() -> dict[str, Any]:
    """Valid arguments of info_nce."""
    return {"query": rows(3, 4), "key": rows(3, 4), "queue": rows(6, 4), "temperature": 0.2, "key_offset": 0,
            "backend": None}  # fmt: skip


def averaged() -> dict[str, Any]:
    """Valid arguments of fused_ema_."""
    return {"teacher": [rows(3, 4)], "student": [rows(3, 4)], "shadow": [rows(3, 4)], "momentum": 0.9, "backend": None}


def prepared(momentum: Any, **lists: Any) -> None:
    """Prepare an EMA and update it once."""
    EMA(**lists).update_(momentum)


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "fused_ema_": (fused_ema_, averaged),
    "EMA": (prepared, averaged),
    "info_nce": (info_nce, lambda: contrast() | {"reduction": "mean"}),
    "residual_loss": (
        residual_loss, lambda: {"student": rows(3, 4), "teacher": rows(3, 4), "reduction": "mean", "backend": None},
    ),
    "residual_info_nce": (
        residual_info_nce, lambda: contrast() | {"same_view_key": rows(3, 4), "pointer": torch.tensor(2),
                                                 "push": rows(2, 4), "residual_weight": 1.0, "contrastive_weight": 1.0},
    ),
    "prototype_cross_entropy": (
        prototype_cross_entropy, lambda: {"student": rows(3, 4), "teacher": rows(2, 4), "prototypes": rows(6, 4),
                                          "center": rows(6), "student_temperature": 0.1, "teacher_temperature": 0.04,
                                          "pairs": torch.tensor([[0, 1], [2, 0]]), "teacher_prototypes": rows(6, 4),
                                          "backend": None},
    ),
    "enqueue_": (
        enqueue_, lambda: {"queue": rows(6, 4), "pointer": torch.tensor(5), "keys": rows(2, 4), "skip": torch.zeros(1),
                           "backend": None},
    ),
    "FeatureQueue": (FeatureQueue, lambda: {"size": 3, "dim": 2, "dtype": torch.float32}),
}  # fmt: skip

HOSTILE: dict[str, Any] = {
    "None": None, "text": "x", "no text": "", "a list": [], "a list of text": ["x"], "a dict": {},
    "an object": object(),
    "True": True, "0": 0, "-1": -1, "1.5": 1.5, "nan": float("nan"), "inf": float("inf"), "2**63": 2**63,
    "10**400": 10**400, "complex": 1j, "a dtype": torch.int8,
    "0-d": torch.tensor(0.5), "0-d int": torch.tensor(1), "0-d complex": torch.tensor(1j), "1-d": rows(4),
    "3-d": rows(3, 4, 1), "narrow": rows(3, 1), "ints": rows(3, 4).int(), "bools": rows(3, 4) > 0,
    "complexes": torch.complex(rows(3, 4), rows(3, 4)), "8 bits": rows(3, 4).to(torch.float8_e4m3fn),
    "sparse": rows(3, 4).to_sparse(), "meta": rows(3, 4).to("meta"), "requires grad": rows(3, 4).requires_grad_(),
    "negated": torch.complex(rows(3, 4), rows(3, 4)).conj().imag, "expanded": rows(1, 4).expand(3, 4),
    "a parameter": nn.Parameter(rows(3, 4)), "a module": nn.Linear(4, 3), "a generator": (rows(3, 4) for _ in range(1)),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data())
def test_one_argument_of_a_wrong_kind_is_accepted_or_named(operation: str, data: st.DataObject) -> None:
    run, make = OPERATIONS[operation]
    arguments = make()
    name = data.draw(st.sampled_from(sorted(arguments)))
    value = HOSTILE[data.draw(st.sampled_from(sorted(HOSTILE)))]
    in_a_list = isinstance(arguments[name], list) and data.draw(st.booleans())
    arguments[name] = [value] if in_a_list else value
    try:
        run(**arguments)
    except (ValueError, TypeError) as error:
        said = str(error)
    else:
        return
    assert any(word in said for word in arguments), said
    for key, given_ in make().items():
        if key != name:
            got = arguments[key]
            for old, now in zip(*(x if isinstance(x, list) else [x] for x in (given_, got)), strict=True):
                assert torch.equal(old, now) if isinstance(old, Tensor) else old == now
