"""DINO with a small vision transformer, on a few thousand small photographs, in some minutes on a CPU.

python examples/dino_vit.py FOLDER --out runs/dino
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastrm
from fastrm.data import Augmentation, View

COLOURS = {"blur_probability": 0.0, "jitter_probability": 0.8, "grayscale_probability": 0.2}
LARGE = View(size=32, crop_scale=(0.4, 1.0), **COLOURS)
SMALL = View(size=16, crop_scale=(0.15, 0.5), **COLOURS)
# A teacher sharper than the published one (0.04): with views as different as these, the outputs otherwise become
# uniform, and the loss stays at the logarithm of the number of prototypes.
SETTINGS = {
    "method": "dino",
    "augmentation": Augmentation(views=(LARGE, LARGE, SMALL, SMALL)),
    "image_size": 32,
    "optimizer": "adamw",
    "lr": 4e-3,
    "warmup_epochs": 1,
    "drop_path": 0.0,
    "prototypes": 1024,
    "hidden_dim": 512,
    "output_dim": 128,
    "teacher_momentum": 0.99,
    "teacher_temperature": 0.025,
    "teacher_temperature_start": 0.025,
    "loader": "memory",
}


class ConvStem(nn.Module):
    """Convolutions of stride 2 in place of the patch projection (Xiao et al., arXiv 2106.14881)."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **_):
        super().__init__()
        self.patch_size, self.grid_size = (patch_size, patch_size), (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] ** 2
        count = patch_size.bit_length() - 1
        widths = [in_chans, *(embed_dim // 2**i for i in reversed(range(count)))]
        layers = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images):
        return self.proj(images).permute(0, 2, 3, 1)


def small_vit():
    """A ViT of two blocks of width 64, on patches of 8 pixels: images [B, 3, H, W] to features [B, 64]."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return VisionTransformer(**shape, num_classes=0, global_pool="avg", dynamic_img_size=True, embed_layer=ConvStem)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a folder with train/CLASS/… and val/CLASS/…")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--eval-every", type=int, default=4)
    parser.add_argument("--eval-images", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--residual-weight", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/dino"))
    given = vars(parser.parse_args())
    torch.manual_seed(given["seed"])  # the seed of the initial weights, which the module draws
    print(fastrm.pretrain(given.pop("data"), arch=small_vit(), **given, **SETTINGS).scores)
