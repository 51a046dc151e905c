"""Searches without labels for heads, a backbone, the views of an image, or several of these together.

    torchrun search.py                                                            # heads, made-up images, a laptop
    torchrun search.py --space resnet --target-macs 0.5xresnet18 --method simclr  # a backbone of half the MACs
    torchrun search.py --space mobilenet --target-ms 5 --method simclr            # of 5 ms per image on this machine
    torchrun search.py --space heads mobilenet views --method simclr              # all together
    torchrun search.py --data cifar10 --width 1 --epochs 100 --batch-size 512     # one GPU
    torchrun search.py --bench                            # what an iteration costs
    torchrun study.py --search runs/search --networks resnet:8    # the result beside handcrafted and random networks

Three strategies:

supernet, the default for backbones. The largest network of the space is trained for --epochs; every step trains one
subnet near the target. Then --candidates subnets whose cost is in the target band are scored with its weights, by the
InfoNCE of their features on held-out images. A ridge regression of the scores on each stage's choices (the surrogate)
estimates what a choice is worth, and gives the best network in the band. The finalists are that network, the best ones
by surrogates of bootstrapped scores, random ones, and the handcrafted network scaled to the band.

halving, the default for views: the handcrafted candidate and random ones, like the finalists of a supernet, are trained
alone with two seeds, all on the same views unless views are searched. At every rung the better half goes on, until one
is left (successive halving, 1502.07943). The scores of the first rung propose a quarter more backbones: a regression on
total depth, width and kernel size says in which direction the better ones lie. The handcrafted candidate is trained to
its end too, and a winner that leads it by no more than a standard error is dropped in its favour. (As the winner is the
best of several, of 8 equal networks a third to a half of all searches still return another one.) A warning is printed
if candidates differ by less than half of what seeds do.

gradient, the default for heads (NASiam, arXiv 2302.00059): every layer is a mixture of seven operations, weighted by
its alphas. For backbones (SSA, 2203.08130; the design is ours) every choice is a mask on the largest network; a step
samples one subnet for all its views. The alphas learn by straight-through gradients and are kept where E[MACs] meets
the target. In both cases the search is first-order and alternating: after a quarter of the steps on weights alone, each
step updates the alphas on one half of the images and the weights on the other. At the end the result and the
handcrafted network or heads are trained alone and both scores are printed; the result is kept whatever they are.

A contrastive method (simclr, moco) is the better judge of backbones: a loss that can collapse lets the alphas choose
networks that help it collapse. (MoCo's queue holds keys of networks sampled at earlier steps.) For a baseline of random
networks trained alone, use study.py.

The output folder gets log.txt (one JSON line per epoch), checkpoint.pth, scores.json, a folder for each finalist,
arch.json (the result, as plain data), and search.svg (alphas of heads), surrogate.svg, halving.svg and backbone.svg.
A found backbone is also saved as backbone.pth: with inherited weights and BN recalibrated or, by halving, as trained.
"""

import launch  # ahead of torch: it says how threads wait

# isort: split

import argparse
import copy
import json
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import models
import pretrain
from candidates import (
    Candidate,
    Cost,
    Task,
    beside_handcrafted,
    drawn,
    fits,
    fitting,
    halving,
    halving_epochs,
    handcrafted,
    head_spaces,
    measured_ms,
    proposals_of,
    random_candidates,
    random_rest,
    remembered,
    ridge,
    task_of,
)
from checkpoint import Checkpoint, load_arch, load_json, lock, save_backbone, versions, write_atomic, write_json
from data import ALPHAS, GATES, RECALIBRATION, Batches, channel_stats
from launch import Meter, Parser, barrier, command_line, from_main, is_main, mean_over_ranks, say, user_errors
from losses import METHODS, Method
from models import BACKBONES, BAND, OPS, SPACES, Choices, SearchBackbone, SearchHead, Space
from optim import clip_gradients, distributed, optimizer_of, set_lr, warmup_steps, with_state
from pictures import draw_backbone, draw_halving, draw_heads, draw_surrogate
from pretrain import SCORES, Monitor, autocast, clock
from views import VIEW_SPACE

