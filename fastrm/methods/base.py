"""What all momentum methods share: a student, its averaged teacher, and the residual term between them.

    loss = the method's own loss between two views + weight * mean over views of [2 - 2 cos(student, teacher)]

where student and teacher of the second term saw the *same* view. The second term is our reconstruction of residual
momentum (Pham et al., arXiv 2211.09861) from what is public of it, not the paper's own equation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastrm.data.augmentation import Augmentation
from fastrm.errors import UsageError
from fastrm.kernels import FeatureQueue, residual_loss
from fastrm.machine.distributed import gather_rows, shuffled, world
from fastrm.methods.pair import TeacherPair
from fastrm.methods.protocol import LinearProtocol
from fastrm.methods.published import Recipe, alike
from fastrm.models import Backbone
from fastrm.settings.config import MethodConfig


@dataclass(frozen=True)
class Encoding:
    """The outputs of a network for one view; the fields are the values of ``--residual-at``."""

    backbone: Tensor
    """Pooled features [B, C]."""
    projector: Tensor
    """Output of the projector [B, D]."""
    output: Tensor
    """Input of the method's loss [B, D], which is the output of the predictor, if the student has one."""


E = TypeVar("E", bound=Encoding)


class StepOutput(NamedTuple):
    """The result of one micro-batch."""

    loss: Tensor
    """The loss to minimise, 0-d, with its graph."""
    contrastive: Tensor
    """The method's own loss with all its factors, 0-d, detached."""
    residual: Tensor | None
    """The residual term without its weight, 0-d, detached; None where it is neither trained nor measured."""
    gap: Tensor | None
    """1 - mean cosine between student and teacher output on the same view, 0-d, detached; None if not measured."""
    keys: tuple[Tensor, ...]
    """Keys for each queue, to be pushed after the optimizer's step."""
    features: Tensor
    """The student's backbone features of the first view, [B, C], detached, for hooks."""


