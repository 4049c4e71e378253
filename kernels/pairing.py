"""Matches student and teacher tensors, and checks them before anything is written."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .dispatch import check_strided, check_writable
from .sharding import is_fake

Tensors = Iterable[Tensor] | nn.Module

# Name parts that wrappers add. Those of torch.compile, FullyShardedDataParallel, activation checkpointing and Fabric
# are unique; that of DistributedDataParallel and others may also be a part of the network.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_OUTER = "module"


def _plain_names(op: str, argument: str, module: nn.Module, dropped: frozenset[str]) -> dict[str, Tensor]:
    """Parameters by name, without the name parts ``dropped``."""
    named: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        plain = name
        if any(wrapper in name for wrapper in dropped):
            plain = ".".join(part for part in name.split(".") if part not in dropped)
        if plain in named:
            raise ValueError(f"{op}: {argument} has two parameters named {plain!r} once wrappers are ignored")
        named[plain] = parameter
    return named


def _outermost(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, without a leading ``module.`` that all of them share."""
    start = f"{_OUTER}."
    while named and all(name.startswith(start) for name in named):
        named = {name[len(start) :]: parameter for name, parameter in named.items()}
    return named


def _match(op: str, teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of both, matched by name after removing as few wrapper names as necessary."""
    ours, theirs = (
        _outermost(_plain_names(op, name, module, _WRAPPERS))
        for name, module in (("teacher", teacher), ("student", student))
    )
    if ours.keys() != theirs.keys():
        everything = _WRAPPERS | {_OUTER}
        ours, theirs = (
            _plain_names(op, name, module, everything) for name, module in (("teacher", teacher), ("student", student))
        )
    if ours.keys() != theirs.keys():
        only = {
            name: sorted(left)[:5]
            for name, left in (("teacher", ours.keys() - theirs.keys()), ("student", theirs.keys() - ours.keys()))
            if left
        }
        raise ValueError(f"{op}: parameters without a partner: {only}; teacher and student must match")
    return list(ours.values()), [theirs[name] for name in ours]


def listed(op: str, argument: str, tensors: Iterable[Any] | nn.Module) -> list[Any]:
    """``tensors`` as a list; :func:`check` checks its content."""
    if isinstance(tensors, (Tensor, nn.Module)) or not isinstance(tensors, Iterable):
        raise TypeError(f"{op}: {argument} is a {type(tensors).__name__}; it must be an iterable of tensors")
    # An empty list is a no-op, but the second use of one generator, as of model.parameters(), is a mistake.
    if isinstance(tensors, GeneratorType) and not torch.compiler.is_compiling() and tensors.gi_frame is None:
        raise ValueError(
            f"{op}: {argument} is a generator that is used up; pass a list, or a new generator at each call"
        )
    return list(tensors)


def _walked(module: nn.Module) -> tuple[list[object], list[Tensor]] | None:
    """The structure of a module, from which its parameter names follow, and the parameters; None for TorchScript."""
    built: list[object] = []
    parameters: list[Tensor] = []
    modules, known = [module], {id(None)}
    for each in modules:
        if id(each) not in known:
            known.add(id(each))
            own, children = each._parameters, each._modules
            if type(own) is not dict:
                return None
            if own:
                built += own
                parameters += own.values()  # type: ignore[arg-type]
            if children:
                built += children
                built += map(id, children.values())
                modules += children.values()  # type: ignore[arg-type]
            built.append(len(own))
    built += map(id, parameters)
    return built, parameters


# Per pair of modules: their structure when they were matched, and the positions of the pairs in it.
_MATCHES: dict[tuple[int, int], tuple[Any, ...]] = {}


def _pair_modules(op: str, teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of both, index by index, from a walk through both if their structure is unchanged."""
    compiling = torch.compiler.is_compiling()
    walk, other_walk = (None if compiling else _walked(module) for module in (teacher, student))
    if walk is None or other_walk is None:
        return _match(op, teacher, student)
    key = id(teacher), id(student)
    (built, ours), (as_built, theirs) = walk, other_walk
    match = _MATCHES.get(key)
    if match is not None and match[0] == built and match[1] == as_built:
        return taken(ours, match[2]), taken(theirs, match[3])
    pairs = _match(op, teacher, student)
    # Some classes, such as FullyShardedDataParallel, may list other parameters than they hold.
    usual = all(
        type(each).named_parameters is nn.Module.named_parameters
        and type(each).named_modules is nn.Module.named_modules
        for root in (teacher, student)
        for each in root.modules()
    )
    if usual:
        places = [{id(p): i for i, p in enumerate(walked)} for walked in (ours, theirs)]
        found = [[place[id(p)] for p in paired] for place, paired in zip(places, pairs, strict=True)]
        refs = [weakref.ref(root, lambda _: _MATCHES.pop(key, None)) for root in (teacher, student)]
        _MATCHES[key] = built, as_built, *found, refs
    return pairs


class Watched:
    """Two modules and all modules in them, to notice that their parameters are others than they were."""

    def __init__(self, *roots: nn.Module) -> None:
        self.roots = roots
        parts = [part for root in roots for part in root.modules()]
        # Not the empty ones, which are most of them: what gets its first parameter or part is rarely in a network.
        self._tables = [table for part in parts for table in (part._parameters, part._modules) if table]
        self._held = [*self._now()]

    def changed(self) -> bool:
        """Whether a module that has parameters, or parts, has others now."""
        same = sum(map(len, self._tables)) == len(self._held) and all(map(operator.is_, self._now(), self._held))
        return not same

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._tables))  # type: ignore[arg-type]