# NASiam takes 4,800 AdamW steps at lr 1e-3. Adam moves an alpha by about lr per step, so a shorter search at that lr
# would leave its alphas undecided. --arch-lr therefore defaults to 4.8 / steps: at least 1e-3 for heads, and clamped to
# 0.01 .. 0.1 for a backbone.
TRAVEL = 4.8


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    pretrain.training_flags(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--space", nargs="+", choices=["heads", "views", *SPACES], default=["heads"], help="to search")
    text = "default: supernet with a backbone in --space, else halving with views, else gradient"
    group.add_argument("--strategy", choices=["supernet", "halving", "gradient"], help=text)
    group.add_argument("--target-macs", help="40e6, resnet18 or 0.5xresnet18; default: the handcrafted network's")
    group.add_argument("--target-ms", type=float, help="or: longest forward pass on this device, in milliseconds")
    group.add_argument("--latency-batch", type=int, default=1, help="batch size of the pass that --target-ms limits")
    group.add_argument("--recalibrate-batches", type=int, default=50, help="batches to recalibrate BN statistics with")
    group = parser.add_argument_group("search by supernet or halving")
    group.add_argument("--score", choices=list(SCORES), default="infonce", help="what is better; knn needs labels")
    text = "default: 100 subnets to score; 16 to train with halving, which adds a quarter of proposals"
    group.add_argument("--candidates", type=int, help=text)
    text = "networks a supernet search trains alone at the end; from 6 on, it adds a quarter of proposals"
    group.add_argument("--finalists", type=int, default=8, help=text)
    text = "epochs of networks that are trained alone; default: --epochs / 3, by gradient / 12 (0: no comparison)"
    group.add_argument("--final-epochs", type=int, help=text)
    group.add_argument("--join", nargs="+", default=[], metavar="FILE", help="arch.json files to add as finalists")
    group = parser.add_argument_group("search by gradient")
    group.add_argument("--arch-lr", type=float, help=f"of the alphas; left out, about {TRAVEL} / their steps")
    group.add_argument("--arch-weight-decay", type=float, default=1e-3, help="of the heads' alphas")
    group.add_argument("--arch-warmup", type=float, default=0.25, help="share of the steps on weights alone, at first")
    group.add_argument("--gates", type=int, default=2, help="networks that a backbone's alpha step averages over")
    group.add_argument("--tau", type=float, nargs=2, default=[5.0, 0.5], help="of the gates, at first and at last")
    parser.add_argument("--output-dir", default="runs/search")
    return parser


def check_flags(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of the flags with --strategy and its defaults filled in. Raises ValueError for flags that contradict each
    other."""
    args = argparse.Namespace(**vars(args))
    backbones = [name for name in args.space if name in SPACES]
    space = " ".join(args.space)
    if len(set(args.space)) < len(args.space) or len(backbones) > 1:
        raise ValueError(f"--space {space}: name one backbone space at the most, and nothing twice")
    if args.strategy is None:
        args.strategy = "supernet" if backbones else "halving" if "views" in args.space else "gradient"
    if args.strategy == "supernet" and not backbones:
        raise ValueError(f"--strategy supernet is for backbones: --space {' or '.join(SPACES)}")
    if args.strategy == "gradient" and "views" in args.space:
        raise ValueError("--strategy gradient has no gradient to views: choose supernet or halving")
    if backbones and args.arch != get_parser().get_default("arch"):
        raise ValueError(f"--arch means nothing where a backbone is searched (--space {backbones[0]}): leave it out")
    if "heads" in args.space and args.heads != "default":
        raise ValueError("--heads means nothing where heads are searched: leave it out, or heads out of --space")
    for flag, value in (("--target-macs", args.target_macs), ("--target-ms", args.target_ms)):
        if not backbones and value is not None:
            raise ValueError(f"{flag} means nothing to --space {space}: name a backbone space too")
    if args.target_macs is not None and args.target_ms is not None:
        raise ValueError("--target-macs and --target-ms: give one of them")
    if "heads" in args.space and METHODS[args.method].classifies_instances:
        raise ValueError(f"--method {args.method} has no heads to search: choose --space {' or '.join(SPACES)}")
    of_views = (*VIEW_SPACE, "global_scale", "local_scale", "local_size")
    if "views" in args.space and (turned := [k for k in of_views if getattr(args, k) is not None]):
        raise ValueError(f"{launch.dashed(turned[0])} means nothing where views are searched: leave it out")
    if min(args.tau) <= 0:
        raise ValueError(f"--tau {args.tau[0]:g} {args.tau[1]:g}: must be above 0")
    if not 0 <= args.arch_warmup < 1:
        raise ValueError(f"--arch-warmup {args.arch_warmup:g}: must be a share, 0 up to 1")
    if args.candidates is None:
        args.candidates = 16 if args.strategy == "halving" else 100
    if args.final_epochs is None:
        args.final_epochs = max(1, round(args.epochs / (12 if args.strategy == "gradient" else 3)))
    if backbones and args.drop_path:
        raise ValueError("--drop-path means nothing where a backbone is searched: it is for a ViT")
    if args.score == "held_out_loss" and ("views" in args.space or METHODS[args.method].classifies_instances):
        raise ValueError("--score held_out_loss compares neither views nor a method that knows no held-out image")
    if args.join and args.strategy != "supernet":
        raise ValueError(f"--join means nothing to --strategy {args.strategy}: it adds to a supernet's finalists")
    least = {"gates": 1, "latency_batch": 1, "finalists": 2}
    least["candidates"] = 20 if args.strategy == "supernet" else 2  # the surrogate's regression needs 20
    least["final_epochs"] = 0 if args.strategy == "gradient" else 1  # 0: no comparison with the handcrafted
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"{launch.dashed(name)} {getattr(args, name)}: must be {low} or above")
    if args.target_ms is not None and args.target_ms <= 0:
        raise ValueError(f"--target-ms {args.target_ms:g}: must be above 0")
    if args.strategy == "halving" and (args.bench or args.profile):
        raise ValueError("--bench and --profile look at a supernet's steps; for halving give them to pretrain.py")
    return args


# ---- the supernet and its steps -------------------------------------------------------------------------------------


class AlphaGradients:
    """Gradients of the loss with respect to all A alphas: a vector (A,) for each alpha step of the epoch."""

    def __init__(self, device: torch.device):
        self.device, self.steps = device, []

    def add(self, gradients: list[Tensor]) -> None:
        self.steps.append(torch.cat([g.flatten() for g in gradients]))

    def signal(self) -> float:
        """Signal-to-noise ratio of one step's gradient: RMS over alphas of mean / standard deviation, corrected for
        chance. At a ratio of s it takes about 1 / s^2 steps to learn an alpha's direction; fewer are a random walk."""
        gradients, n = torch.stack(self.steps).double(), len(self.steps)
        if n < 4:
            return 0.0
        t2 = gradients.mean(0) ** 2 / (gradients.var(0) / n).clamp(min=1e-30)  # of noise: (n - 1) / (n - 3) on average
        return math.sqrt(max(0.0, t2.mean().item() * (n - 3) / (n - 1) - 1) / n)

    def dead(self, names: list[str]) -> list[str]:
        """Names of the alphas whose gradient was zero in every step of the epoch."""
        moved = torch.stack(self.steps).abs().amax(0) > 0
        return [name for name, got in zip(names, moved.tolist(), strict=True) if not got]

    def state_dict(self) -> dict[str, Tensor]:
        return {"steps": torch.stack(self.steps)} if self.steps else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = list(state["steps"].to(self.device)) if state else []


class Search:
    """A searchable network, its weights and alphas, and an optimiser for each.

    By gradient, alphas and weights learn from disjoint halves of the images, so that alphas cannot fit what the weights
    have memorised. A method that classifies instances (DIET) has no classes for images that the weights have not seen:
    on these its loss would end above chance. There both learn from all images, in different orders and augmentations.
    So the alphas see new views of known classes, and never, as in a single-level search, the weights' own batch.
    """

    def __init__(self, task: Task):
        args, device = self.args, self.device = task.args, task.device
        self.task, self.images, self.space, self.cost = task, task.images, task.space, task.cost
        self.by_gradient = args.strategy == "gradient"
        parts = 1 if METHODS[args.method].classifies_instances or not self.by_gradient else 2
        self.held_out, *self.rows = pretrain.split(self.images, args, parts)
        self.stats = channel_stats(self.images.pixels)
        self.multi_crop = pretrain.build_multi_crop(args, self.images, self.stats, device)
        rows = torch.cat(self.rows)
        self.monitor = Monitor(args, self.images, self.stats, self.held_out, rows, self.multi_crop, device)

        torch.manual_seed(args.seed)
        if self.space:
            encoder = SearchBackbone(self.space, args.width, task.stem)
        else:
            encoder = pretrain.build_encoder(args, task.arch, task.stem)
        if self.by_gradient and "heads" in args.space:
            spaces = METHODS[args.method].heads(encoder.feature_dim, args.out_dim)
            self.dims = {name: models.head_dims(*head) for name, head in spaces.items()}
            self.operations, heads = None, {name: SearchHead(dims) for name, dims in self.dims.items()}
            self.heads = heads
        else:
            self.dims, self.heads = {}, {}
            self.operations, heads = pretrain.build_heads(args, encoder.feature_dim)
        n_images = min(map(len, self.rows))  # a queue is for a part
        self.method = pretrain.build_method(args, encoder, heads, n_images, self.multi_crop, device)
        self.choices = encoder.choices if self.space else None
        self.batches = self.batches_of(self.rows[0])
        self.alpha_batches = self.batches_of(self.rows[-1], purpose=ALPHAS)
        self.total = args.epochs * self.batches.steps_per_epoch
        # steps on weights alone
        self.warmup = round(args.arch_warmup * self.total) if self.by_gradient else self.total

        named = [(n, p) for n, p in self.method.named_parameters() if p.requires_grad and not n.endswith("alpha")]
        self.weights = [p for _, p in named]
        self.optimizer = optimizer_of(named, self.method, args)
        self.alpha_optimizer = alpha_optimizer_of(self)
        self.alphas = [alpha for group in self.alpha_optimizer.param_groups for alpha in group["params"]]
        for alpha in self.alphas:
            alpha.requires_grad_(False)
        self.gradients = AlphaGradients(device)
        # a sampled network leaves weights without gradients
        self.model = distributed(self.method, find_unused_parameters=self.space is not None)
        torch.backends.cudnn.benchmark = device.type == "cuda" and not self.space and not args.deterministic
        self.alpha_model = self.method
        compiled = args.compile and launch.traceable(self.method)
        if compiled and self.space:  # alphas see the masked network, whose shapes stay, and weights the sampled one
            self.alpha_model = torch.compile(self.method, mode=args.compile_mode)
        elif compiled:
            self.method.compile(mode=args.compile_mode)

    def batches_of(self, rows: Tensor, **options) -> Batches:
        how = {"seed": self.args.seed, **options}
        return Batches(self.images.pixels, rows, self.multi_crop, self.args.batch_size, self.device, **how)

    def sample(self, step: int, alphas: bool, gate: int = 0) -> None:
        """Sets the gates for one step. alphas: with gradients to these. In the warm-up of a gradient search every other
        step takes the largest network. A supernet takes a random network near the target."""
        if not self.space:
            return
        for alpha in self.alphas:
            alpha.requires_grad_(alphas)
        if not self.by_gradient:
            self.choices.set(self.near_target(step))
            return
        if step < self.warmup and step % 2:
            self.choices.set(self.choices.largest)
            return
        first, last = self.args.tau
        progress = max(0.0, (step - self.warmup) / max(1, self.total - self.warmup))
        rng = np.random.default_rng((self.args.seed, GATES, int(alphas), step, gate))
        self.choices.sample(first * (last / first) ** progress, rng)

    def near_target(self, step: int) -> list[int]:
        """The subnet that a supernet's step trains. Sampling starts in a band of .5 to 1.05 of the target, and narrows
        over the first half of the steps to BAND, where the winner must be."""
        wide = max(0.0, 1 - 2 * step / self.total)
        band = BAND[0] - (BAND[0] - 0.5) * wide, BAND[1] + 0.05 * wide
        seed = np.random.SeedSequence((self.args.seed, GATES, step)).generate_state(1)[0]
        return self.cost.random(torch.Generator().manual_seed(int(seed)), band)

    def alpha_step(self, step: int) -> Tensor:
        """Returns the loss on the alphas' batch."""
        if self.space and step <= self.warmup:
            meet_target(self.choices, self.cost, 100)
        views, index = self.alpha_batches(step)
        losses, gradients = [], []
        for gate in range(self.args.gates if self.space else 1):
            self.sample(max(step, self.warmup), alphas=True, gate=gate)
            found = alpha_gradients(self.method, self.alpha_model, views, index, self.alphas, self.weights)
            losses.append(found[0])
            gradients.append(found[1])
        for alpha, *several in zip(self.alphas, *gradients):
            alpha.grad = mean_over_ranks(torch.stack(several).mean(0))
        self.gradients.add([alpha.grad for alpha in self.alphas])
        self.alpha_optimizer.step()
        self.alpha_optimizer.zero_grad()
        if self.space:
            meet_target(self.choices, self.cost, 2)
        return torch.stack(losses).mean()

    def weight_step(self, step: int) -> Tensor:
        """Returns the loss on the weights' batch."""
        views, index = self.batches(step)
        self.sample(step, alphas=False)
        with autocast(self.args, self.device):
            loss = self.model(views, index)
        loss.backward()
        if step < self.args.freeze_last_layer * self.batches.steps_per_epoch:
            self.method.drop_last_layer_grad()
        if self.args.clip_grad:
            clip_gradients(self.method, self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step((step + 1) / self.total)
        return loss

    # ---- what is found

    def choice(self) -> list[int]:
        """The network that alphas favour so far; for a supernet, which has none, the handcrafted one scaled to the
        band."""
        scores = self.choices.log_probabilities() if self.by_gradient else models.handcrafted_scores(self.space)
        return self.cost.derive(scores)

    def alpha_names(self) -> list[str]:
        """Names of all entries of the alphas, in the order of `gradients`."""
        names = []
        for head_name, head in self.heads.items():
            names += [f"{head_name} {layer + 1} {op}" for layer in range(len(head.alpha)) for op in OPS]
        for kind, alpha in (self.choices.alphas() if self.space else {}).items():
            stages, options = alpha.shape
            names += [f"stage {s + 1}'s {kind} {o + 1}" for s in range(stages) for o in range(options)]
        return names

    def state(self) -> dict:
        """Alphas, their entropy and what they favour so far, for each head and the backbone."""
        if not self.by_gradient:
            return {}
        state = {
            "alphas": {name: head.alpha.detach().softmax(1).tolist() for name, head in self.heads.items()},
            "entropy": {name: head.entropy() for name, head in self.heads.items()},
            "ops": {name: head.discretise() for name, head in self.heads.items()},
        }
        if self.space:
            for kind, alpha in self.choices.alphas().items():
                p = alpha.detach().double().softmax(1)
                state["alphas"][kind] = p.tolist()
                state["entropy"][kind] = (torch.special.entr(p).sum(1) / math.log(p.shape[1])).tolist()
            state["expected_cost"] = self.cost.expected(self.choices).item()
            state["arch"] = self.space.arch(self.choice())
        return state

    def subnet(self, choice: list[int]) -> Method:
        """A copy of the method with a subnet in place of the supernet, whose BN statistics it still has."""
        method = copy.deepcopy(self.method)
        for name, child in method.named_children():
            if isinstance(child, SearchBackbone):
                setattr(method, name, child.subnet(choice))
        return method

    def recalibrated_subnet(self, choice: list[int], n_batches: int) -> Method:
        """As `subnet`, with BN statistics of n_batches of training images."""
        method = self.subnet(choice)
        batches = self.batches_of(self.rows[0], purpose=RECALIBRATION, shuffle=False)
        with autocast(self.args, self.device):
            models.recalibrate(method, map(batches, range(n_batches)), lambda batch: method.outputs(*batch))
        for name, statistic in method.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                mean_over_ranks(statistic)  # each rank has seen its part of the batches
        return method


def alpha_gradients(
    method: nn.Module, model: Callable, views: list[Tensor], index: Tensor, alphas: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """(loss, its gradient to each alpha) of one batch, first order. Weights and buffers of the method do not change.
    model: the method, or its compiled form.

    In fp32: in bf16 these gradients are 6 to 20 % off, and one had the opposite sign. With the weights held constant
    nothing below the first choice needs a graph: where heads alone are searched, the encoder runs forward only. The
    gradients are those of a full backward to the last bit.
    """
    for p in weights:
        p.requires_grad_(False)
    for a in alphas:
        a.requires_grad_(True)
    before = [b.clone() for b in method.buffers()]
    try:
        loss = model(views, index)
        gradients = torch.autograd.grad(loss, alphas)
        return loss.detach().clone(), [g.clone() for g in gradients]  # the next gate's CUDA graph overwrites them
    finally:
        with torch.no_grad():
            for b, old in zip(method.buffers(), before):
                b.copy_(old)
        for a in alphas:
            a.requires_grad_(False)
        for p in weights:
            p.requires_grad_(True)


def meet_target(choices: Choices, cost: Cost, iterations: int) -> None:
    """Moves the alphas as little as possible so that E[cost] is in BAND of the target, by Newton's method along its
    gradient. The host does not wait for the device."""
    alphas = list(choices.alphas().values())
    for _ in range(iterations):
        choices.requires_grad_(True)
        expected = cost.expected(choices)
        gradients = torch.autograd.grad(expected, alphas)
        choices.requires_grad_(False)
        expected = expected.detach()
        newton = (expected - statistics.mean(BAND)) / sum(g.square().sum() for g in gradients).clamp(min=1e-12)
        largest = newton.abs() * torch.stack([g.abs().max() for g in gradients]).max()
        newton = newton / largest.clamp(min=1)  # by 1 at the most: softmax saturates
        newton = torch.where((expected >= BAND[0]) & (expected <= BAND[1]), 0.0, newton)
        with torch.no_grad():
            for alpha, gradient in zip(alphas, gradients):
                alpha -= newton * gradient


def alpha_optimizer_of(search: Search) -> torch.optim.Optimizer:
    """AdamW: a group for the heads' alphas and one for the backbone's."""
    args, groups = search.args, []
    steps = max(1, search.total - search.warmup)
    if search.heads:
        lr = max(1e-3, TRAVEL / steps) if args.arch_lr is None else args.arch_lr
        alphas = [head.alpha for head in search.heads.values()]
        groups.append({"params": alphas, "lr": lr, "weight_decay": args.arch_weight_decay})
    if search.space:
        lr = min(0.1, max(1e-2, TRAVEL / steps)) if args.arch_lr is None else args.arch_lr
        alphas = list(search.choices.alphas().values())
        groups.append({"params": alphas, "lr": lr, "weight_decay": 0.0, "betas": (0.5, 0.999)})
    return with_state(torch.optim.AdamW(groups, fused=False), search.method)


def train(search: Search, meter: Meter, checkpoint: Checkpoint) -> None:
    """The training loop: weight steps, each after an alpha step once a gradient search's warm-up is over. Every epoch
    adds a line to checkpoint.history."""
    args, total, per_epoch = search.args, search.total, search.batches.steps_per_epoch
    warmup = warmup_steps(args, search.optimizer, per_epoch)
    profiler = pretrain.profiler_of(args, checkpoint.folder)

    def look() -> dict:
        if not search.space:
            return search.monitor(search.method)
        return search.monitor(search.recalibrated_subnet(search.choice(), min(10, args.recalibrate_batches)))

    if not checkpoint.history:
        checkpoint.history.append({"epoch": 0, **search.state(), **look()})
    with checkpoint:
        begun = time.time()
        for step in range(checkpoint.step, total):
            pretrain.seed_step(args.seed, step)
            lr = set_lr(search.optimizer, step, warmup, total)
            losses = {"alpha_loss": search.alpha_step(step)} if step >= search.warmup else {}
            losses["loss"] = search.weight_step(step)
            meter.add(step, lr, **losses)
            meter.print(step)
            if (step + 1) % per_epoch == 0:
                epoch, means, state = (step + 1) // per_epoch, meter.end_epoch(), search.state()
                facts = look() if search.monitor.due(epoch) else {}
                more = alpha_facts(search, state, facts) if search.by_gradient else ""
                more += pretrain.in_words(facts)
                say(f"epoch {epoch}/{args.epochs}  loss {means['loss']:.4f}{meter.speed(step)}{more}")
                pretrain.warn(search.method, facts, means["loss"], args.batch_size, step + 1)
                line = {"epoch": epoch, **means, "lr": lr, **facts, **state, **pretrain.resources(begun, search.device)}
                checkpoint.log(line)
                pretrain.save_curves(checkpoint.history, search.method.chance(args.batch_size), checkpoint.folder)
                begun = time.time()
                meter.restart()
            checkpoint.after_step(step + 1)
            if profiler:
                profiler.step()


def alpha_facts(search: Search, state: dict, facts: dict) -> str:
    """The alphas' part of an epoch's line on the console. Adds their signal to the epoch's facts."""
    more = f"  alpha entropy {statistics.mean(e for layers in state['entropy'].values() for e in layers):.3f}"
    if len(search.gradients.steps) > 1:
        if dead := search.gradients.dead(search.alpha_names()):
            say(f"warning: no gradient in this epoch for the alphas of {', '.join(dead)}")
        facts["alpha_signal"] = search.gradients.signal()
        more += f"  signal {facts['alpha_signal']:.2f}"
    search.gradients.steps = []
    if search.space:
        more += f"  E[{search.cost.unit}] {state['expected_cost']:.3f} of the target"
    return more


def bench(search: Search, steps: int = 15, warm_up: int = 3) -> dict:
    """Prints and returns the time of an iteration (weight and alpha step) and its ratio to a base: for heads the weight
    step alone, for a backbone by gradient a plain step of the largest network, for a supernet one of the handcrafted
    network scaled to the target."""
    args, device = search.args, search.device
    # late steps, as most are: alphas move, and a supernet's band is narrow
    last = search.warmup if search.by_gradient else search.total // 2
    variants = {"weight step": lambda step: search.weight_step(last + step)}
    if search.by_gradient:
        variants["alpha step"] = lambda step: search.alpha_step(last + step)
    base = "weight step"
    if search.space:
        base = "plain step of the largest" if search.by_gradient else "plain step of a network of the target"
        variants[base] = plain_step_of(search, search.choices.largest if search.by_gradient else search.choice())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(warm_up + steps):
        for name, variant in variants.items():
            begun = clock(device)
            variant(step)
            if step >= warm_up:
                seconds[name].append(clock(device) - begun)
    average = statistics.mean if search.space else statistics.median  # sampled networks differ in size
    took = {name: average(times) for name, times in seconds.items()}
    for name, seconds_a_step in took.items():
        say(f"{name}: {1e3 * seconds_a_step:.1f} ms")
    iteration = took["weight step"] + took.get("alpha step", 0.0)
    ratio = iteration / took[base]
    say(f"an iteration is {ratio:.3f} times a {base}" + (" network" if base.endswith("largest") else ""))
    return {"seconds": took, "ratio": ratio, "images_per_s": args.batch_size / iteration}


def plain_step_of(search: Search, choice: list[int]) -> Callable[[int], None]:
    """step -> None: a training step of a subnet alone, on a copy."""
    method = search.recalibrated_subnet(choice, 1)
    optimizer = optimizer_of(list(method.named_parameters()), method, search.args)
    batches = search.batches_of(search.rows[0], purpose=RECALIBRATION)  # streamed batches of the search are read ahead

    def plain_step(step: int) -> None:
        views, index = batches(step)
        with autocast(search.args, search.device):
            loss = method(views, index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return plain_step


# ---- scores of subnets, and what they say of choices ----------------------------------------------------------------


def score_candidates(search: Search, folder: Path) -> tuple[list[list[int]], np.ndarray]:
    """Scores random subnets in the band with the supernet's weights on two halves of the held-out images: (choices,
    scores (N, 2)), higher is better. Resumes from scores.json. Subnets whose score is not finite are left out."""
    args, path, halves = search.args, folder / "scores.json", (search.held_out[::2], search.held_out[1::2])
    rows = from_main(load_json(str(path))["scored"] if path.exists() else [])
    choices = drawn(search.cost, args.candidates, args.seed)
    begun, before, shown = time.time(), len(rows), time.time()
    for choice in choices[before:]:
        method = models.use_batch_statistics(search.subnet(choice))
        scores = from_main([search.monitor.score(args.score, method, half) for half in halves])
        rows.append({"choice": choice, "scores": scores if np.isfinite(scores).all() else None})
        write_json({"score": args.score, "scored": rows}, path)
        if rows[-1]["scores"] is None:
            say(f"left out, its {args.score} is not finite: {models.describe(search.space.arch(choice))}")
        if time.time() - shown > 10 or len(rows) == len(choices):
            shown = time.time()
            best = SCORES[args.score] * max(statistics.mean(row["scores"] or [-math.inf]) for row in rows)
            eta = timedelta(seconds=round((shown - begun) / (len(rows) - before) * (len(choices) - len(rows))))
            say(f"scored {len(rows)} of {len(choices)}, best {args.score} {best:.4g}  ETA {eta}")
    good = [row for row in rows if row["scores"] is not None]
    if len(good) < 10:
        raise ValueError(
            f"{len(good)} of {len(rows)} scored networks have a finite {args.score}, which is too few: try another "
            "target, or a lower --lr"
        )
    return [row["choice"] for row in good], np.array([row["scores"] for row in good])


class Surrogate(NamedTuple):
    """A score is a constant and the sum of what each value of each choice in each stage is worth."""

    space: Space
    worth: np.ndarray  # (F,), whose sum over the values of a stage's choice is zero
    error: np.ndarray  # (F,), standard errors
    r2: float  # of networks that it was not fitted to, by ten-fold cross-validation
    penalty: float

    def option_scores(self) -> Tensor:
        """(S, O), as Cost.derive takes them."""
        n = len(self.space.stages)
        rows = [[o] * n for o in range(len(self.space.options))]
        one_hot = values_of(self.space, rows).reshape(len(rows), n, -1)  # (O, S, F / S)
        return torch.from_numpy(np.einsum("osf,sf->so", one_hot, self.worth.reshape(n, -1)))


def values_of(space: Space, choices: list[list[int]]) -> np.ndarray:
    """One-hot features (N, F) of networks: the value of each choice, stage by stage."""
    sizes = [len(values) for values in space.choices.values()]
    places = np.stack(np.unravel_index(np.array(choices), sizes), -1)  # (N, S, C)
    one_hot = [np.eye(size)[places[..., c]] for c, size in enumerate(sizes)]  # (N, S, size) each
    return np.concatenate(one_hot, -1).reshape(len(choices), -1)


def fit(space: Space, choices: list[list[int]], y: np.ndarray) -> Surrogate:
    """A ridge regression whose penalty is the best in cross-validation."""
    x, folds = values_of(space, choices), np.arange(len(y)) % 10

    def left_over(penalty: float) -> float:
        predicted = np.empty_like(y)
        for fold in range(10):
            rest = folds != fold
            weights, _ = ridge(x[rest], y[rest], penalty)
            predicted[~rest] = y[rest].mean() + (x[~rest] - x[rest].mean(0)) @ weights
        return np.square(y - predicted).sum()

    penalty = min((0.1, 0.3, 1.0, 3.0, 10.0, 30.0), key=left_over)
    weights, error = ridge(x, y, penalty)
    r2 = 1 - left_over(penalty) / max(1e-30, np.square(y - y.mean()).sum())
    return Surrogate(space, weights, error, r2, penalty)


def knowledge(surrogate: Surrogate, scores: np.ndarray) -> tuple[str | None, str]:
    """(why the scores cannot be used, or None; a summary in words). Their noise is estimated from the difference
    between the halves of the held-out images. That they rank networks as training them alone does is not checked."""
    noise = (scores[:, 0] - scores[:, 1]).std(ddof=1) / 2
    spread = scores.mean(1).std(ddof=1)
    ratio = spread / max(noise, 1e-30)
    agree = np.corrcoef(scores.T)[0, 1] if scores.std(0).min() > 0 else 0.0
    said = (
        f"scores of {len(scores)} networks spread {ratio:.1f} times their noise (two halves of the images correlate by "
        f"{agree:.2f}); the surrogate explains {100 * surrogate.r2:.0f} % of those that it has not seen"
    )
    if ratio < math.sqrt(2):  # less than half of their variance is the networks'
        return "the supernet cannot tell its networks apart", said
    if surrogate.r2 < 0.3:
        return "what a choice is worth depends on the others too much for the surrogate", said
    return None, said


def finalists_of(
    task: Task, surrogate: Surrogate, choices: list[list[int]], scores: np.ndarray, knows: bool
) -> list[Candidate]:
    """The handcrafted network, those of --join, the surrogate's best network, the best ones of surrogates of resampled
    scores, which differ where the surrogate is not sure, and at least a quarter random ones. knows: False for random
    ones in place of the surrogates'. If heads or views are searched too, every second one has random ones."""
    args, rng = task.args, random.Random(task.args.seed)
    first = handcrafted(task)
    found, known = {first.name: first}, {json.dumps(first.arch)}

    def add(name: str, arch: str | dict, fitted: bool = False) -> None:
        if json.dumps(arch) not in known and len(found) < args.finalists and (fitted or fits(task, arch)):
            known.add(json.dumps(arch))
            rest = random_rest(task, arch, rng) if len(found) % 2 else (None, None)
            found[name] = Candidate(name, arch, *rest)

    for path in args.join:
        arch = load_arch(path)
        add(path, BACKBONES[arch] if isinstance(arch, str) else arch)
    if knows:
        add("surrogate", fitting(task, surrogate.option_scores()), fitted=True)
        resample, y, x = np.random.default_rng(args.seed), scores.mean(1), values_of(task.space, choices)
        for k in range(10 * args.finalists):
            if len(found) >= args.finalists - args.finalists // 4:
                break
            rows = resample.integers(len(y), size=len(y))
            weights, _ = ridge(x[rows], y[rows], surrogate.penalty)
            resampled = surrogate._replace(worth=weights)
            add(f"surrogate {k + 2}", task.space.arch(task.cost.derive(resampled.option_scores())))
    for k, choice in enumerate(drawn(task.cost, args.finalists, args.seed + 2 * 10**6)):
        add(f"random {k + 1}", task.space.arch(choice))
    return list(found.values())


# ---- the script -----------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> dict:
    """Returns what it writes as arch.json; {} after --bench."""
    command, asked = command_line(Path(__file__).name, get_parser(), args), args
    with user_errors():
        args, device = pretrain.start(check_flags(asked))
        task = task_of(args, device, asked)
        folder = Path(args.output_dir)
        search = None if args.strategy == "halving" else Search(task)
        announce(task, search)
        if args.bench:
            pretrain.write_bench(args, bench(search), device, command)
            return {}
        checkpoint, meter = checkpoint_of(task, search, command)
        handle = lock(folder / ".search.lock") if is_main() else None  # one process, or one of several ranks, at a time
        if is_main() and handle is None:
            raise ValueError(f"another process is at work in '{folder}': wait, or choose another folder")
    with nullcontext() if handle is None else os.fdopen(handle):
        if len(checkpoint.starts) == 1 and is_main():  # what another run has left here
            (folder / "scores.json").unlink(missing_ok=True)
            shutil.rmtree(folder / "finalists", ignore_errors=True)
        barrier()
        if search:
            train(search, meter, checkpoint)
        else:
            with checkpoint:
                checkpoint.after_step(0)  # it has no steps of its own, but another command is refused from now on
        return find(task, search, command, checkpoint.history)


def find(task: Task, search: Search | None, command: str, history: list[dict]) -> dict:
    """What follows the training steps: finalists, halving, and the files in the folder. Returns arch.json."""
    args, folder = task.args, Path(task.args.output_dir)
    found = {
        "space": args.space,
        "strategy": args.strategy,
        "method": args.method,
        "data": args.data,
        "seed": args.seed,
        "command": command,
        "versions": versions(),
        "backbone": {"arch": task.arch, "width": args.width, "stem": task.stem},
    }
    run = None
    with user_errors():
        if args.strategy == "gradient":
            heads = {name: head.discretise() for name, head in search.heads.items()} or search.operations
            arch = fitting(task, search.choices.log_probabilities()) if task.space else task.arch
            winner = Candidate("found", arch, heads)
            found["alphas"] = history[-1]["alphas"]
            if args.final_epochs and len(search.held_out) >= 16:
                found["alone"] = beside_handcrafted(task, winner, folder)
        else:
            if search:
                candidates, found["supernet"] = from_supernet(search, history, folder)
            else:
                candidates = remembered(folder, "candidates", partial(random_candidates, task, args.candidates))
            winner, run, found["halving"] = halving(task, candidates, folder)
        facts = write_results(task, search, winner, run, found, history)
    report(task, search, winner, facts, history, found)
    path = folder / "arch.json"
    pictures = ", ".join(sorted(file.name for file in folder.glob("*.svg")))
    say(f"wrote {path}; pictures beside it: {pictures}; next:\n{next_command(task, winner, path)}")
    return found


def from_supernet(search: Search, history: list[dict], folder: Path) -> tuple[list[Candidate], dict]:
    """(finalists, facts for arch.json on scores and surrogate), some of which it prints."""
    choices, scores = score_candidates(search, folder)
    surrogate = fit(search.space, choices, scores.mean(1))
    unknown, said = knowledge(surrogate, scores)
    last = history[-1]
    if pretrain.plateau(last["loss"], search.method.chance(search.args.batch_size), search.total):
        unknown = "the supernet's loss is that of chance"
    say(said)
    if unknown:
        say(f"warning: {unknown}: the finalists are random networks")
    draw = partial(finalists_of, search.task, surrogate, choices, scores, not unknown)
    finalists = remembered(folder, "candidates", draw)
    values = [(name, value) for name, values in search.space.choices.items() for value in values]
    labels = [f"stage {s + 1} {name} {value:g}" for s in search.space.stages for name, value in values]  # as values_of
    worth = {name: [w, e] for name, w, e in zip(labels, surrogate.worth.tolist(), surrogate.error.tolist())}
    facts = {"said": said, "unknown": unknown, "r2": surrogate.r2, "worth and standard error": worth}
    return finalists, facts


def announce_cost(task: Task, supernet_steps: int, step_seconds: float | None = None) -> None:
    """Prints what each part of the search will cost, in training steps of a network of the target size."""
    args = task.args
    held_out, rows = pretrain.split(task.images, args)
    per_epoch = len(rows) // args.batch_size
    n = args.finalists if supernet_steps else args.candidates
    parts = {}
    if supernet_steps:
        parts["supernet"] = supernet_steps
        parts["scores"] = args.candidates * len(held_out) / args.batch_size / 3  # forward passes: 1/3 of a step
    proposed = proposals_of(n) if task.space else 0
    parts["halving"] = halving_epochs(n, args.final_epochs, proposed) * per_epoch
    total = sum(parts.values())
    said = ", ".join(f"{name} {steps:,.0f}" for name, steps in parts.items())
    minutes = f", about {total * step_seconds / 60:.1f} minutes" if step_seconds else ""
    say(
        f"the search costs {total:,.0f} steps of a network of the target at most ({said}): {total / per_epoch:.0f} "
        f"epochs, {total / per_epoch / args.epochs:.1f} times --epochs{minutes}"
    )


def step_seconds(search: Search) -> float:
    """Of a training step of a network of the target: the median of three."""
    plain_step, times = plain_step_of(search, search.choice()), []
    for step in range(4):
        begun = clock(search.device)
        plain_step(step)
        times.append(clock(search.device) - begun)
    return statistics.median(times[1:])


def next_command(task: Task, winner: Candidate, path: Path) -> str:
    """The command that pre-trains with what was found."""
    parser = pretrain.get_parser()
    flags = {name: getattr(task.asked, name, default) for name, default in vars(parser.parse_args([])).items()}
    flags["output_dir"] = str(path.parent.with_name(f"{path.parent.name}-found"))
    flags |= winner.views or {}
    if task.space:
        flags["arch"] = str(path)
    if "heads" in task.args.space and winner.heads:
        flags["heads"] = str(path)
    return command_line("pretrain.py", parser, argparse.Namespace(**flags))


def announce(task: Task, search: Search | None) -> None:
    """Prints what is searched, the size of the space, the split of the images, learning rates and cost."""
    args = task.args
    say(
        f"{args.method}, {' and '.join(args.space)} by {args.strategy}, x{args.width:g}, {len(task.images.pixels):,} "
        f"images of {task.size} px, {pretrain.machine(args, task.device)}"
    )
    if "heads" in args.space:
        dims = [models.head_dims(*head) for head in head_spaces(args, task.arch).values()]
        names, kinds, functions = (math.prod(c) for c in zip(*map(models.count_heads, dims)))
        say(f"{names:,} heads by name, {kinds:,} that differ layer by layer, {functions:,} as functions")
    if task.space:
        cost, space = task.cost, task.space
        most = cost.of([len(space.options) - 1] * len(space.stages))
        many = f"{len(space.options) ** len(space.stages):,} backbones"
        say(f"{many} of {cost.text(cost.base)} to {cost.text(most)}; the target is {cost.text(cost.target)}")
    if "views" in args.space:
        say(f"{math.prod(map(len, VIEW_SPACE.values())):,} kinds of views: {', '.join(VIEW_SPACE)}")
    if search is None:
        announce_cost(task, 0)
        return
    if search.space and args.method not in ("simclr", "moco"):
        say("a contrastive method (--method simclr or moco) is the better judge of backbones")
    learned = " + ".join(f"{len(rows):,}" for rows in search.rows)
    say(f"{learned} images to learn from, {len(search.held_out):,} held out")
    pretrain.announce(args, search.optimizer, search.total)
    if search.by_gradient:
        say("alpha lr " + " and ".join(f"{group['lr']:.2g}" for group in search.alpha_optimizer.param_groups))
    elif not args.bench:
        announce_cost(task, search.total, step_seconds(search))


def checkpoint_of(task: Task, search: Search | None, command: str) -> tuple[Checkpoint, Meter | None]:
    """(checkpoint, meter). Without a `search` there are no steps: the checkpoint holds the flags and the cost table."""
    args, folder = task.args, Path(task.args.output_dir)
    things = {"cost": task.cost} if task.cost else {}
    if search:
        operations, total = search.operations, search.total
        batches = {"loss": search.batches, "alpha_loss": search.alpha_batches}
        meter = Meter(total, batches, task.images.names, folder, args.print_every)
        things.update(method=search.method, optimizer=search.optimizer, alpha_optimizer=search.alpha_optimizer)
        things.update(meter=meter, gradients=search.gradients)
    else:
        operations, _ = pretrain.build_heads(args, 1)  # their names do not depend on the number of features
        meter, total = None, 0
    facts = pretrain.facts_of(Path(__file__).name, task.asked, task.arch, operations, task.images, pretrain.FREE_FLAGS)
    how = command, task.device, total, args.checkpoint_minutes, args.resume, None, args.tensorboard and total > 0
    return Checkpoint(folder, things, facts, *how), meter


def describe_backbone(task: Task, arch: dict) -> dict:
    """The found backbone, for arch.json; prints a summary."""
    args, cost = task.args, task.cost
    macs, parameters = models.size_of(arch, args.width, task.stem, task.size)
    facts = {"arch": arch, "width": args.width, "stem": task.stem, "image_size": task.size, "macs": macs}
    facts["parameters"] = parameters
    if cost.unit == "MACs":
        facts["target_macs"], text = cost.target, cost.text(macs)
    else:
        choice, measured = task.space.choice(arch), measured_ms(task, arch)
        facts |= {"target_ms": cost.target, "ms": measured, "predicted_ms": choice and cost.of(choice)}
        text = f"{measured:.4g} ms measured, {facts['predicted_ms'] or math.nan:.4g} predicted"
    say(f"backbone: {models.describe(arch)}, {text} of {cost.text(cost.target)}")
    return facts


def write_results(
    task: Task, search: Search | None, winner: Candidate, run: Path | None, found: dict, history: list[dict]
) -> dict:
    """Writes arch.json, pictures and weights. Returns the monitor's figures of what was found."""
    args, folder, space = task.args, Path(task.args.output_dir), task.space
    facts, encoder = history[-1] if history else {}, None
    if winner.heads and "heads" in args.space:
        found["heads"] = winner.heads
    if winner.views:
        found["views"] = winner.views
    if space:
        found["backbone"] = describe_backbone(task, winner.arch)
    if search and space and (choice := space.choice(winner.arch)):
        method = search.recalibrated_subnet(choice, args.recalibrate_batches)
        facts, encoder = search.monitor(method), method.encoder
    elif run:
        facts = {}
        if is_main():
            for name in ("backbone.pth", "backbone.json"):
                shutil.copyfile(run / name, folder / name)
    found.update({k: facts[k] for k in SCORES if space and k in facts})
    write_json(found, folder / "arch.json")
    if not is_main():
        return facts
    where = f"{args.method} on {Path(args.data).name}, x{args.width:g}, seed {args.seed}"
    pictures = {}
    if search and search.heads:
        pictures["search"] = draw_heads(history, search.dims, f"Heads found with {where}")
    if "supernet" in found:
        title = f"What a choice is worth, in {args.score} (up is better), with two standard errors: {where}"
        title += "; but scores are hardly more than noise" if found["supernet"]["unknown"] else ""
        pictures["surrogate"] = draw_surrogate(found["supernet"]["worth and standard error"], title)
    if "halving" in found and len(found["halving"]["rounds"]) > 1:
        seen = found["halving"]
        title = f"{args.score} of candidates that are trained alone (less is better): {where}"
        title = title if SCORES[args.score] < 0 else title.replace("less", "more")
        pictures["halving"] = draw_halving(seen["rounds"], winner.text(), title)
    if space:
        archs = {"found": winner.arch, space.handcrafted: BACKBONES[space.handcrafted]}
        sizes = args.width, task.stem, task.size
        networks = {name: (arch, models.size_of(arch, *sizes)[1]) for name, arch in archs.items()}
        what = "Handcrafted backbone, scaled: none better was" if winner.name == "handcrafted" else "Backbone"
        title = f"{what} found with {where}: {BAND[0]:g} to {BAND[1]:g} of {task.cost.text(task.cost.target)}"
        pictures["backbone"] = draw_backbone(networks, *sizes, title)
    for name, picture in pictures.items():
        write_atomic(picture, folder / f"{name}.svg")
    if encoder:
        what = pretrain.backbone_facts(args, winner.arch, task.stem, search.stats, found["command"])
        save_backbone(encoder, what, folder)
    return facts


def report(task: Task, search: Search | None, winner: Candidate, facts: dict, history: list[dict], found: dict) -> None:
    """Prints the heads or views found, and kNN accuracy (describe_backbone prints the backbone)."""
    if search and search.heads:
        for name, ops in winner.heads.items():
            say(f"{name}: {' '.join(models.true_name(o, *io) for o, io in zip(ops, pairwise(search.dims[name])))}")
    elif winner.heads or winner.views:
        say(f"found: {winner.text()}")
    if "knn" in facts and history and "knn" in history[0]:
        with_what = "the inherited weights" if task.space else "the search network's encoder"
        say(
            f"kNN on {len(search.held_out):,} held-out images: {100 * facts['knn']:.2f} % with {with_what}, "
            f"{100 * history[0]['knn']:.2f} % untrained"
        )
    if "alone" in found:
        say(found["alone"]["said"])


if __name__ == "__main__":
    launch.run(main, get_parser())
