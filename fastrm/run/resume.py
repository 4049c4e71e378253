"""Finds the checkpoint for ``--resume``, and compares it with the current settings and images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from fastrm.data import Augmentation
from fastrm.data.inventory import Inventory
from fastrm.errors import UsageError
from fastrm.machine.distributed import world
from fastrm.run.checkpoint import fitting, load, locate, own
from fastrm.run.saver import Stateful
from fastrm.settings.config import Config, flag

# Settings that may differ between a run and its continuation, because they do not change the result.
FREE_ON_RESUME = frozenset(
    {"max_steps", "log_every", "profile", "eval_every", "eval_images", "verify_every", "log_to", "export"}
    | {"checkpoint_every", "checkpoint_minutes", "keep", "keep_every", "keep_best"}
    | {"out", "resume", "recipe", "device", "compile", "cuda_graph", "channels_last", "kernels", "loader", "scan"}
    | {"checkpoint_activations", "workers", "allow_changed_data", "dry_run"}
    | {"data", "data_root", "image_column", "label_column"}  # the inventory of the images is compared instead
    | {"augmentation"}  # every number of its views is compared instead
)

OLD_ONLINE = "fastrm.hooks.online.Online"
"""The hook whose state is stored as ``online`` in checkpoints from before there were hooks."""


def origin(wish: str, out: Path) -> Path:
    """The run folder that a run with this ``--resume`` continues from."""
    return out if wish in ("auto", "never") else locate(Path(wish)).parent


class Start(NamedTuple):
    """Where a run starts or continues."""

    step: int
    """Number of steps so far."""
    images: Inventory
    """The training images, with the position in the run."""
    notes: tuple[str, ...] = ()
    """Messages for the user, one sentence each."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """Settings that replace the given ones, such as the warm-up of an extended run."""


def resume(
    now: Mapping[str, Any],
    out: Path,
    images: Inventory,
    parts: Mapping[str, Stateful],
    augmentation: Augmentation | None = None,
) -> Start:
    """Load the checkpoint for ``--resume`` into ``parts``, and return the start of the run; step 0 without one.

    A finished run continues if it gets more epochs. With ``auto``, a damaged newest checkpoint is skipped with a
    notice.

    Args:
        now: resolved settings by name.
        out: the run folder.
        images: the training images.
        parts: objects with a state, by name.
        augmentation: augmentation; None for a callable, which is not compared.

    Raises:
        UsageError: there is no such checkpoint, all are damaged, or it is from a run with other settings, or with other
            images and without ``--allow-changed-data``.
    """
    wish, there = now["resume"], own(out)
    if wish == "never" or (wish == "auto" and not there):
        return Start(0, images)
    if wish == "auto":
        path, state = _first_sound(there)
    else:
        path = locate(Path(wish))
        if there and not any(file.samefile(path) for file in there):
            raise UsageError(f"--resume {wish} would overwrite the run in --out {out}; choose another --out")
        state = load(path)
    processes = len(state["random"])
    stays = _same_settings(path, state, now, images.steps_per_epoch, elastic=processes != world().size)
    _same_views(path, state, augmentation)
    start = _compared(path, state, now, images)._replace(settings=stays)
    if processes != world().size:
        start = start._replace(notes=(*start.notes, _elsewhere(state, now, start)))
    state.setdefault("hooks", {OLD_ONLINE: state["online"]} if "online" in state else {})
    with fitting(path):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        random = state["random"][world().rank % processes]
        torch.set_rng_state(random["cpu"])
        if torch.cuda.is_available() and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
    return start


def _same_settings(
    path: Path, state: Mapping[str, Any], now: Mapping[str, Any], steps_per_epoch: int, *, elastic: bool
) -> Mapping[str, Any]:
    """Compare the settings with those of a checkpoint, and return the settings of the checkpoint that stay in effect.

    If the number of processes differs (``elastic``), the batch size may differ too.
    """
    then = Config().flat() | state["config"]  # settings that are newer than the checkpoint
    free = FREE_ON_RESUME if "images" in state or now["allow_changed_data"] else FREE_ON_RESUME - {"data"}
    if "augmentation" not in state and not str(now["augmentation"]).startswith("<"):  # objects were not recorded
        free -= {"augmentation"}
    if elastic:
        free |= {"batch_size", "accumulate"}
    changed = {name for name in now if name not in free and then.get(name) != now[name]}
    changed -= {name for name in ("data", "init_from") if name in changed and _same_file(then[name], now[name])}
    longer = changed - {"warmup_epochs"} == {"epochs"} and now["epochs"] > then["epochs"]
    place = state["step"] + state.get("images", {}).get("shift", 0)
    if longer and place >= then["epochs"] * state.get("images", {}).get("steps_per_epoch", steps_per_epoch):
        return {"warmup_epochs": then["warmup_epochs"]}
    if changed:
        ordered = [name for name in now if name in changed]
        differences = "; ".join(f"{flag(name)} was {then.get(name)}, is {now[name]}" for name in ordered)
        hint = " (it can be extended once its own epochs are over)" if longer else ""
        raise UsageError(
            f"{path} has other settings: {differences}{hint}. Use its settings, another --out, or --resume never"
        )
    return {}


def _elsewhere(state: Mapping[str, Any], now: Mapping[str, Any], start: Start) -> str:
    """Describe the changes in a run that continues with another number of processes."""
    then, processes, size = state["config"], len(state["random"]), world().size
    words = f"the run used {processes} processes, and continues with {size}; their views differ from here on"
    changed = [name for name in ("batch_size", "accumulate") if now[name] != then[name]]
    if not changed:
        return f"{words}; --batch-size stays {now['batch_size']}, {now['batch_size'] // size} per process"
    parts = ", ".join(f"{flag(name)} was {then[name]}, is {now[name]}" for name in changed)
    epoch = (start.step + start.images.shift) / start.images.steps_per_epoch
    return f"{words}; {parts}: the run continues at epoch {epoch:g}, with the learning rate of the new batch"


def _same_views(path: Path, state: Mapping[str, Any], augmentation: Augmentation | None) -> None:
    """Compare the views with those of a checkpoint; older checkpoints have none."""
    if augmentation is None or state.get("augmentation") is None:
        return
    with fitting(path):
        difference = augmentation.difference(state["augmentation"])
    if difference:
        raise UsageError(
            f"{path} is from a run with other views: {difference}. Use its views (--augmentation "
            f"{path.parent}/config.json), another --out, or --resume never"
        )


def _same_file(then: object, now: str) -> bool:
    try:
        return os.path.samefile(str(then), now)
    except (OSError, ValueError):
        return False


def _compared(path: Path, state: Mapping[str, Any], now: Mapping[str, Any], images: Inventory) -> Start:
    """Compare the images with those of a checkpoint."""
    step: int = state["step"]
    if "images" not in state:
        note = f"{path.name} is from an older version: it does not say whether the images are the same"
        return Start(step, images, (note,))
    with fitting(path):
        images, difference = images.continued(state["images"], step)
    if not difference:
        return Start(step, images)
    if not now["allow_changed_data"]:
        raise UsageError(
            f"{path} is from a run on other images than --data {now['data']}: {difference}. Restore them, give "
            "another --out, or --allow-changed-data, which continues at the next epoch with the current images"
        )
    epoch = (step + images.shift) // images.steps_per_epoch
    return Start(step, images, (f"other images from epoch {epoch} on: {difference}",))


def _first_sound(files: list[Path]) -> tuple[Path, dict[str, Any]]:
    """The newest readable checkpoint of a run."""
    for path, before in zip(files, [*files[1:], None], strict=True):
        try:
            return path, load(path)
        except UsageError as error:
            if before is None:
                raise
            if world().rank == 0:
                print(f"notice     {error}; continuing from {before.name}")
    raise AssertionError("unreachable: the last one is returned or raised")
