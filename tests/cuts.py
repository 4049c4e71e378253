"""Tensors of random layouts for the fuzz tests. Each is cut out of a larger block, which shows stray writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.interpreted import INTERPRETED


def count(shape: tuple[int, ...]) -> int:
    """The number of elements of a tensor of this shape."""
    return int(np.prod(shape, dtype=int))


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = st.sampled_from([F32, BF16, F16, F64])
DIMS = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
SHAPES = st.lists(DIMS, max_size=4).map(tuple).filter(lambda shape: count(shape) < 3000)

# Each layout cuts a tensor of a shape out of a block, which has one dimension.
LAYOUTS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "plain": lambda block, shape: block[: count(shape)].view(shape),
    "shifted": lambda block, shape: block[3 : 3 + count(shape)].view(shape),  # not aligned to 16 bytes
    "transposed": lambda block, shape: block[: count(shape)].view(shape[::-1]).permute(tuple(range(len(shape)))[::-1]),
    "every other": lambda block, shape: block[: 2 * count(shape)].view(*shape[:-1], -1)[..., ::2]
    if count(shape) and shape else block[: count(shape)].view(shape),
    "channels last": lambda block, shape: block[: count(shape)].view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    if len(shape) > 2 else block[: count(shape)].view(shape),
    "expanded": lambda block, shape: block[: count(shape[1:])].view(shape[1:]).expand(shape) if shape else block[0],
    "windows": lambda block, shape: block.as_strided(shape, (1,) * len(shape)),
}  # fmt: skip
APART = ["plain", "shifted", "transposed", "every other", "channels last"]


def numpy(tensor: Tensor) -> oracle.Array:
    """A float64 NumPy copy of a tensor."""
    return tensor.detach().cpu().double().numpy().copy()


class Cut(NamedTuple):
    """A tensor, the one-dimensional block that it is cut out of, and the index of each of its elements in the block."""

    tensor: Tensor
    block: Tensor
    places: Tensor

    def overlaps(self) -> bool:
        """Whether two elements of the tensor share memory."""
        return len(self.places.unique()) < self.places.numel()


def cut(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int, device: torch.device) -> Cut:
    """A tensor of normally distributed numbers in the given layout."""
    size = 2 * count(tuple(max(n, 1) for n in shape)) + sum(shape) + 8
    block = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    places = LAYOUTS[layout](torch.arange(size), shape)
    return Cut(LAYOUTS[layout](block, shape), block, places)


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...], device: torch.device, layouts: Any = tuple(LAYOUTS)) -> Cut:
    """Draw a cut with a random dtype, layout and content."""
    return cut(shape, draw(DTYPES), draw(st.sampled_from(layouts)), draw(st.integers(0, 999)), device)


def attempt(run: Callable[[], Any], blocks: list[Tensor], *, refusable: bool, names: tuple[str, ...]) -> Any:
    """Return what ``run`` returns, or None if it raised ValueError or TypeError.

    An error is allowed only if ``refusable``; it must name one of ``names`` and leave all ``blocks`` unchanged.
    """
    before = [block.clone() for block in blocks]
    try:
        return run()
    except (ValueError, TypeError) as error:
        if not refusable:
            raise
        said = str(error)
    assert any(name in said for name in names), said
    assert all(torch.equal(block, old) for block, old in zip(blocks, before, strict=True))
    return None


def assert_only_written(written: Iterable[Cut], blocks: list[Tensor], before: list[Tensor]) -> None:
    """Assert that no elements of the blocks have changed except those of ``written``."""
    for block, old in zip(blocks, before, strict=True):
        untouched = torch.ones(len(block), dtype=torch.bool, device=block.device)
        for other in written:
            if other.block is block:
                untouched[other.places.flatten()] = False
        assert torch.equal(block[untouched], old[untouched])


def stored(dtype: torch.dtype) -> float:
    """Relative error of storing a number in ``dtype``. The interpreter truncates bfloat16, which doubles the error."""
    return torch.finfo(dtype).eps * (1 if INTERPRETED else 0.5)


def close(got: Tensor, want: oracle.Array, slack: Any) -> None:
    """Assert that ``got`` equals ``want`` within the rounding of its dtype, float16's denormals, and ``slack``."""
    bound = stored(got.dtype) * np.abs(want) + 6e-8 * (got.dtype == F16) + slack
    assert got.shape == want.shape
    assert (np.abs(numpy(got) - want) <= bound).all(), np.abs(numpy(got) - want).max()


def computed(*dtypes: torch.dtype) -> float:
    """Machine epsilon of the dtype in which an operation on ``dtypes`` computes: float64 if one of them is, else
    float32.
    """
    return torch.finfo(F64 if F64 in dtypes else F32).eps
