"""The update of torch's AveragedModel in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ._seen import Places
from .dispatch import check_backend, check_scalar
from .ema import EMA, fused_ema_
from .sharding import all_plain


class _Average:
    """The function that :func:`ema_avg_fn` returns."""

    def __init__(self, momentum: float | Tensor, backend: str | None) -> None:
        check_scalar("ema_avg_fn", "momentum", momentum, low=0, high=1)
        check_backend("ema_avg_fn", backend)
        self.momentum, self.backend = momentum, backend
        self._prepared: dict[tuple[Any, ...], tuple[Places, EMA]] = {}

    def __call__(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: object = None) -> None:
        if not all_plain([*averaged, *current]):
            return fused_ema_(averaged, current, self.momentum, backend=self.backend)
        # AveragedModel passes new aliases of the same memory each time, so a group is identified by its addresses.
        tensors = [*averaged, *current]
        group = (len(averaged), *((averaged[0].device, averaged[0].dtype) if averaged else ()))
        known = self._prepared.get(group)
        if known is None or not known[0].fit(tensors):
            made = EMA(averaged, current, backend=self.backend)  # first, for its error on tensors without memory
            known = self._prepared[group] = Places(tensors), made
        known[1].update_(self.momentum)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}}  # so that copying the model does not copy its weights twice


def ema_avg_fn(momentum: float | Tensor, *, backend: str | None = None) -> Callable[..., None]:
    """Return a ``multi_avg_fn`` for :class:`torch.optim.swa_utils.AveragedModel` that averages in one pass.

        averaged = AveragedModel(model, multi_avg_fn=ema_avg_fn(0.999))

    It differs from torch's ``get_ema_multi_avg_fn`` for integer buffers, which ``use_buffers=True`` includes: they are
    copied, not averaged and truncated.

    Args:
        momentum: number from 0 to 1, or a 0-d tensor, whose value may change between updates and is not checked.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: as in :func:`fused_ema_`.
    """
    return _Average(momentum, backend)