class Encoder(nn.Module):
    """Backbone and projector: the part of the student that the teacher averages."""

    def __init__(self, backbone: Backbone, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Encoding:
        """[B, C, H, W] images to an encoding whose output is the projection."""
        pooled = self.backbone(images)
        projection = self.projector(pooled)
        return Encoding(pooled, projection, projection)


class Method(nn.Module, Generic[E]):
    """A student, its teacher, and what is trained between them.

    To make one of your own, write a subclass with an ``__init__`` that takes ``(backbone, config, *, backend)`` and
    builds the heads, and with :meth:`own_loss`; where that is InfoNCE, :class:`fastrm.methods.Contrastive` has it. Give
    it a name with :func:`fastrm.methods.register`. All else has a default that may be replaced: ``recipes``,
    :meth:`defaults`, :meth:`augmentation`, ``linear_protocol``, :meth:`prepare`, :meth:`residual`, :meth:`keys_of`.

    Attributes:
        student, teacher: networks of one layout; the trainer averages the student's parameters into the teacher
            after each optimizer step. The teacher's BatchNorm works in training mode with statistics of its own.
            In several processes BatchNorm sees the batch of all (SyncBN), or, in methods with queues, the teacher's
            sees a part of it that is mixed over all (shuffle-BN).
        pair: both, and the teacher's copy in low precision.
        predictor: the student's last head, without a counterpart in the teacher; or an identity.
        queues: rings of past keys, ``features`` [K, D] each; one per direction or kind of key, or none.
        directions: 2 where the student sees both views, 1 where it sees only the first.
        notes: what the person who runs it should know of how it was built, a sentence each.
    """

    name: ClassVar[str]
    """Name in settings and messages, which is the registered name, or else the name of the class."""
    views: ClassVar[int] = 2
    """Views of an image that :meth:`forward` takes."""
    recipes: ClassVar[Mapping[str, Recipe]] = {}
    """Published settings, by the names that ``--recipe`` takes; each has values by the settings' names."""
    linear_protocol: ClassVar[LinearProtocol] = LinearProtocol()
    """How a linear classifier is trained to score its backbones."""

    student: Any
    teacher: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = cls.__name__

    @classmethod
    def defaults(cls, arch: str) -> dict[str, Any]:
        """Settings of a run that gives none, by the backbone's name: those of the first recipe, but its batch size."""
        return {**next(iter(cls.recipes.values()), {}), "batch_size": None}

    @classmethod
    def augmentation(cls, crop_min: float) -> Augmentation:
        """How an image becomes views, of crops of at least this share of its area."""
        return alike(crop_min)

    @classmethod
    def check_views(cls, count: int) -> None:
        """Raise a UsageError unless an augmentation gives as many views of an image as the method takes."""
        if count != cls.views:
            raise UsageError(f"--method {cls.name} takes {cls.views} views of an image; the augmentation gives {count}")

    def cautions(self, batch: int, images: int) -> Iterator[str]:
        """What may go wrong with so many images per micro-batch, over all processes, and in all; a sentence each."""
        size = max((len(queue.get_buffer("features")) for queue in self.queues), default=0)
        if size > images:
            yield (
                f"the queue holds {size:,} keys, more than the {images:,} images: many of its negatives are of one "
                f"image; --queue-size {max(1, images // 2)} holds half of them"
            )

    @classmethod
    def prepare(cls, backbone: Backbone, arch: str) -> None:
        """Change a new backbone, of this name, as the method wants it; its ``notes`` get what could not be done."""

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
        """The method's own loss of one direction, 0-d, with all its factors; both directions are added.

        Args:
            direction: the view that the student saw, 0 or 1; also the number of its queue.
            student: its encoding of that view.
            key: the teacher's encoding of the other view, without a graph.
        """
        raise NotImplementedError(f"{type(self).__name__} has no own_loss, which a subclass of Method has to say")

    def forward(self, first: Tensor, second: Tensor, residual_weight: Tensor, measure: bool = False) -> StepOutput:
        """Loss of a micro-batch.

        Args:
            first, second: two views of the same images, [B, C, H, W] each.
            residual_weight: 0-d tensor, the weight at this step of the warm-up; not used if the configured one is 0.
            measure: also give the residual and the gap where training does not need them.
        """
        views = (first, second)
        with record_function("student"):
            students = [self.encode_student(view) for view in views[: self.directions]]
        with torch.no_grad(), record_function("teacher"):
            # By view. The teacher on the first is only for the residual term where the student sees no other.
            teachers: list[E | None] = [None, self.encode_teacher(second)]
            if self.directions == 2 or self.trains_residual:
                teachers[0] = self.encode_teacher(first)
            elif measure:
                with unchanged_buffers(self.teacher):
                    teachers[0] = self.encode_teacher(first)

        with record_function("loss"):
            return self.losses(students, teachers, residual_weight, measure)

    def losses(
        self, students: Sequence[E], teachers: Sequence[E | None], residual_weight: Tensor, measure: bool
    ) -> StepOutput:
        """Loss of encodings by view, which :meth:`forward` makes and explains."""
        losses, contrastives, residuals, gaps = [], [], [], []
        keys: list[Tensor] = []
        for d, student in enumerate(students):
            key, same = teachers[1 - d], teachers[d]
            assert key is not None
            loss, contrastive, residual = self.direction(d, student, key, same, residual_weight / self.directions)
            losses.append(loss)
            contrastives.append(contrastive)
            keys.extend(self.keys_of(key))
            if measure and same is not None:
                with torch.no_grad():
                    residuals.append(self.residual(student, same) if residual is None else residual)
                    gaps.append(residual_loss(student.output, same.output, backend=self.backend) / 2)
        return StepOutput(
            loss=torch.stack(losses).sum(),
            contrastive=torch.stack(contrastives).sum(),
            residual=torch.stack(residuals).mean() if residuals else None,
            gap=torch.stack(gaps).mean() if gaps else None,
            keys=tuple(keys) if self.queues else (),
            features=students[0].backbone.detach(),
        )

    def encode_student(self, view: Tensor) -> E:
        """Student on one view."""
        encoding: E = self.student(view)
        return replace(encoding, output=self.predictor(encoding.output))

    def encode_teacher(self, view: Tensor) -> E:
        """Teacher on one view."""
        encoding: E = shuffled(self.pair.teach, view) if self.queues and world().size > 1 else self.pair.teach(view)
        return encoding

    def direction(
        self, d: int, student: E, key: E, same: E | None, residual_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss, own part, residual or None) of the student on view ``d`` against the teacher on the other view.

        ``same`` is the teacher on the view of the student, which only the residual term needs.
        """
        own = self.own_loss(d, student, key)
        if not self.trains_residual:
            return own, own.detach(), None
        assert same is not None
        residual = self.residual(student, same)
        return own + residual_weight * residual, own.detach(), residual.detach()

    def residual(self, student: E, same: E) -> Tensor:
        """The residual term of one view, at the configured place."""
        ours, theirs = getattr(student, self.residual_at), getattr(same, self.residual_at)
        return residual_loss(ours, theirs, backend=self.backend)

    def keys_of(self, key: E) -> tuple[Tensor, ...]:
        """What the teacher's encoding leaves to the queues."""
        return (key.output,)

    def push(self, keys: tuple[Tensor, ...], *, skip: Tensor | None = None) -> None:
        """Put a step's keys into the queues: after the optimizer step, and not where ``skip``, so that a skipped step
        moves nothing."""
        for queue, rows in zip(self.queues, keys, strict=True):
            assert isinstance(queue, FeatureQueue)
            queue.enqueue_(gather_rows(rows)[0], skip=skip, backend=self.backend)


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Put BatchNorm's running statistics back afterwards, so that measuring does not change the run."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
