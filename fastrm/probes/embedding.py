"""Features of all images of a collection, in a file that is written in parts and can be continued."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastrm.data.sources import Images
from fastrm.errors import UsageError
from fastrm.files import read_json, write_json
from fastrm.models import Backbone
from fastrm.own import MARK
from fastrm.packages import optional
from fastrm.probes.features import Setting, batches, evaluating
from fastrm.terminal.progress import bar
from fastrm.version import __version__

_KEPT = 32  # batches between two flushes to the disk
_LEAST = 4  # images of a map; UMAP can place no fewer
_AT_ONCE = 2**26  # feature values that are compared with queries at a time


@dataclass(frozen=True, kw_only=True)
class About:
    """Identifies the features in a file."""

    network: str
    """A digest of the backbone's tensors."""
    images: str
    """A digest of the identities of the images, in their order."""
    shape: tuple[int, ...]
    """Shape of the array, rows first."""
    dtype: str
    """``"float32"`` or ``"float16"``."""


def about(backbone: Backbone, images: Images, setting: Setting, *, patches: bool, dtype: str) -> About:
    """Describe the features before they are computed.

    Args:
        backbone: maps images to features [B, D], or to a map [B, D, h, w].
        images: images in their order.
        setting: how images reach the network.
        patches: whether to store the map [h, w, D] of each image instead of its mean.
        dtype: dtype of the file.

    Raises:
        UsageError: ``patches`` is set, and there is no map.
    """
    state = blake2b(digest_size=16)
    for name, value in backbone.net.state_dict().items():
        state.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    side = setting.image_size
    with evaluating(backbone):
        seen = _seen(backbone, torch.zeros(1, images.format.channels, side, side, device=setting.device), patches)
    listed = blake2b(np.ascontiguousarray(images.hashes()).tobytes(), digest_size=16)
    return About(
        network=state.hexdigest(), images=listed.hexdigest(), shape=(len(images), *seen.shape[1:]), dtype=dtype
    )


def _seen(backbone: Backbone, views: Tensor, patches: bool) -> Tensor:
    """Features [B, D], or with ``patches`` [B, h, w, D], of a batch of images."""
    if not patches:
        return backbone(views).float()
    try:
        return backbone.feature_map(views).float().permute(0, 2, 3, 1)
    except UsageError as error:
        raise UsageError(f"--patches: {error}; leave it out") from None


def embed(
    backbone: Backbone, images: Images, setting: Setting, out: Path, wanted: About, *, patches: bool
) -> NDArray[Any]:
    """Write the features of all images, row i for image i, to ``out`` as ``.npy``, or continue an interrupted file.

    Rows of unreadable images are NaN; ``images.unreadable`` lists them. Memory is constant in the number of
    images.

    Returns:
        The memory-mapped array.
    """
    partial, progress = (out.with_name(f".{out.name}.{end}") for end in ("partial", "progress"))
    earlier = read_json(progress) if partial.is_file() and progress.is_file() else {}
    described = plain(wanted)
    done = int(earlier["done"]) if earlier.get("about") == described else 0
    if done:
        array = np.load(partial, mmap_mode="r+")
    else:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=wanted.dtype, shape=wanted.shape)
    left = images.subset(np.arange(done, len(images))).formatted(images.format)
    begun = at = done
    images.unreadable |= {int(index): why for index, why in earlier["not_read"].items()} if done else {}
    with bar(f"features of {len(images):,} images", len(images)) as task:
        task.reach(done)
        for number, (views, own) in enumerate(batches(left, setting), start=1):
            end = begun + own[-1] + 1
            array[at:end] = np.nan
            with evaluating(backbone):
                array[[begun + index for index in own]] = _seen(backbone, views, patches).cpu().numpy()
            images.unreadable |= {begun + index: why for index, why in left.unreadable.items()}
            at = end
            task.reach(at)
            if number % _KEPT == 0:
                array.flush()
                kept = {"about": described, "done": at, "not_read": images.unreadable}
                write_json(progress, {MARK: __version__, **kept})
        images.unreadable |= {begun + index: why for index, why in left.unreadable.items()}
        array[at:] = np.nan
    array.flush()
    partial.replace(out)
    progress.unlink(missing_ok=True)
    return np.asarray(np.load(out, mmap_mode="r"))


def plain(about: About) -> dict[str, Any]:
    """The description as JSON-compatible values."""
    return {**asdict(about), "shape": list(about.shape)}


def looked_up(features: NDArray[Any], queries: Tensor, *, k: int) -> NDArray[np.int64]:
    """int64 [N, k]: for each of ``queries`` [N, D], the rows of ``features`` [M, D] with the highest cosines, best
    first.
    """
    queries = nn.functional.normalize(queries, dim=1)
    best, index = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    step = max(1, _AT_ONCE // features.shape[1])
    for start in range(0, len(features), step):
        rows = torch.from_numpy(features[start : start + step].astype(np.float32))
        cosines = (queries @ nn.functional.normalize(rows, dim=1).T).nan_to_num_(-2)
        numbers = torch.arange(start, start + len(rows)).expand(len(queries), -1)
        both, numbers = torch.cat([best, cosines], dim=1), torch.cat([index, numbers], dim=1)
        best, order = both.topk(min(k, both.shape[1]), dim=1)
        index = numbers.gather(1, order)
    return index.numpy()


def projected(features: NDArray[Any], projection: str) -> tuple[NDArray[np.float64], tuple[str, str]]:
    """Place images in a plane by their features.

    Args:
        features: [M, D], finite, with M of at least 4 and D of at least 2.
        projection: ``"pca"``, two principal components; or ``"umap"`` (McInnes et al., arXiv 1802.03426), by cosine
            with 15 neighbours and a fixed seed.

    Returns:
        Points float64 [M, 2], and a title per axis.

    Raises:
        UsageError: there are fewer features, or the package of UMAP is missing.
    """
    if len(features) < _LEAST or features.shape[1] < 2:
        raise UsageError(
            f"--map needs at least {_LEAST} readable images and features of width 2; "
            f"there are {len(features)} of width {features.shape[1]}"
        )
    rows = features.astype(np.float32)
    if projection == "umap":
        near = min(15, len(rows) - 1)
        model = umap_module().UMAP(n_neighbors=near, metric="cosine", random_state=0, n_jobs=1)
        return model.fit_transform(rows).astype(np.float64), ("UMAP, first axis", "UMAP, second axis")
    from sklearn.decomposition import PCA

    model = PCA(2, svd_solver="randomized", random_state=0)
    points = model.fit_transform(rows).astype(np.float64)
    first, second = (f"{100 * share:.0f} % of the variance" for share in model.explained_variance_ratio_)
    return points, (f"first principal component, {first}", f"second principal component, {second}")


def umap_module() -> Any:
    """The module of UMAP.

    Raises:
        UsageError: its package is not installed.
    """
    return optional("umap", extra="umap", wanted_by="--projection umap", package="umap-learn")
