"""Seeds the global random generators around user code, and restores them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed torch's (CPU), NumPy's and Python's global generators for an image, and restore their states afterwards.

    The numbers depend only on the three arguments, not on the loader process or on earlier numbers.
    """
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    words = np.random.SeedSequence((seed, epoch, index)).generate_state(6, np.uint64)
    torch.default_generator.manual_seed(int(words[0]))  # torch.manual_seed would change the GPUs' generators too
    np.random.seed(words[1:3].view(np.uint32))
    random.seed(words[3:].tobytes())
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
