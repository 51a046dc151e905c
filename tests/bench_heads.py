"""What the mixture of a searchable head costs beside a loop over its operations, in one run.

    python tests/bench_heads.py

Forward and backward of SimSiam's two searchable heads, 6 and 4 layers of 7 operations, for ResNet18 of a quarter of
the width, batch 512, on one thread: as models.py has them, eager and compiled, against the sum over operations as one
writes it down (eager). They take turns; a figure is the median over rounds of the ratio within a round.
"""

import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from bench_views import race
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from losses import SimSiam
from models import OPS, SearchHead, head_dims


class Loop(nn.Module):
    def __init__(self, dims: list[int]):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(len(dims) - 1, len(OPS)))
        self.layers = nn.ModuleList(nn.ModuleList(op(i, o) for op in OPS.values()) for i, o in pairwise(dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for ops, weights in zip(self.layers, self.alpha.softmax(1)):
            x = sum(weight * op(x) for weight, op in zip(weights, ops))
        return x


def step(heads: list[nn.Module], inputs: list[torch.Tensor]) -> None:
    for head, x in zip(heads, inputs):
        head(x).square().mean().backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    batch, dims = 512, [head_dims(*space) for space in SimSiam.heads(128).values()]
    inputs = [torch.randn(batch, d[0]) for d in dims]
    loop, mixture = ([kind(d) for d in dims] for kind in (Loop, SearchHead))
    for name, heads in (("eager", mixture), ("compiled", [torch.compile(SearchHead(d)) for d in dims])):
        print(f"\nSimSiam's searchable heads, forward and backward: {name}")
        race(
            "images a CPU-second",
            batch,
            time.process_time,
            15,
            mixture=lambda heads=heads: step(heads, inputs),
            loop=lambda: step(loop, inputs),
        )
