"""Fine-tune an exported backbone on labelled folders, with timm alone.

    python -m fastrm.export runs/mine --format timm --out mine
    python examples/finetune_timm.py --backbone mine --data /images

/images holds train/CLASS/... and val/CLASS/...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, help="folder that fastrm.export wrote for timm")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    classes = len(ImageFolder(options.data / "train").classes)
    model = timm.create_model(f"local-dir:{options.backbone}", pretrained=True, num_classes=classes).to(device)
    settings = timm.data.resolve_model_data_config(model)  # size, mean and deviation come with the backbone

    def loader(part: str, training: bool) -> DataLoader:
        transform = timm.data.create_transform(**settings, is_training=training)
        images = ImageFolder(options.data / part, transform)
        return DataLoader(images, options.batch_size, shuffle=training, num_workers=options.workers)

    train, val = loader("train", True), loader("val", False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(train))
    for epoch in range(options.epochs):
        model.train()
        for images, labels in train:
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in val)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {100 * right / len(val.dataset):.1f} % of val right")


if __name__ == "__main__":
    main()
