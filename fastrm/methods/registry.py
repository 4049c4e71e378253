"""The registry of methods by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from fastrm.errors import UsageError
from fastrm.methods.base import Method

M = TypeVar("M", bound=type[Method[Any]])

_METHODS: dict[str, type[Method[Any]]] = {}


def register(name: str) -> Callable[[M], M]:
    """Register a subclass of :class:`Method` under a name for ``--method`` and ``method=``.

    >>> @register("mine")  # doctest: +SKIP
    ... class Mine(Method): ...

    A class that is defined again, for example in a notebook, replaces the earlier one.

    Raises:
        UsageError: the name is invalid, another class has this name or one of its recipes' names, or the class is not
            a subclass of Method.
    """

    def add(kind: M) -> M:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"--method {name!r:.80} is not a valid name; it must consist of letters, digits and - _ .")
        if not (isinstance(kind, type) and issubclass(kind, Method)):
            raise UsageError(f"--method {name} is given {kind!r:.80}; it must be a subclass of fastrm.methods.Method")
        for other in _METHODS.values():
            again = (other.__module__, other.__qualname__) == (kind.__module__, kind.__qualname__)
            if other.name == name and not again:
                raise UsageError(f"--method {name} is {other.__module__}.{other.__qualname__}; choose another name")
            if taken := [] if again else sorted(_own_recipes(other).keys() & _own_recipes(kind).keys()):
                raise UsageError(f"--recipe {taken[0]} is one of --method {other.name}; choose another name")
        kind.name = name
        _METHODS[name] = kind
        return kind

    return add


def names() -> list[str]:
    """All names; the first is the default method."""
    return list(_METHODS)


def find(method: str | type[Method[Any]]) -> type[Method[Any]]:
    """Return the method with a name; a subclass of Method is returned as it is.

    Raises:
        UsageError: no method has this name.
    """
    if isinstance(method, type) and issubclass(method, Method):
        return method
    if isinstance(method, str) and method in _METHODS:
        return _METHODS[method]
    raise UsageError(
        f"--method {str(method)[:80]} is unknown; choose one of {', '.join(_METHODS)}; import the module of your "
        "own method first, so that it is registered"
    )


def recipes() -> dict[str, dict[str, Any]]:
    """The published settings of all methods, by the names of ``--recipe``."""
    return {
        name: {"method": kind.name, **values}
        for kind in _METHODS.values()
        for name, values in _own_recipes(kind).items()
    }


def _own_recipes(kind: type[Method[Any]]) -> dict[str, Any]:
    """The recipes that a class defines itself, without inherited ones."""
    return dict(vars(kind).get("recipes", {}))
