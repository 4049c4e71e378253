"""Segment images with a pre-trained backbone and torchvision's FCN head.

    python examples/segmentation_torchvision.py --backbone runs/mine --data scenes --classes 3 --size 224

scenes holds train/images/NAME.jpg and train/masks/NAME.png, and the same below val. A mask has the class of each pixel;
255 is not counted. Each epoch prints the loss of its last step, and the mean intersection over union on val:
"epoch 1: loss 0.793, mean IoU 49.3 %".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

import fastrm

UNCOUNTED = 255
# For 8-bit RGB. For other images, see the model card of an export.
NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Scenes(Dataset):
    """Images float32 [3, size, size] and masks uint8 [size, size]."""

    def __init__(self, folder: Path, size: int, training: bool) -> None:
        self.images = sorted((folder / "images").iterdir())
        crop = [v2.RandomResizedCrop(size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
        sized = crop if training else [v2.Resize((size, size))]
        self.transform = v2.Compose([v2.ToImage(), *sized, v2.ToDtype(torch.float32, scale=True), NORMALIZE])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.images[index]
        mask = np.array(Image.open(path.parents[1] / "masks" / f"{path.stem}.png"))
        return self.transform(Image.open(path).convert("RGB"), Mask(mask))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="a run, an exported safetensors file, or timm:NAME")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--size", type=int, default=224, help="side of the images; for a ViT that of its training")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the head; the backbone gets a tenth")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def loader(part: str, training: bool) -> DataLoader:
        scenes = Scenes(options.data / part, options.size, training)
        return DataLoader(scenes, options.batch_size, shuffle=training, num_workers=options.workers)

    train, val = loader("train", True), loader("val", False)
    backbone = fastrm.load(options.backbone)
    head = FCNHead(backbone.feature_map(train.dataset[0][0][None]).shape[1], options.classes)
    model = nn.ModuleList([backbone, head]).to(device)
    groups = [{"params": backbone.parameters(), "lr": options.lr / 10}, {"params": head.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.05)

    def logits(images: Tensor) -> Tensor:
        coarse = head(backbone.feature_map(images.to(device)))
        return interpolate(coarse, images.shape[2:], mode="bilinear")

    for epoch in range(options.epochs):
        model.train()
        for images, masks in train:
            loss = cross_entropy(logits(images), masks.long().to(device), ignore_index=UNCOUNTED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        counts = torch.zeros(2 * (options.classes,), dtype=torch.int64)  # pixels by true and by predicted class
        with torch.no_grad():
            for images, masks in val:
                pairs = masks.long() * options.classes + logits(images).argmax(1).cpu()
                counts += pairs[masks != UNCOUNTED].bincount(minlength=counts.numel()).view_as(counts)
        iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())  # NaN for a class without pixels
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, mean IoU {100 * iou.nanmean():.1f} %")


if __name__ == "__main__":
    main()
