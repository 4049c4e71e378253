"""Writes checkpoints in the background, atomically, and removes the oldest."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrm.errors import TrainingError
from fastrm.files import read_json, save_tensors, write_json, write_whole
from fastrm.machine.distributed import gather_objects, world
from fastrm.own import BEST, BEST_SCORE, MARK
from fastrm.run.checkpoint import FORMAT, NAME, checksum, older
from fastrm.version import __version__


class Stateful(Protocol):
    """Objects with a state: modules, optimizers and scalers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restore a state."""


class Saver:
    """The checkpoints of a run folder. They are written in the background; a step waits only for a copy in memory.

    Args:
        out: the run folder.
        parts: objects with a state, by name.
        keep: number of newest checkpoints to keep.
        keep_every: also keep all whose step is a multiple of this.
        before: called before each checkpoint, in the first process.
    """

    def __init__(
        self,
        out: Path,
        parts: dict[str, Stateful],
        *,
        keep: int,
        keep_every: int | None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self.out, self.parts, self.keep, self.keep_every, self.before = out, parts, keep, keep_every, before
        self.same: dict[str, Any] = {}
        self.newest = 0
        self._writer: threading.Thread | None = None
        self._fault: BaseException | None = None

    def describe(self, step: int, settings: dict[str, Any], images: Stateful, **about: dict[str, Any] | None) -> None:
        """Set the content that all following checkpoints share.

        Args:
            step: step of the newest checkpoint in the folder; 0 without one.
            settings: resolved settings of the run, by name.
            images: the training images.
            about: ``pixels``, the format of the images, and ``augmentation``, both from their method ``plain``.
        """
        self.newest, self.parts["images"] = step, images
        self.same = {"config": settings, **about}

    def save(self, step: int) -> Path:
        """Save the state for an exact resume, and return the path. Call this in all processes.

        Loaders have no state: their batches follow from the seed and the step.

        Raises:
            TrainingError: the previous checkpoint could not be written.
        """
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        everyone = gather_objects(random)
        if world().rank:
            return self.out / NAME
        self.wait()
        self.before()
        states = {name: _copied(part.state_dict()) for name, part in self.parts.items()}
        state = {"format": FORMAT, **self.same, "step": step, "random": everyone, **states}
        self._writer = threading.Thread(target=self._write, args=(step, state), name="checkpoint")
        self._writer.start()
        return self.out / NAME

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            state["checksum"] = checksum(state)
            write_whole(self.out / NAME, lambda partial: save_tensors(state, partial), before=self._rotate)
            self.newest = step
            self._prune()
        except BaseException as error:
            self._fault = error

    def _rotate(self) -> None:
        """Rename the newest checkpoint to an earlier one, when the next is complete."""
        name = self.out / f"checkpoint-{self.newest}.pt"
        # If the name exists, the run continued from that file because the newest was damaged.
        if self.newest and (self.out / NAME).is_file() and not name.exists():
            os.replace(self.out / NAME, name)

    def _prune(self) -> None:
        for step, path in older(self.out)[self.keep - 1 :]:
            if self.keep_every is None or step % self.keep_every:
                path.unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait until the saved checkpoint is on the disk.

        Raises:
            TrainingError: it could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if (fault := self._fault) is not None:
            self._fault = None
            reason = getattr(fault, "strerror", None) or (str(fault).splitlines() or [type(fault).__name__])[0]
            raise TrainingError(
                f"the checkpoint {self.out / NAME} cannot be written: {reason}; what was saved before is kept, and the "
                "same command continues from there"
            )

    def keep_best(self, step: int, score: str, value: float) -> None:
        """Keep the last saved checkpoint as the best one, unless an earlier one has a better score.

        Args:
            step: step of the checkpoint.
            score: name of the score.
            value: value of the score; higher is better.
        """
        self.wait()
        best = self.out / BEST_SCORE
        if best.is_file():
            then = read_json(best)
            if then["score"] == score and then["value"] >= value and (self.out / BEST).is_file():
                return
        write_whole(self.out / BEST, lambda partial: _same(self.out / NAME, partial))
        write_json(best, {MARK: __version__, "step": step, "score": score, "value": value})

    def close(self) -> None:
        """Wait, and ignore errors, because another error is being raised."""
        if self._writer is not None:
            self._writer.join()


def _same(file: Path, name: Path) -> None:
    """Link a file to a second name, or copy it if the file system has no links."""
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def _copied(value: Any) -> Any:
    """A copy on the CPU of values that training will change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value
