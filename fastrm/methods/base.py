"""The base class of all momentum methods: a student, its averaged teacher, and the residual term between them.

    loss = the method's own loss between two views + weight * mean over views of [2 - 2 cos(student, teacher)]

where student and teacher of the second term saw the *same* view. The second term is our reconstruction of residual
momentum (Pham et al., arXiv 2211.09861) from public information, not the paper's own equation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastrm.data.augmentation import Augmentation, View
from fastrm.errors import UsageError
from fastrm.kernels import FeatureQueue, residual_loss
from fastrm.machine.distributed import gather_rows, shuffled, world
from fastrm.methods.encoding import Encoder, Encoding, StepOutput, checked_loss
from fastrm.methods.multicrop import Size, encoded, large, large_first
from fastrm.methods.pair import TeacherPair
from fastrm.methods.protocol import LinearProtocol
from fastrm.methods.published import Recipe, alike
from fastrm.models import Backbone
from fastrm.optim.schedules import Rates
from fastrm.settings.config import MethodConfig

__all__ = ["Encoder", "Encoding", "Method", "StepOutput", "unchanged_buffers"]


E = TypeVar("E", bound=Encoding)


class Method(nn.Module, Generic[E]):
    """A student, its teacher, and the losses between them.

    To write your own method, write a subclass with an ``__init__`` that takes ``(backbone, config, *, backend)`` and
    builds the heads, and with :meth:`own_loss`; if that is InfoNCE, derive from :class:`fastrm.methods.Contrastive`.
    Name it with :func:`fastrm.methods.register`. Everything else has a default that may be overridden: ``recipes``,
    :meth:`defaults`, :meth:`augmentation`, :meth:`local_views`, ``linear_protocol``, :meth:`prepare`,
    :meth:`residual`, :meth:`keys_of`.

    Attributes:
        student, teacher: networks of the same architecture; the trainer averages the student's parameters into the
            teacher after each optimizer step. The teacher's BatchNorm is in training mode, with its own statistics.
            With several processes, BatchNorm uses the batches of all processes (SyncBN); in methods with queues, the
            teacher's uses a random part of them instead (shuffle-BN).
        pair: both networks, and the teacher's low-precision copy.
        predictor: the student's last head, which the teacher does not have; or an identity.
        queues: rings of past keys, ``features`` [K, D] each; one per direction or kind of key, or none.
        directions: 2 if the student sees all views; 1 if it sees all but the second, which only the teacher sees.
        notes: messages for the user about how the method was built, one sentence each.
    """

    name: ClassVar[str]
    """Name in settings and messages: the registered name, otherwise the name of the class."""
    views: ClassVar[int] = 2
    """Views per image that :meth:`forward` takes as separate arguments; further views are in its ``more``."""
    recipes: ClassVar[Mapping[str, Recipe]] = {}
    """Published settings by the names of ``--recipe``; each maps names of settings to values."""
    uses: ClassVar[frozenset[str]] = frozenset()
    """Settings of :class:`MethodConfig` that this method reads and some others do not. A run reports a changed setting
    that its method does not read; classes that do not define this are not checked."""
    linear_protocol: ClassVar[LinearProtocol] = LinearProtocol()
    """The training of the linear classifier by which the publication scores its backbones."""

    student: Any
    teacher: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = cls.__name__

    @classmethod
    def defaults(cls, arch: str) -> dict[str, Any]:
        """Default settings for a backbone of this name: those of the first recipe, without its batch size."""
        return {**next(iter(cls.recipes.values()), {}), "batch_size": None}

    @classmethod
    def augmentation(cls, crop_min: float) -> Augmentation:
        """The augmentation of the two views; crops cover at least the fraction ``crop_min`` of the image area."""
        return alike(crop_min)

    @classmethod
    def local_views(cls, crop_min: float) -> tuple[View, ...]:
        """Additional small views, whose side is 96/224 of the others'; none by default."""
        return ()

    @classmethod
    def check_views(cls, count: int) -> None:
        """Raise a UsageError unless the method takes ``count`` views per image.

        A method takes :attr:`views` views, or more if its :meth:`forward` has the argument ``more``.
        """
        further = "more" in inspect.signature(cls.forward).parameters
        if count < cls.views or (count > cls.views and not further):
            wanted = f"{cls.views} views" + " or more" * further
            raise UsageError(f"--method {cls.name} takes {wanted} of an image; the augmentation gives {count}")

    def check_sizes(self, sizes: Sequence[Size]) -> None:
        """Raise a UsageError unless the method can be trained on views of these sizes."""
        if len(sizes) <= self.views:
            return
        count, most = large(sizes), max(sizes, key=math.prod)
        if count < 2 or (self.queues and self.directions == 2 and count > 2):
            wanted = "two views" if self.queues and self.directions == 2 else "two views or more"
            raise UsageError(
                f"--method {self.name} takes {wanted} of the largest size, for the teacher; of the {len(sizes)} views "
                f"that the augmentation gives {count} {'has' if count == 1 else 'have'} {most[0]}x{most[1]} pixels"
            )

    def cautions(self, batch: int, images: int) -> Iterator[str]:
        """Warnings about ``batch`` images per micro-batch of all processes, or ``images`` in the set."""
        size = max((len(queue.get_buffer("features")) for queue in self.queues), default=0)
        if size > images:
            yield (
                f"the queue holds {size:,} keys, more than the {images:,} images, so it has several keys per image; "
                f"--queue-size {max(1, images // 2)} holds half of the images"
            )

    @classmethod
    def prepare(cls, backbone: Backbone, arch: str) -> None:
        """Change a new backbone for the method, and note changes that it does not allow; a no-op by default."""

    def __init__(
        self,
        encoder: nn.Module,
        config: MethodConfig,
        *,
        predictor: nn.Module | None = None,
        directions: int = 2,
        queues: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.pair = TeacherPair(encoder)
        self.student, self.teacher = self.pair.student, self.pair.teacher
        self.predictor = predictor or nn.Identity()
        self.queues = nn.ModuleList(FeatureQueue(config.queue_size, config.output_dim) for _ in range(queues))
        self.directions = directions
        self.backend = backend
        self.residual_at = config.residual_at
        self.trains_residual = config.residual_weight > 0
        self.notes: list[str] = []

    def own_loss(self, direction: int, student: E, key: E) -> Tensor:
        """The method's own loss between two views, 0-d, with all its factors.

        With two views, the losses of both directions are added. With more, the loss is the mean over all pairs of a
        view of the student and another, large view of the teacher, times the number of directions.

        Args:
            direction: 0 if the key is from the second large view, 1 if it is from the first, and so on; also the index
                of the key's queue. With two views, this is the index of the view that the student saw.
            student: the student's encoding of a view.
            key: the teacher's encoding of another view, without a graph.
        """
        raise NotImplementedError(f"{type(self).__name__} has no own_loss, which a subclass of Method must define")

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        residual_weight: Tensor,
        measure: bool = False,
        more: Sequence[Tensor] = (),
    ) -> StepOutput:
        """Loss of a micro-batch.

        Args:
            first, second: two views of the same images, [B, C, H, W] each.
            residual_weight: 0-d tensor, the weight at this step of the warm-up; not used if the configured one is 0.
            measure: whether to compute the residual and the gap even if training does not need them.
            more: further views, of any size. If there are any, the student sees all views, and the teacher sees the
                large ones, which have the most pixels; there must be at least two of these.
        """
        students, teachers = self.encode((first, second, *more), measure)
        with record_function("loss"):
            return self.losses(students, teachers, residual_weight, measure)

    def encode(self, views: Sequence[Tensor], measure: bool) -> tuple[list[E | None], list[E | None]]:
        """The student's and the teacher's encoding of each view, large views first; None if a network does not see a
        view.

        With one direction, only the teacher sees the second large view, and the student sees the others. The teacher
        sees the other large views only for the residual term.
        """
        views, count = large_first(views)
        places = range(len(views))
        with record_function("student"):
            ours = encoded(self.encode_student, views, [i for i in places if self.directions == 2 or i != 1])
        with torch.no_grad(), record_function("teacher"):
            keys = [1, 0, *range(2, count)] if self.directions == 2 else [1]
            theirs = encoded(self.encode_teacher, views, keys)
            same = [i for i in range(count) if i not in keys]
            if same and self.trains_residual:
                theirs |= encoded(self.encode_teacher, views, same)
            elif same and measure:
                with unchanged_buffers(self.teacher):
                    theirs |= encoded(self.encode_teacher, views, same)
        return [ours.get(i) for i in places], [theirs.get(i) for i in places]

    def losses(
        self, students: Sequence[E | None], teachers: Sequence[E | None], residual_weight: Tensor, measure: bool
    ) -> StepOutput:
        """Loss of a micro-batch from its encodings, as :meth:`encode` returns them."""
        losses, contrastives, residuals, gaps = [], [], [], []
        keys = [i for i, teacher in enumerate(teachers) if teacher is not None] if self.directions == 2 else [1]
        pairs = [(v, k) for v, student in enumerate(students) if student is not None for k in keys if k != v]
        share = self.directions / len(pairs)
        same_views = sum(teachers[v] is not None for v, _ in pairs)
        weight = residual_weight / (share * max(1, same_views))
        for v, k in pairs:
            student, key, same = students[v], teachers[k], teachers[v]
            assert student is not None
            assert key is not None
            loss, contrastive, residual = self.direction(1 - k if k < 2 else k, student, key, same, weight)
            losses.append(loss)
            contrastives.append(contrastive)
            if measure and same is not None:
                with torch.no_grad():
                    residuals.append(self.residual(student, same) if residual is None else residual)
                    gaps.append(residual_loss(student.output, same.output, backend=self.backend) / 2)
        queued = dict.fromkeys(k for _, k in pairs) if self.queues else ()
        return StepOutput(
            loss=_scaled(torch.stack(losses).sum(), share),
            contrastive=_scaled(torch.stack(contrastives).sum(), share),
            residual=torch.stack(residuals).mean() if residuals else None,
            gap=torch.stack(gaps).mean() if gaps else None,
            keys=tuple(row for k in queued for row in self.keys_of(teachers[k])),  # type: ignore[arg-type]
            features=students[0].backbone.detach(),  # type: ignore[union-attr]
        )

    def encode_student(self, view: Tensor) -> E:
        """The student's encoding of one view [B, C, H, W]."""
        encoding: E = self.student(view)
        return replace(encoding, output=self.predictor(encoding.output))

    def encode_teacher(self, view: Tensor) -> E:
        """The teacher's encoding of one view [B, C, H, W]."""
        encoding: E = shuffled(self.pair.teach, view) if self.queues and world().size > 1 else self.pair.teach(view)
        return encoding

    def direction(
        self, d: int, student: E, key: E, same: E | None, residual_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss, own part, residual or None) of the student on one view and the teacher on another.

        ``d`` is the direction, as in :meth:`own_loss`. ``same`` is the teacher's encoding of the student's view, for
        the residual term; None if the teacher does not see it.
        """
        own = checked_loss(self.name, self.own_loss(d, student, key), student.output)
        if same is None or not self.trains_residual:
            return own, own.detach(), None
        residual = self.residual(student, same)
        return own + residual_weight * residual, own.detach(), residual.detach()

    def residual(self, student: E, same: E) -> Tensor:
        """The residual term of one view, 0-d, at the outputs that ``--residual-at`` names."""
        ours, theirs = getattr(student, self.residual_at), getattr(same, self.residual_at)
        return residual_loss(ours, theirs, backend=self.backend)

    def keys_of(self, key: E) -> tuple[Tensor, ...]:
        """The keys of the teacher's encoding for the queues."""
        return (key.output,)

    def set_rates(self, rates: Rates) -> None:
        """Set scheduled values of the method for the next step; a no-op by default."""

    def held(self) -> Iterable[nn.Parameter]:
        """The parameters that are frozen during ``--freeze-prototypes-epochs``; none by default."""
        return ()

    def push(self, keys: tuple[Tensor, ...], *, skip: Tensor | None = None) -> None:
        """Push a step's keys into the queues after the optimizer step; a no-op if the tensor ``skip`` is not 0."""
        for queue, rows in zip(self.queues, keys, strict=True):
            assert isinstance(queue, FeatureQueue)
            queue.enqueue_(gather_rows(rows)[0], skip=skip, backend=self.backend)


def _scaled(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else factor * value


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Restore BatchNorm's running statistics afterwards, so that measuring does not change the run."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
