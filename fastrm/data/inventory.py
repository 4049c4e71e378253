"""The list of images that a run is trained on, as its checkpoints keep it: what a resumed run is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrm.data.sources import Images


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The images in their order, on which each batch depends."""

    hashes: Tensor
    """int64 [N]: of each image's name, from the top of the data on, and size; of arrays, of the pixels."""
    left_out: int
    """Files that were left out since they are broken."""
    steps_per_epoch: int
    shift: int = 0
    """Steps by which this list's place in its epochs is ahead of the run's steps; 0 unless the list has changed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: a checkpoint's list is compared with this one, and does not replace it."""

    def continued(self, then: Mapping[str, Any], step: int) -> tuple[Inventory, str]:
        """Go on from the list ``then`` of a checkpoint after ``step`` steps.

        Returns:
            This list at its place in the run, and in words how it differs from that one; empty if it does not. A list
            that differs, or is gone through in other batches, starts with the next whole epoch, so that epochs never
            count backwards.
        """
        old: Tensor = then["hashes"]
        next_epoch = -(-(step + int(then["shift"])) // int(then["steps_per_epoch"]))
        if torch.equal(old, self.hashes):
            if then["steps_per_epoch"] == self.steps_per_epoch:
                return replace(self, shift=int(then["shift"])), ""
            return replace(self, shift=next_epoch * self.steps_per_epoch - step), ""
        mine, theirs = self.hashes.numpy(), old.numpy()
        new, missing = len(np.setdiff1d(mine, theirs)), len(np.setdiff1d(theirs, mine))
        words = f"{len(old):,} images then, {len(self.hashes):,} now"
        words += f"; {new:,} new or changed, {missing:,} missing or changed" if new or missing else " in another order"
        if self.left_out != then["left_out"]:
            words += f"; {then['left_out']:,} files were left out as broken, and {self.left_out:,} are now"
        return replace(self, shift=next_epoch * self.steps_per_epoch - step), words


def inventory(
    images: Images, *, left_out: int, steps_per_epoch: int, hashes: NDArray[np.int64] | None = None
) -> Inventory:
    """Take the inventory of the images that a run is to be trained on; ``hashes`` are theirs, where they are known."""
    own = torch.from_numpy(np.array(images.hashes() if hashes is None else hashes))  # the index cannot be written to
    return Inventory(hashes=own, left_out=left_out, steps_per_epoch=steps_per_epoch)
