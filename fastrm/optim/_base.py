"""The base class of LARS, SGD and AdamW: the teacher update in the step, gradient scaling, and the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastrm.kernels import fused_ema_
from fastrm.kernels import optim as launches
from fastrm.kernels.dispatch import check_once, check_scalar, check_strided, choose
from fastrm.kernels.multi_tensor import capturing, launchable
from fastrm.kernels.pairing import check as check_pairs
from fastrm.kernels.pairing import listed
from fastrm.kernels.sharding import all_plain, local, localised
from fastrm.optim._loading import check_group, check_state
from fastrm.optim._tensors import check_held, dense, momentum_unless


class TeacherOptimizer(torch.optim.Optimizer):
    """An optimizer whose step can also average the parameters into a teacher.

    A subclass defines its rule in :meth:`_update`, and the inputs of its launch in :meth:`_state` and
    :meth:`_options`.

    Args:
        params, defaults: as in ``torch.optim.Optimizer``.
        teacher: tensors aligned with the parameters, in the order of the groups, with ``None`` for a parameter that
            has no counterpart (such as a predictor's); or ``None``.
        ema_momentum: teacher <- ema_momentum * teacher + (1 - ema_momentum) * parameter, after the parameters moved;
            a number or a 0-d tensor. Set ``optimizer.ema_momentum`` (or a group's value) to change it.
        shadow: low-precision copies of the teacher, written in the same pass, or ``None``.
        backend: as in fastrm.kernels.
    """

    _step_supports_amp_scaling = True  # a GradScaler hands over grad_scale and found_inf instead of waiting for them
    found_inf: Tensor | None = None
    """A tensor of one element. If it is not 0, a step changes nothing; on a GPU the host does not wait for its
    value."""
    _launch: type[launches.Launch]
    _buffers: frozenset[str]  # names of the state tensors of a parameter

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        teacher: Iterable[Tensor | None] | None,
        ema_momentum: float | Tensor | None,
        shadow: Iterable[Tensor | None] | None,
        backend: str | None,
    ) -> None:
        self._name = type(self).__name__
        self._teacher: dict[Tensor, Tensor] = {}
        self._shadow: dict[Tensor, Tensor] = {}
        self._backend = backend
        self._plan: list[Any] | None = None
        self._chosen: tuple[list[int], torch.device, Callable[..., None]] | None = None
        self._of_graphs: list[Any] = []
        super().__init__(params, {**defaults, "ema_momentum": ema_momentum})
        self._choose()
        if teacher is None:
            if shadow is not None or ema_momentum is not None:
                raise ValueError(f"{self._name}: shadow and ema_momentum need a teacher")
            return
        if any(group["ema_momentum"] is None for group in self.param_groups):
            raise ValueError(f"{self._name}: teacher needs ema_momentum, a number from 0 to 1 or a 0-d tensor")
        params = self._params()
        columns = [listed(self._name, "teacher", teacher)]
        if shadow is not None:
            columns.append(listed(self._name, "shadow", shadow))
        for name, column in zip(("teacher", "shadow"), columns, strict=False):
            if len(column) != len(params):
                raise ValueError(
                    f"{self._name}: {len(column)} {name} tensors for {len(params)} parameters; they must pair up, "
                    "with None for a parameter without one"
                )
        paired = [i for i, tensor in enumerate(columns[0]) if tensor is not None]
        students, teachers, *shadows = ([column[i] for i in paired] for column in (params, *columns))
        parts = localised(self._name, teachers, students, shadows[0] if shadows else None)
        if len(check_pairs(self._name, *parts)) != len(students):
            raise ValueError(f"{self._name}: teacher holds a tensor twice; each parameter needs its own")
        self._teacher = dict(zip(students, teachers, strict=True))
        self._shadow = dict(zip(students, shadows[0], strict=True)) if shadows else {}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Step ``params`` in plain PyTorch; ``grads`` may be changed."""
        raise NotImplementedError

    def _state(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> list[Tensor]:
        """The state of one parameter in the form that the launch takes; it is created if missing."""
        raise NotImplementedError

    def _keeps(self, group: dict[str, Any]) -> bool:
        """Whether the parameters of a group have a state."""
        return True

    def _options(self, group: dict[str, Any]) -> list[float | Tensor]:
        """The options of a group in the form that the launch takes, without the teacher's momentum, which comes
        last."""
        raise NotImplementedError

    @property
    def ema_momentum(self) -> float | Tensor | None:
        """The teacher's momentum in the first group. Setting it sets the momentum of all groups."""
        return self.param_groups[0]["ema_momentum"]

    @ema_momentum.setter
    def ema_momentum(self, value: float | Tensor) -> None:
        check_scalar(self._name, "ema_momentum", value, low=0, high=1)
        for group in self.param_groups:
            group["ema_momentum"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``, but an optimizer with a teacher takes no new groups."""
        if self._teacher:
            raise ValueError(f"{self._name}: no group can be added to an optimizer that has a teacher; make a new one")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["ema_momentum"] is not None:
            check_scalar(self._name, "ema_momentum", group["ema_momentum"], low=0, high=1)
        for param in group["params"]:
            check_strided(self._name, "a parameter", local(param))
            if not param.is_floating_point():
                raise TypeError(f"{self._name}: a parameter is {param.dtype}; it must be a floating dtype")
        self._check(group)
        self._plan = self._chosen = None

    def _check(self, group: dict[str, Any]) -> None:
        """Raise if a group's options are out of range."""
        check_scalar(self._name, "lr", group["lr"], low=0)
        check_scalar(self._name, "weight_decay", group["weight_decay"], low=0)

    def __getstate__(self) -> dict[str, Any]:
        ours = {k: self.__dict__[k] for k in ("_name", "_teacher", "_shadow", "_backend")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.keys() == {"state", "param_groups"}:
            self._check_loaded(**state)
        super().__setstate__(state)
        self._of_graphs = getattr(self, "_of_graphs", [])
        self._plan = self._chosen = None  # load_state_dict comes here too: the state is in other tensors now
        for group in self.param_groups:
            for name in self.defaults.keys() - {"differentiable"}:  # torch adds that one to the defaults by itself
                group.setdefault(name, self.defaults[name])

    def _check_loaded(self, state: dict[Any, Any], param_groups: list[dict[str, Any]]) -> None:
        """Raise unless the optimizer can continue exactly from the state that load_state_dict is about to set."""
        op = f"{self._name}.load_state_dict"
        needed = self.defaults.keys() - {"ema_momentum", "differentiable"}
        known = {"ema_momentum", "decoupled_weight_decay", "amsgrad"} if "betas" in needed else {"ema_momentum"}
        for i, (old, new) in enumerate(zip(self.param_groups, param_groups, strict=True)):
            check_group(op, f"param_groups[{i}]", new, needed, known | old.keys())
            self._check(new)
            if new.get("ema_momentum") is None:  # of an optimizer without a teacher
                new["ema_momentum"] = old["ema_momentum"]
            else:
                check_scalar(self._name, "ema_momentum", new["ema_momentum"], low=0, high=1)
        check_state(op, state, self._buffers, optional="dampening" in needed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, then the teacher. A step that a GradScaler skips changes neither.

        At learning rate 0, a step of an optimizer without state does not change the teacher: by such a step,
        torch.distributed.checkpoint makes the state of a new optimizer, and the teacher may be loaded already.

        Raises:
            RuntimeError: the groups lack a parameter that has a teacher, or the call may run more than once.
        """
        check_once(f"{self._name}.step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = self.found_inf if isinstance(self.found_inf, Tensor) else None  # a GradScaler may leave a number
        step, momenta = self._choose(), [group["ema_momentum"] for group in self.param_groups]
        for momentum in momenta if self._teacher else ():  # a group may have been given any
            check_scalar(self._name, "ema_momentum", momentum, low=0, high=1)
        if not self.state and not capturing() and all(group["lr"] == 0 for group in self.param_groups):
            self.ema_momentum = 1.0
        try:
            step(getattr(self, "grad_scale", None), found_inf)
        finally:
            for group, momentum in zip(self.param_groups, momenta, strict=True):
                group["ema_momentum"] = momentum
        return loss

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _choose(self) -> Callable[..., None]:
        """The step function; it is chosen again when the parameters are others, or on another device."""
        params = self._params()
        ids, first = [*map(id, params)], params[0].device if params else torch.device("cpu")
        if self._chosen is None or self._chosen[:2] != (ids, first):
            self._plan = None
            if gone := len(self._teacher.keys() - {*params}):
                raise RuntimeError(
                    f"{self._name}: {gone} of the {len(self._teacher)} parameters with a teacher are not in the groups "
                    "any more, as after a wrapper that replaces parameters; make the optimizer after it"
                )
            ways = {"triton": self._step_triton, "cpu": self._step_pytorch, "reference": self._step_pytorch}
            devices = {param.device.type: param.device for param in params} or {"": first}
            chosen = [choose(self._name, self._backend, ways, device) for device in devices.values()]
            plain = all_plain(params)
            if self._backend == "triton" and not plain:
                raise ValueError(f"{self._name}: backend='triton' cannot step DTensors or fake tensors; leave it out")
            self._chosen = ids, first, chosen[0] if plain and len(chosen) == 1 else self._step_pytorch
        return self._chosen[2]

    def _step_pytorch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if found_inf is not None and found_inf.item():
            return
        found = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        slopes = [dense(self._name, params) for params in found]  # all, before anything is written
        for group, params, own in zip(self.param_groups, found, slopes, strict=True):
            if params:
                grads = [local(grad) for grad in own]
                if grad_scale is not None:
                    grads = list(torch._foreach_div(grads, grad_scale.to(grads[0].device)))
                self._update(group, params, grads)
            self._average(group["params"], group["ema_momentum"])

    def _average(self, params: Sequence[Tensor], momentum: float | Tensor) -> None:
        params = [p for p in params if p in self._teacher]
        if params:
            shadow = [self._shadow[p] for p in params] if self._shadow else None
            fused_ema_([self._teacher[p] for p in params], params, momentum, shadow=shadow, backend=self._backend)

    def _step_triton(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        params = self._params()
        kinds = [(self._keeps(group), len(group["params"])) for group in self.param_groups]
        present = [kinds, *(param.grad is not None for param in params)]
        plan = self._plan
        if plan is None or plan[:2] != [present, self._state_ids()] or not all(step.lasts() for step, _ in plan[2]):
            if capturing():
                raise RuntimeError(
                    f"{self._name}: the first step with gradients for these parameters makes its state, which every "
                    "replay of a CUDA graph would make anew; step once before the capture"
                )
            steps, without_grad = self._prepare(grad_scale, found_inf)
            plan = self._plan = [present, self._state_ids(), steps, without_grad]
        if capturing():
            self._of_graphs.append(plan)  # the graph keeps reading its tables
        *_, steps, without_grad = plan
        momenta = [0.0 if group["ema_momentum"] is None else group["ema_momentum"] for group in self.param_groups]
        options = [[*self._options(group), m] for group, m in zip(self.param_groups, momenta, strict=True)]
        slopes = [dense(self._name, members) for _, members in steps]  # all, before anything is written
        for (step, _), grads in zip(steps, slopes, strict=True):
            step(grads, options, grad_scale, found_inf)
        for group, rest in zip(self.param_groups, without_grad, strict=True):
            if rest and self._teacher:
                self._average(rest, momentum_unless(found_inf, group["ema_momentum"], rest[0].device))

    def _state_ids(self) -> list[int]:
        """Identifies the tensors of the state, which others may clear or replace, for example to offload it."""
        return [*map(id, chain.from_iterable(map(dict.values, self.state.values())))]

    def _prepare(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> tuple[list[Any], list[list[Tensor]]]:
        """Launches for the parameters with a gradient, one per combination of dtypes, and the other parameters by
        group."""
        gathered: dict[tuple[Any, ...], list[Any]] = {}
        without_grad: list[list[Tensor]] = []
        for batch, group in enumerate(self.param_groups):
            without_grad.append([p for p in group["params"] if p.grad is None])
            for p in group["params"]:
                if p.grad is None:
                    continue
                partners = [x[p] for x in (self._teacher, self._shadow) if p in x]
                if not launchable(p, *partners):
                    raise TypeError(f"{self._name}: no kernel for {[x.dtype for x in (p, *partners)]} on {p.device}")
                state = self._state(group, p, p.grad)
                check_held(self._name, p, self.state.get(p, {}) if state else {}, partners)
                key = (p.device, p.dtype, len(state), *(x.dtype for x in partners))
                gathered.setdefault(key, []).append((p, state, batch))
        steps = []
        for members in gathered.values():
            params, states, batches = (list(x) for x in zip(*members, strict=True))
            teacher = [self._teacher[p] for p in params] if params[0] in self._teacher else None
            shadow = [self._shadow[p] for p in params] if params[0] in self._shadow else None
            columns = [list(column) for column in zip(*states, strict=True)]
            steps.append((self._launch(params, columns, teacher, shadow, batches), params))
        return steps, without_grad
