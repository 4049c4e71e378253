"""A custom Dataset: image files, and a table with their labels.

python examples/own_dataset.py photos/labels.csv --out runs/photos
"""

import argparse
import csv
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

import fastrm


class Table(Dataset):
    """The rows of a CSV file with the columns ``file``, relative to the table's folder, and ``label``, any text."""

    def __init__(self, path):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.files = [path.parent / row["file"] for row in rows]
        self.classes = sorted({row["label"] for row in rows})
        self.targets = [self.classes.index(row["label"]) for row in rows]  # read without loading the images

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Image.open(self.files[index]).convert("RGB"), self.targets[index]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", default="runs/table")
    settings = vars(parser.parse_args())
    print(fastrm.pretrain(Table(settings.pop("table")), **settings).scores)
