"""The common interface of all backbones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastrm.errors import UsageError


class Backbone(nn.Module):
    """A network with timm's interface and without a classifier, from images to pooled features and a feature map.

    Attributes:
        net: the network; its ``state_dict`` is what other programs load.
        dim: width D of the pooled features.
        map_dim: channels of the feature map; None if there is no map [B, C, h, w].
        transformer: whether methods treat it as a transformer, which for example sets the depth of MoCo-v3's heads.
        channels: channels of its input images.
        options: arguments of ``timm.create_model`` besides ``num_classes=0``.
        recomputes: whether blocks are computed again in the backward pass.
        notes: messages about requests that could not be met, one sentence each.
    """

    def __init__(
        self,
        net: nn.Module,
        dim: int,
        map_dim: int | None,
        *,
        transformer: bool = False,
        channels_last: bool = False,
        channels: int = 3,
    ) -> None:
        """``channels_last``: the network returns its map as [B, h, w, C], as Swin does."""
        super().__init__()
        self.net: Any = net
        self.dim = dim
        self.map_dim = map_dim
        self.transformer = transformer
        self.channels = channels
        self.options: dict[str, Any] = {}
        self.recomputes = False
        self.notes: list[str] = []
        self._channels_last = channels_last

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to pooled features [B, D]."""
        return self._pooled(self.net.forward_features(images))

    def forward_features(self, images: Tensor) -> Any:
        """Map images [B, C, H, W] to the output of the last layer before the pooling.

        The output is [B, C, h, w] if ``map_dim`` is set, otherwise in timm's form, such as tokens [B, N, C].
        """
        return self._mapped(self.net.forward_features(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to features per position [B, D, h, w].

        For a transformer, these are the normalised patch tokens of its last layer, without class and register tokens.

        Raises:
            UsageError: the network has no such map.
        """
        if self.map_dim is not None:
            found: Tensor = self.forward_features(images)
            return found
        try:
            (found,) = self.net.forward_intermediates(
                images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        except (AttributeError, AssertionError):  # raised by timm's networks without this function
            raise UsageError(f"{type(self.net).__name__} has no map [B, D, h, w]") from None
        return found

    def encode(self, images: Tensor) -> tuple[Tensor, Any]:
        """The results of :meth:`forward` and :meth:`forward_features`, in one pass."""
        features = self.net.forward_features(images)
        return self._pooled(features), self._mapped(features)

    def checkpoint_activations(self) -> None:
        """Keep only the input of each block, and compute the block again in the backward pass.

        Raises:
            UsageError: the network does not support this.
        """
        try:
            self.net.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            name = type(self.net).__name__
            raise UsageError(
                f"--checkpoint-activations: {name} cannot recompute activations (set_grad_checkpointing of "
                "timm's networks); leave it out, or lower --batch-size"
            ) from None
        self.recomputes = True

    def _pooled(self, features: Any) -> Tensor:
        pooled: Tensor = self.net.forward_head(features, pre_logits=True)
        return pooled.flatten(1)

    def _mapped(self, features: Any) -> Any:
        return features.permute(0, 3, 1, 2) if self._channels_last else features


def channels_last(net: nn.Module, features: Tensor) -> bool:
    """Whether a map of four dimensions is [B, h, w, C], by the network's attributes, otherwise by its width."""
    channels = getattr(net, "num_features", None)
    known = features.shape[3] == channels != features.shape[1]
    return known or str(getattr(net, "output_fmt", "NCHW")) == "NHWC"