def watched(teacher: Tensors, student: Tensors) -> Watched | None:
    """Watches two modules; None for lists, and for TorchScript, whose tables are no dicts."""
    if not isinstance(teacher, nn.Module) or not isinstance(student, nn.Module):
        return None
    plain = all(type(part._parameters) is dict for root in (teacher, student) for part in root.modules())
    return Watched(teacher, student) if plain else None


def pair(op: str, teacher: Tensors, student: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Both as lists, index by index; modules are matched by parameter name."""
    if isinstance(teacher, nn.Module) and isinstance(student, nn.Module):
        return _pair_modules(op, teacher, student)
    return listed(op, "teacher", teacher), listed(op, "student", student)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """The memory region of ``tensor``; a state_dict lists a tied parameter as two tensors with one region."""
    if is_fake(tensor) or tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _check_alike(op: str, i: int, name: str, other: Tensor, teacher: Tensor) -> None:
    if other.shape != teacher.shape or other.device != teacher.device:
        raise ValueError(
            f"{op}: {name}[{i}] has shape {tuple(other.shape)} on {other.device}, but teacher[{i}] has "
            f"{tuple(teacher.shape)} on {teacher.device}; they must be alike"
        )


def _check_pair(op: str, i: int, teacher: Tensor, student: Tensor, shadow: Tensor | None) -> None:
    _check_alike(op, i, "student", student, teacher)
    if teacher.is_floating_point():
        fits = student.is_floating_point()
    else:
        fits = student.dtype == teacher.dtype
    if teacher.is_complex() or not fits:
        raise TypeError(
            f"{op}: teacher[{i}] is {teacher.dtype} and student[{i}] {student.dtype}; "
            "both must be floating, or both the same integer dtype"
        )
    if shadow is not None:
        _check_alike(op, i, "shadow", shadow, teacher)
        if shadow.is_floating_point() != teacher.is_floating_point():
            raise TypeError(f"{op}: shadow[{i}] is {shadow.dtype}, but teacher[{i}] is {teacher.dtype}")
    for name, written in (("teacher", teacher), ("shadow", shadow)):
        if written is not None:
            check_writable(op, f"{name}[{i}]", written)


class _Strided:
    """The memory layout of a tensor for NumPy, which never reads it, since it may be GPU memory."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        strides = tuple(stride * size for stride in tensor.stride())
        self.__array_interface__ = {
            "version": 3, "typestr": f"|V{size}", "data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape),
            "strides": strides,
        }  # fmt: skip


def _check_apart(op: str, kept: Sequence[int], lists: dict[str, Sequence[Tensor]]) -> None:
    """Raise if a written tensor shares memory with another one, unless both are the same region of one pair.

    A teacher may be its own student or its own shadow, which gives the same numbers in any order.
    """
    spans = []
    for name, tensors in lists.items():
        for i in kept:
            tensor = tensors[i]
            if not is_fake(tensor) and tensor.numel() and tensor.device.type != "meta":
                last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
                start = tensor.data_ptr()
                spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), name, i))
    spans.sort()
    earlier: list[tuple[str, int, int, str, int]] = []  # regions that extend beyond the start of the next
    for span in spans:
        device, start, _, name, i = span
        earlier = [other for other in earlier if other[0] == device and other[2] > start]
        for *_, other_name, j in earlier:
            names = {name, other_name}
            mine, other = lists[name][i], lists[other_name][j]
            partners = i == j and "teacher" in names and _place(mine) == _place(other)
            if names == {"student"} or partners:
                continue
            if np.shares_memory(np.asarray(_Strided(mine)), np.asarray(_Strided(other))):
                raise ValueError(
                    f"{op}: {name}[{i}] and {other_name}[{j}] overlap in memory, so that writing one would change the "
                    "other; copy one of them"
                )
        earlier.append(span)


def check(op: str, teacher: Sequence[Tensor], student: Sequence[Tensor], shadow: Sequence[Tensor] | None) -> list[int]:
    """Raise unless the lists pair up; return the indices to update, which leave out repeats of tied tensors."""
    for name, others in (("teacher", teacher), ("student", student), ("shadow", shadow or ())):
        for i, tensor in enumerate(others):
            check_strided(op, f"{name}[{i}]", tensor)
    for name, paired in (("student", student), ("shadow", shadow)):
        if paired is not None and len(paired) != len(teacher):
            raise ValueError(
                f"{op}: {len(paired)} {name} tensors for {len(teacher)} teacher tensors; they must pair up"
            )
    first_with: dict[tuple[object, ...], int] = {}
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        _check_pair(op, i, t, s, None if shadow is None else shadow[i])
        first = first_with.setdefault(_place(t), i)
        for name, partners in (("students", student), ("shadows", shadow)):
            if partners is not None and t.numel() and _place(partners[first]) != _place(partners[i]):
                raise ValueError(f"{op}: teacher[{first}] and teacher[{i}] are one tensor with two {name}")
    kept = list(first_with.values())
    _check_apart(op, kept, {"teacher": teacher, "student": student} | ({} if shadow is None else {"shadow": shadow}))
    return kept


def taken(tensors: Sequence[Tensor], indices: Iterable[int]) -> list[Tensor]:
    """The tensors at these indices of a list."""
    return [tensors[i] for i in indices]
