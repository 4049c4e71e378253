"""Objects that Python code passes instead of names: a Dataset, a module, a method, an augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastrm.data import Augmentation
from fastrm.errors import UsageError
from fastrm.methods import Method
from fastrm.models import module_name


@dataclass(frozen=True)
class Objects:
    """The objects that were passed instead of names; None where the settings have a name."""

    data: Any = None
    arch: nn.Module | None = None
    method: type[Method[Any]] | None = None
    augmentation: Augmentation | Callable[[Any], Sequence[Any]] | None = None


def named(data: Any, arch: Any, method: Any, augmentation: Any) -> tuple[dict[str, Any], Objects]:
    """Separate names from objects; returns the settings by name, and the objects.

    Arguments that are None, except ``data``, are left out of the settings, so that the recipe or the default applies.

    Raises:
        UsageError: an argument has a type that cannot be used.
    """
    if data is None:
        raise UsageError("data is None; it must be a path, the name of a set, a Dataset, a list of paths, or an array")
    if isinstance(data, Path):
        data = str(data)
    if isinstance(arch, type) and issubclass(arch, nn.Module):
        raise UsageError(f"arch is the class {arch.__name__}; give an instance: {arch.__name__}()")
    if arch is not None and not isinstance(arch, str | nn.Module):
        raise UsageError(f"arch is a {type(arch).__name__}; it must be a timm name or an nn.Module")
    own = isinstance(method, type) and issubclass(method, Method)
    if method is not None and not own and not isinstance(method, str):
        given = f"the class {method.__name__}" if isinstance(method, type) else f"a {type(method).__name__}"
        raise UsageError(f"method is {given}; it must be a name or a subclass of fastrm.methods.Method")
    if isinstance(augmentation, type):
        raise UsageError(f"augmentation is the class {augmentation.__name__}; give an object of it")
    own_views = isinstance(augmentation, Augmentation) or callable(augmentation)
    if isinstance(augmentation, Path):
        augmentation = str(augmentation)
    if not (augmentation is None or isinstance(augmentation, str) or own_views):
        raise UsageError(
            f"augmentation is a {type(augmentation).__name__}; it must be a fastrm.data.Augmentation, a file with "
            "one, views and their sizes, such as 2x224,8x96, or a callable from one image to a tuple of views"
        )
    names = {
        "data": data if isinstance(data, str) else f"<{type(data).__name__}>",
        "arch": module_name(arch) if isinstance(arch, nn.Module) else arch,
        "method": method,
        "augmentation": f"<{type(augmentation).__name__}>" if own_views else augmentation,
    }
    objects = Objects(
        data=None if isinstance(data, str) else data,
        arch=arch if isinstance(arch, nn.Module) else None,
        method=method if own else None,
        augmentation=augmentation if own_views else None,
    )
    return {name: value for name, value in names.items() if value is not None}, objects
