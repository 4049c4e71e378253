"""The augmentation through torchvision's v2 transforms, in worker processes, an image at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, View
from fastrm.data.sources import Images

# (epoch, index): a sample's random numbers depend on these and the seed alone, not on which worker draws them.
Sample = tuple[int, int]


def view_transform(view: View, image_size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """One view's augmentation: PIL picture to a normalised float32 [3, image_size, image_size]."""
    scale = image_size / 224
    sigma = tuple(s * scale for s in view.blur_sigma)
    # Wide enough for three standard deviations on each side.
    kernel = 2 * max(1, int(np.ceil(3 * sigma[1]))) + 1
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    blur = v2.GaussianBlur(kernel, sigma=sigma)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                image_size,
                scale=view.crop_scale,
                ratio=view.crop_ratio,
                interpolation=InterpolationMode(view.interpolation),
                antialias=True,
            ),
            v2.RandomApply([jitter], p=view.jitter_probability),
            v2.RandomGrayscale(p=view.grayscale_probability),
            v2.RandomApply([blur], p=view.blur_probability),
            v2.RandomSolarize(threshold=128, p=view.solarize_probability),
            v2.RandomHorizontalFlip(p=view.flip_probability),
            *_to_normalised(mean, std),
        ]
    )


def eval_transform(image_size: int) -> v2.Compose:
    """The customary evaluation view: shorter side to 256/224 of the size and the centre; small pictures whole."""
    if image_size <= 64:
        resize = [v2.Resize((image_size, image_size), antialias=True)]
    else:
        resize = [v2.Resize(round(image_size * 256 / 224), antialias=True), v2.CenterCrop(image_size)]
    return v2.Compose([*resize, *_to_normalised(IMAGENET_MEAN, IMAGENET_STD)])


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[torch.nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=list(mean), std=list(std))]


def _sample_seed(seed: int, epoch: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])


class _PairsOfViews(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Images, augmentation: Augmentation, image_size: int, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.transforms = [
            view_transform(view, image_size, augmentation.mean, augmentation.std) for view in augmentation.views
        ]

    def __getitem__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        image: Image.Image = self.images[sample[1]]
        outer = torch.get_rng_state()
        try:
            # The CPU generator itself: torch.manual_seed would also queue a seeding of every GPU, for every sample.
            torch.default_generator.manual_seed(_sample_seed(self.seed, *sample))
            first, second = (transform(image) for transform in self.transforms)
        finally:
            torch.set_rng_state(outer)
        return first, second


class _BatchSampler:
    """Batches of one epoch in a new order each epoch, sharded by rank, whole batches only."""

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Sample]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for batch in range(self.skip, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(i)) for i in order[start : start + self.batch_size]]


class TorchLoader:
    """Pairs of views from worker processes; each pass over the loader is the next epoch.

    The same seed gives the same batches, whatever the number of workers, and from any step on.
    """

    def __init__(
        self,
        images: Images,
        augmentation: Augmentation,
        *,
        image_size: int,
        batch_size: int,
        device: torch.device,
        workers: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._sampler = _BatchSampler(len(images), batch_size, seed, rank, world_size)
        self._device = device
        self._loader = DataLoader(
            _PairsOfViews(images, augmentation, image_size, seed),
            batch_sampler=self._sampler,
            num_workers=workers,
            generator=torch.Generator(),  # it would draw from the global one, and shift a resumed run's numbers
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._sampler)

    def seek(self, batch: int) -> None:
        """Go on from this batch, counted from the start of the run."""
        self._sampler.epoch, self._sampler.skip = divmod(batch, len(self))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first, second in self._loader:
            yield first.to(self._device, non_blocking=True), second.to(self._device, non_blocking=True)
        self._sampler.epoch, self._sampler.skip = self._sampler.epoch + 1, 0


class EvalImages(Dataset[Tensor]):
    """Images as the evaluation sees them, in order."""

    def __init__(self, images: Images, image_size: int) -> None:
        self.images = images
        self.transform = eval_transform(image_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        view: Tensor = self.transform(self.images[index])
        return view
