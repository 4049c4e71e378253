"""Train torchvision's Faster R-CNN on a pre-trained ResNet, on boxes in COCO's format.

    python -m fastrm.export runs/mine --format torchvision --out mine.safetensors
    python examples/detector_torchvision.py --backbone mine.safetensors --arch resnet50 \
        --images coco/train2017 --annotations coco/annotations/instances_train2017.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms import v2


def detector(arch: str, weights: Path, classes: int, size: int) -> FasterRCNN:
    """Faster R-CNN with a feature pyramid on the pre-trained network; BatchNorm stays frozen, as is usual for
    detectors.
    """
    backbone = resnet_fpn_backbone(backbone_name=arch, weights=None, trainable_layers=3)
    missing, foreign = backbone.body.load_state_dict(load_file(weights), strict=False)
    # Frozen BatchNorm does not count batches. Every other tensor must be loaded.
    assert not missing, missing
    assert all(name.endswith("num_batches_tracked") for name in foreign), foreign
    return FasterRCNN(backbone, classes, min_size=size, max_size=2 * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=800, help="shorter side of the images")
    parser.add_argument("--lr", type=float, default=0.005)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    transform = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])
    data = CocoDetection(str(options.images), str(options.annotations), transforms=transform)
    classes = max(data.coco.getCatIds()) + 1
    data = wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels"))

    def gathered(batch: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        sound = [(image, target) for image, target in batch if len(target.get("boxes", ()))]
        return [image.to(device) for image, _ in sound], [{k: v.to(device) for k, v in t.items()} for _, t in sound]

    loader = DataLoader(data, options.batch_size, shuffle=True, collate_fn=gathered)
    model = detector(options.arch, options.backbone, classes, options.size).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=options.lr, momentum=0.9, weight_decay=1e-4)
    model.train()
    for epoch in range(options.epochs):
        for images, targets in loader:
            losses = model(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))


if __name__ == "__main__":
    main()
