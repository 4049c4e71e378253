"""MoCo in the style of its official code, one module with two encoders and a queue; residual momentum by hand."""

import copy

import torch
from host import Run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize


class MoCo(nn.Module):
    def __init__(self, run: Run, dim: int = 128, K: int = 16384, m: float = 0.99, T: float = 0.2) -> None:
        super().__init__()
        self.run, self.K, self.m, self.T = run, K, m, T
        self.encoder_q = run.backbone(classes=dim)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(K, dim), dim=1).T.contiguous())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def momentum_update(self) -> None:
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data = param_k.data * self.m + param_q.data * (1.0 - self.m)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        ptr = int(self.queue_ptr)
        self.queue[:, ptr : ptr + len(keys)] = keys.T
        self.queue_ptr[0] = (ptr + len(keys)) % self.K

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        q = self.encoder_q(im_q)
        with torch.no_grad():
            with self.run.part("teacher"):
                self.momentum_update()
            k, same = self.encoder_k(im_k), self.encoder_k(im_q)
        with self.run.part("loss"):
            q, k, same = normalize(q, dim=1), normalize(k, dim=1), normalize(same, dim=1)
            l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
            l_neg = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
            logits = torch.cat([l_pos, l_neg], dim=1) / self.T
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            loss = cross_entropy(logits, labels) + (2 - 2 * (q * same).sum(dim=1)).mean()
            self.enqueue(k)
        return loss


def train(run: Run) -> nn.Module:
    """Train with the settings of ``run``, and return the teacher."""
    model = MoCo(run)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.01, momentum=0.9)
    for (im_q, im_k), _ in run.batches():
        loss = model(im_q, im_k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end(loss)
    return model.encoder_k
