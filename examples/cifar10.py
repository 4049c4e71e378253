"""Train a small network on the photographs of CIFAR-10 without labels, in some hours of two CPU cores.

python examples/cifar10.py FOLDER --out runs/cifar10
python examples/cifar10.py --out runs/cifar10 --export cifar10.safetensors
"""

import argparse
import hashlib
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastrm
from fastrm.data import Augmentation, View
from fastrm.export import ExportConfig, export

VIEW = View(size=24, blur_probability=0.0)
SETTINGS = {
    "augmentation": Augmentation(views=(VIEW, VIEW)),
    "image_size": 32,
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 0.3,
    "temperature": 0.2,
    "teacher_momentum": 0.99,
    "hidden_dim": 512,
    "output_dim": 128,
    "loader": "memory",
    "cuda_graph": torch.cuda.is_available(),
}
OF_METHOD = {"mocov2": {"queue_size": 4096}, "mocov3": {"predictor_hidden_dim": 512}}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if (channels, stride) != (width, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Images [B, 3, H, W] to a map [B, 192, H/8, W/8]: patches of 2×2 pixels, then a block at each of three sizes."""

    def __init__(self, widths=(48, 96, 192)):
        super().__init__()
        first = nn.Conv2d(3, widths[0], 2, stride=2, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(widths[0]), nn.ReLU())
        sizes = zip((widths[0], *widths), widths, (1, 2, 2), strict=False)
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))

    def forward(self, images):
        return self.blocks(self.stem(images))


class Clock:
    """Logs the hours of processor time of a run, including those before an interruption."""

    def __init__(self):
        self.before = -time.process_time()

    def hours(self):
        return (self.before + time.process_time()) / 3600

    def on_step(self, run, step, outputs):
        if run.logging:
            run.log({"cpu_hours": self.hours()})

    def on_evaluate(self, run, step, scores):
        run.log({"cpu_hours": self.hours()})

    def state_dict(self):
        return {"hours": self.hours()}

    def load_state_dict(self, state):
        self.before += 3600 * state["hours"]


def export_half(run, file, which):
    """Write a run's backbone as ``fastrm.export`` does, and halve the file by storing its convolutions in float16."""
    card = export(ExportConfig(checkpoint=run, format="safetensors", which=which, out=file), arch=SmallResNet())
    with safe_open(file, "pt") as full:
        about = full.metadata()
        state = {name: full.get_tensor(name) for name in full.keys()}  # noqa: SIM118 -- no mapping
    save_file({name: value.half() if value.ndim > 1 else value for name, value in state.items()}, file, about)
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    said = f"\n## This file\n\nIts convolutions are in float16. SHA-256: `{checksum}`.\n"
    card.write_text(card.read_text(encoding="utf-8") + said, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", help="a folder with train/CLASS/… and val/CLASS/…; unset: no training")
    parser.add_argument("--method", default="mocov3", choices=tuple(OF_METHOD))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--eval-every", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="processes and threads that decode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--export", type=Path, help="the file that the backbone is written to, for fastrm.load")
    parser.add_argument("--which", default="student", choices=("student", "teacher"), help="whose backbone")
    given = vars(parser.parse_args())
    data, file, which = (given.pop(name) for name in ("data", "export", "which"))
    if data is not None:
        torch.manual_seed(given["seed"])  # the seed of the initial weights, which the module draws
        settings = {**SETTINGS, **OF_METHOD[given["method"]], **given}
        print(fastrm.pretrain(data, arch=SmallResNet(), hooks=[Clock()], **settings).scores)
    if file is not None:
        export_half(given["out"], file, which)
