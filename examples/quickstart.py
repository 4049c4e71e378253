"""Pre-train, score and use a backbone from Python, in about a minute on two CPU cores.

python examples/quickstart.py --out runs/quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fastrm
from fastrm.evaluate import EvaluateConfig, evaluate
from fastrm.settings.config import build
from fastrm.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    # Every flag of `python -m fastrm.train` is a keyword here. With the same folder, the run is continued or returned.
    summary = train(
        build(
            data="digits",  # or a folder of your own images
            arch="test_resnet",  # or any image backbone of timm
            image_size=32,
            batch_size=128,
            epochs=options.epochs,
            teacher_momentum=0.9,  # a short run needs a teacher with a short average
            out=options.out,
        )
    )
    print(f"gap between student and teacher {summary['gap']:.3f}")

    scores = evaluate(EvaluateConfig(checkpoint=options.out, knn=True))["digits"]["scores"]
    for network in ("student", "teacher", "random"):
        print(f"kNN of the {network:8} {scores[network]['knn20']} %")

    model = fastrm.load(options.out)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        features, feature_map = model(images), model.feature_map(images)
    print(f"features {tuple(features.shape)}, map {tuple(feature_map.shape)}")


if __name__ == "__main__":
    main()
