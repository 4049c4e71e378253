"""The checkpoints that a run resumes from.

``checkpoint.pt`` is the newest, ``checkpoint-STEP.pt`` are those before it. A new one is written beside them and takes
its name when it is safely on the disk; whatever happens in between, a whole one is there.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastrm.data.inventory import Inventory
from fastrm.errors import TrainingError, UsageError
from fastrm.files import load_tensors, write_whole
from fastrm.machine.distributed import gather_objects, world
from fastrm.machine.memory import exhausted
from fastrm.settings.config import Config, flag

NAME = "checkpoint.pt"
FORMAT = 3
CONTENT = {"config": dict, "step": int, "random": list, "method": dict}

# Settings that may differ between a run and its continuation, since they do not change what is learned.
FREE_ON_RESUME = frozenset(
    {"max_steps", "log_every", "profile", "eval_every", "checkpoint_every", "keep", "keep_every", "keep_best"}
    | {"verify_every", "log_to"}
    | {"out", "resume", "recipe", "device", "compile", "cuda_graph", "channels_last", "kernels", "loader", "scan"}
    | {"workers", "data", "data_root", "allow_changed_data", "dry_run"}  # of the images their inventory is compared
)


class Stateful(Protocol):
    """Modules, optimizers and scalers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state over."""


def older(out: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints before the newest, the latest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pt", path.name), path) for path in out.glob("checkpoint-*.pt"))
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def own(out: Path) -> list[Path]:
    """The checkpoints in a run folder, the newest first."""
    return [file for file in (out / NAME, *(file for _, file in older(out))) if file.is_file()]


def locate(path: Path) -> Path:
    """Return the checkpoint that a run folder, for which it is the newest, or a file stands for.

    Raises:
        UsageError: there is none.
    """
    if path.is_dir():
        if not (found := own(path)):
            raise UsageError(f"{path} has no {NAME}")
        return found[0]
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only plain data is read: no code in the file can run.

    Raises:
        UsageError: there is no such file, or it is damaged or not a checkpoint of fastrm.
    """
    found = locate(path)
    state = load_tensors(found)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"{found} is not a checkpoint of this version of fastrm")
    wrong = [name for name, kind in CONTENT.items() if not isinstance(state.get(name), kind)]
    if wrong or state["step"] < 0:
        raise UsageError(f"{found} is damaged: it has no sound {wrong[0] if wrong else 'step'!r}")
    if state.pop("checksum", None) != checksum(state):
        raise UsageError(f"{found} is damaged: its checksum is not that of its content")
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Say in one line that what a checkpoint holds is not what its settings build."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if exhausted(error):
            raise
        raise UsageError(f"{path} does not fit its own settings: {str(error).splitlines()[0]}") from None


def checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a checkpoint, by name, in order."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                digest.update(repr(name).encode())
                add(inner)
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for inner in value:
                add(inner)
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()


