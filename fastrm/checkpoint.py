"""The checkpoint that a run resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from fastrm.config import Config, flag
from fastrm.distributed import gather_objects, world
from fastrm.errors import UsageError
from fastrm.files import load_tensors, write_whole

NAME = "checkpoint.pt"
FORMAT = 2
CONTENT = {"config": dict, "step": int, "random": list, "method": dict}

# Settings that may differ between a run and its continuation, since they do not change what is learned.
FREE_ON_RESUME = frozenset(
    {"max_steps", "log_every", "profile", "eval_every", "checkpoint_every", "out", "resume", "recipe"}
    | {"device", "compile", "cuda_graph", "channels_last", "kernels", "loader", "scan", "workers", "data_root"}
)


class Stateful(Protocol):
    """Modules, optimizers and scalers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state over."""


def locate(path: Path) -> Path:
    """Return the checkpoint that a run folder or a file stands for.

    Raises:
        UsageError: there is none.
    """
    found = path / NAME if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"{path} has no {NAME}" if path.is_dir() else f"{path} does not exist")
    return found


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
    return state


def save(out: Path, config: Config, step: int, **parts: Stateful) -> None:
    """Write the checkpoint of a run folder, all that an exact resume needs; to be called in all processes.

    Loaders need nothing: their batches follow from the seed and the step.

    Args:
        out: the run folder.
        config: settings of the run, resolved.
        step: optimizer steps that are done.
        parts: what has a state, by name.
    """
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    everyone = gather_objects(random)
    if world().rank:
        return
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"format": FORMAT, "config": config.flat(), "step": step, "random": everyone, **states}
    write_whole(out / NAME, lambda partial: torch.save(state, partial))


def resume(config: Config, out: Path, **parts: Stateful) -> int:
    """Load the checkpoint that ``--resume`` asks for into ``parts`` and return the steps that are done; 0 without one.

    Raises:
        UsageError: there is no such checkpoint, it is damaged, or it is of a run with other settings.
    """
    wish, own = config.run.resume, out / NAME
    if wish == "never" or (wish == "auto" and not own.is_file()):
        return 0
    path = own if wish == "auto" else locate(Path(wish))
    if own.is_file() and not own.samefile(path):
        raise UsageError(f"--resume {wish} would overwrite the run in --out {out}; choose another --out")
    state = load(path)
    then, now = state["config"], config.flat()
    changed = [name for name in now if name not in FREE_ON_RESUME and then.get(name) != now[name]]
    if changed:
        differences = "; ".join(f"{flag(name)} was {then.get(name)}, is {now[name]}" for name in changed)
        raise UsageError(f"{path} is of other settings: {differences}. Use its own, another --out, or --resume never")
    if (processes := len(state["random"])) != world().size:
        raise UsageError(
            f"{path} is of a run in {processes} processes, and these are {world().size}: every batch would be another "
            "one. Start as many, or give another --out"
        )
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        random = state["random"][world().rank]
        torch.set_rng_state(random["cpu"])
        if torch.cuda.is_available() and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} does not fit its own settings: {str(error).splitlines()[0]}") from None
    step: int = state["step"]
    return step
