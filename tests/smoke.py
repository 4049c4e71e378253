"""Checks an installed fastrm away from its sources: run `python smoke.py` in an empty folder."""

import json
import pathlib
import subprocess
import sys

import torch

from fastrm.kernels import EMA, FeatureQueue, residual_info_nce

teacher, student = [torch.zeros(1000)], [torch.ones(1000)]
EMA(teacher, student).update_(0.75)
torch.testing.assert_close(teacher[0], torch.full((1000,), 0.25))

queue = FeatureQueue(64, 8)
query = torch.randn(4, 8, requires_grad=True)
loss, _, _ = residual_info_nce(query, torch.randn(4, 8), torch.randn(4, 8), queue.features, queue.pointer)
loss.backward()
assert queue.pointer == 4
assert query.grad is not None

images = ["--data", "digits", "--image-size", "16", "--batch-size", "16"]
network = ["--arch", "test_resnet", "--stem", "imagenet", "--hidden-dim", "16", "--predictor-hidden-dim", "16"]
train = [sys.executable, "-m", "fastrm.train", *images, *network, "--max-steps", "2", "--eval-every", "0"]
subprocess.run([*train, "--out", "run"], check=True)
assert json.loads(pathlib.Path("run", "summary.json").read_text())["step"] == 2
subprocess.run([sys.executable, "-m", "fastrm.doctor"], check=True)
print("fastrm works")
