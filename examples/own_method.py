"""A custom method: ReSSL (Zheng et al., arXiv 2107.09282).

The student learns the teacher's similarities to past keys; the teacher sees a weaker augmentation.

python examples/own_method.py --out runs/ressl
"""

import argparse

from torch.nn.functional import cross_entropy, normalize

import fastrm
from fastrm.data import Augmentation, View
from fastrm.methods import Encoder, Method, mlp, register


@register("ressl")
class ReSSL(Method):
    def __init__(self, backbone, config, *, backend=None):
        projector = mlp((backbone.dim, config.hidden_dim, config.output_dim), hidden_norm=True)
        super().__init__(Encoder(backbone, projector), config, directions=1, queues=1, backend=backend)

    def own_loss(self, direction, student, key):
        past = self.queues[direction].features
        ours, target = (normalize(seen.output.float(), dim=1) @ past.T for seen in (student, key))
        return cross_entropy(ours / 0.1, (target / 0.04).softmax(dim=1))

    @classmethod
    def augmentation(cls, crop_min):
        crop = (crop_min, 1.0)
        weak = View(crop_scale=crop, jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0)
        return Augmentation(views=(View(crop_scale=crop), weak))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/ressl")
    small = {"image_size": 32, "batch_size": 128, "epochs": 10, "teacher_momentum": 0.9, "queue_size": 1024}
    print(fastrm.pretrain("digits", arch="test_resnet", method="ressl", **small, **vars(parser.parse_args())).scores)