def _copied(value: Any) -> Any:
    """A copy on the CPU of what training goes on to change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value


class Checkpoints:
    """The checkpoints of a run folder; written in the background, so that a step waits for a copy in memory at most.

    Args:
        out: the run folder.
        config: settings of the run, resolved. ``keep`` checkpoints stay, the newest among them, and besides all whose
            step is a multiple of ``keep_every``.
        start: the step that the newest one in the folder is of; 0 without one.
        parts: what has a state, by name.
    """

    def __init__(self, out: Path, config: Config, start: int, **parts: Stateful) -> None:
        self.out, self.config, self.parts = out, config, parts
        self.newest = start
        self._writer: threading.Thread | None = None
        self._fault: BaseException | None = None

    def save(self, step: int) -> None:
        """Save all that an exact resume needs; to be called in all processes.

        Loaders need nothing: their batches follow from the seed and the step.

        Raises:
            TrainingError: the checkpoint before this could not be written.
        """
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        everyone = gather_objects(random)
        if world().rank:
            return
        self.wait()
        states = {name: _copied(part.state_dict()) for name, part in self.parts.items()}
        state = {"format": FORMAT, "config": self.config.flat(), "step": step, "random": everyone, **states}
        self._writer = threading.Thread(target=self._write, args=(step, state), name="checkpoint")
        self._writer.start()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            state["checksum"] = checksum(state)
            write_whole(self.out / NAME, lambda partial: torch.save(state, partial), before=self._rotate)
            self.newest = step
            self._prune()
        except BaseException as error:
            self._fault = error

    def _rotate(self) -> None:
        """Give the newest the name of one before, when the next is whole."""
        name = self.out / f"checkpoint-{self.newest}.pt"
        # Where the name is taken, the run went on from there, since what is called the newest is damaged.
        if self.newest and (self.out / NAME).is_file() and not name.exists():
            os.replace(self.out / NAME, name)

    def _prune(self) -> None:
        every = self.config.run.keep_every
        for step, path in older(self.out)[self.config.run.keep - 1 :]:
            if every is None or step % every:
                path.unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

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
                f"the checkpoint {self.out / NAME} cannot be written: {reason}; what was saved before stays, and the "
                "same command continues from there"
            )

    def close(self) -> None:
        """Wait, and leave faults unsaid: another error is on its way."""
        if self._writer is not None:
            self._writer.join()


def origin(config: Config, out: Path) -> Path:
    """The run folder that a run with these settings goes on from."""
    return out if config.run.resume in ("auto", "never") else locate(Path(config.run.resume)).parent


class Start(NamedTuple):
    """Where a run goes on."""

    step: int
    """Steps that are done."""
    images: Inventory
    """What is trained on, at its place in the run."""
    note: str = ""
    """What is to be said of the images; empty if they are those of the checkpoint."""


def resume(config: Config, out: Path, images: Inventory, **parts: Stateful) -> Start:
    """Load the checkpoint that ``--resume`` asks for into ``parts`` and say where the run goes on; at 0 without one.

    With ``auto`` a damaged newest checkpoint is passed over, with a notice, for the one before it.

    Raises:
        UsageError: there is no such checkpoint, all are damaged, it is of a run with other settings, or of one on other
            images and ``--allow-changed-data`` is not given.
    """
    wish, there = config.run.resume, own(out)
    if wish == "never" or (wish == "auto" and not there):
        return Start(0, images)
    if wish == "auto":
        path, state = _first_sound(there)
    else:
        path = locate(Path(wish))
        if there and not any(file.samefile(path) for file in there):
            raise UsageError(f"--resume {wish} would overwrite the run in --out {out}; choose another --out")
        state = load(path)
    then, now = state["config"], config.flat()
    free = FREE_ON_RESUME if "images" in state or config.run.allow_changed_data else FREE_ON_RESUME - {"data"}
    changed = [name for name in now if name not in free and then.get(name) != now[name]]
    if "data" in changed and _same_file(then["data"], now["data"]):
        changed.remove("data")
    if changed:
        differences = "; ".join(f"{flag(name)} was {then.get(name)}, is {now[name]}" for name in changed)
        raise UsageError(f"{path} is of other settings: {differences}. Use its own, another --out, or --resume never")
    if (processes := len(state["random"])) != world().size:
        raise UsageError(
            f"{path} is of a run in {processes} processes, and these are {world().size}: every batch would be another "
            "one. Start as many, or give another --out"
        )
    start = _compared(path, state, config, images)
    with fitting(path):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        random = state["random"][world().rank]
        torch.set_rng_state(random["cpu"])
        if torch.cuda.is_available() and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
    return start


def _same_file(then: object, now: str) -> bool:
    try:
        return os.path.samefile(str(then), now)
    except (OSError, ValueError):
        return False


def _compared(path: Path, state: Mapping[str, Any], config: Config, images: Inventory) -> Start:
    """Hold the images against those of a checkpoint."""
    step: int = state["step"]
    if "images" not in state:
        return Start(step, images, f"{path.name} is of an older version: whether the images are the same is not known")
    with fitting(path):
        images, difference = images.continued(state["images"], step)
    if not difference:
        return Start(step, images)
    if not config.run.allow_changed_data:
        raise UsageError(
            f"{path} is of a run on other images than --data {config.input.data}: {difference}. Bring them back, give "
            "another --out, or --allow-changed-data, which starts the next epoch with those of now"
        )
    epoch = (step + images.shift) // images.steps_per_epoch
    return Start(step, images, f"other images from epoch {epoch} on: {difference}")


def _first_sound(files: list[Path]) -> tuple[Path, dict[str, Any]]:
    """The newest of a run's checkpoints that can be read."""
    for path, before in zip(files, [*files[1:], None], strict=True):
        try:
            return path, load(path)
        except UsageError as error:
            if before is None:
                raise
            if world().rank == 0:
                print(f"notice     {error}; going on from {before.name}")
    raise AssertionError("unreachable: the last one is returned or raised")
