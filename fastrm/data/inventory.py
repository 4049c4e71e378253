"""The list of training images in checkpoints, with which a resumed run is compared."""

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
    """The training images in their order, on which each batch depends."""

    hashes: Tensor
    """Hashes of the name (from the root of the data) and size of each image, or of its pixels for arrays, int64 [N]."""
    left_out: int
    """Number of broken files that were left out."""
    steps_per_epoch: int
    shift: int = 0
    """Offset between the position in the epochs and the steps of the run; 0 unless the list has changed."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the list of a checkpoint is compared with this one, and does not replace it."""

    def continued(self, then: Mapping[str, Any], step: int) -> tuple[Inventory, str]:
        """Continue from the list ``then`` of a checkpoint after ``step`` steps.

        Returns:
            This list at its position in the run, and a description of the differences; empty if there are none. A list
            that differs, or is read in other batches, starts at the next whole epoch, so that epochs never count
            backwards.
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
    """Build the list of the training images; ``hashes`` are their hashes, if known."""
    own = torch.from_numpy(np.array(images.hashes() if hashes is None else hashes))  # the index is read-only
    return Inventory(hashes=own, left_out=left_out, steps_per_epoch=steps_per_epoch)
