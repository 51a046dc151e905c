"""Pre-trains a backbone without labels.

    torchrun pretrain.py                                                            # made-up images, a laptop
    torchrun pretrain.py --data cifar10 --width 1 --epochs 200 --batch-size 512     # one GPU
    torchrun --nproc-per-node 8 pretrain.py --data my/images --image-size 224 --arch resnet50 --width 1
    torchrun pretrain.py --heads runs/search/arch.json                              # heads that search.py found
    torchrun pretrain.py --arch runs/search/arch.json --weights runs/search/backbone.pth   # a found backbone, going on
    torchrun pretrain.py --bench                                                    # where a step's time goes

The output folder gets views.png (look at it first), log.txt (a JSON line an epoch), checkpoint.pth (the same command
again goes on from it, to the same weights) and at the end backbone.pth with backbone.json: a plain state dict that
torchvision's own model loads, and what it is.
"""

import launch  # noqa: F401  # ahead of torch: it says how threads wait

# isort: split

import argparse
import inspect
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image

from checkpoint import Keeper, load_arch, load_heads, load_weights, save_backbone, write_atomic
from data import Images, Stream, channel_stats, decoded, in_turn, load_data, split_images, to_device
from launch import (
    Parser,
    barrier,
    command_line,
    data_flags,
    mean_over_ranks,
    memory_format,
    say,
    setup,
    synced,
    user_errors,
)
from linear_eval import extract, knn_accuracy
from losses import METHODS
from models import ARCHS, VITS, SearchBackbone, SearchHead, Space, build_backbone, build_head, describe, head_dims
from optim import clip_gradients, distributed, optimizer_of, set_lr, warmup_steps
from views import RECIPES, MultiCrop, adjust

# ---- flags ----------------------------------------------------------------------------------------------------------


def training_flags(parser: Parser) -> None:
    """What search.py and pretrain.py have in common."""
    on_off = argparse.BooleanOptionalAction
    group = parser.add_argument_group("model and method")
    group.add_argument("--data", default="shapes", help="shapes (made in memory), a torchvision name or a folder")
    group.add_argument("--method", choices=list(METHODS), default="simsiam")
    group.add_argument("--arch", default="resnet18", help=f"{', '.join(ARCHS)}, or an arch.json with a backbone")
    group.add_argument("--heads", default="default", help="default (handcrafted), a preset's name, or an arch.json")
    group.add_argument("--width", type=float, default=0.25, help="times torchvision's channels; 1 is the full network")
    group.add_argument("--drop-path", type=float, default=None, help="a ViT's share of skipped branches; None is .1")
    group.add_argument("--stem", choices=["auto", "small", "imagenet"], default="auto", help="auto: small up to 64 px")
    group.add_argument("--out-dim", type=int, default=None, help="dimensions of z; None is the method's")
    group.add_argument("--temperature", type=float, default=None, help="of all but simsiam; None is the method's")
    group.add_argument("--momentum-teacher", type=float, default=None, help="of moco and dino; None is the method's")
    group.add_argument("--queue-size", type=int, default=None, help="of moco and swav; None fits it to the data")
    group.add_argument("--prototypes", type=int, default=None, help="of swav; None is 3000, fewer for few images")
    group.add_argument("--symmetric", action=on_off, default=None, help="moco: keys of both global views; None is yes")
    group.add_argument("--projector", choices=["none", "mlp"], default=None, help="None is mlp, but for diet none")
    group.add_argument(
        "--teacher", choices=["none", "ema"], default=None, help="of simsiam and moco; None is the method's"
    )
    group.add_argument("--smoothing", type=float, default=None, help="of diet's labels; None is 0.8")
    group.add_argument("--freeze-last-layer", type=float, default=1.0, help="epochs; swav's prototypes, dino's last")
    group = parser.add_argument_group("views (None is the recipe's)")
    group.add_argument("--recipe", choices=list(RECIPES), default=None, help="None is the method's")
    group.add_argument("--boundary", type=float, default=None, help="s: globals of [s, 1] of the area, locals [.05, s]")
    group.add_argument("--global-scale", type=float, nargs=2, default=None, help="shares of the area")
    group.add_argument("--local-scale", type=float, nargs=2, default=None, help="shares of the area")
    group.add_argument("--views-per-image", type=int, choices=[1, 2], default=None, help="global views; 1 is for diet")
    group.add_argument("--locals", type=int, default=None, help="number of local views")
    group.add_argument("--global-size", type=int, default=None, help="edge in pixels")
    group.add_argument("--local-size", type=int, default=None, help="edge in pixels")
    group.add_argument("--blur", type=float, nargs=3, default=None, help="probability: first global, second, locals")
    group.add_argument("--solarize", type=float, nargs=3, default=None, help="probability: as --blur")
    group.add_argument("--balance", type=float, nargs=2, default=None, help="lambda_gg, lambda_gl of pairs of views")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=12)
    group.add_argument("--batch-size", type=int, default=64, help="images a step, over all ranks together")
    group.add_argument("--optimizer", choices=["sgd", "adamw", "lars"], default=None, help="None is the method's")
    group.add_argument("--lr", type=float, default=None, help="at batch size 256, scaled with it; None is the method's")
    group.add_argument(
        "--final-lr", type=float, default=None, help="at batch size 256, scaled as --lr; None: 0, or a ViT's"
    )
    group.add_argument("--weight-decay", type=float, default=None, help="None is the method's, or the optimiser's")
    group.add_argument(
        "--final-weight-decay", type=float, default=None, help="by a cosine; None: it stays, but .4 for a ViT"
    )
    group.add_argument("--warmup-epochs", type=float, default=None, help="None: 10, a tenth of the run at most; sgd 0")
    group.add_argument("--clip-grad", type=float, default=None, help="largest norm of all gradients; None is no limit")
    group.add_argument("--held-out", type=float, default=0.1, help="share of the training images kept for the monitor")
    group.add_argument(
        "--knn-every", type=int, default=5, help="epochs between the monitor's figures; 0: the end alone"
    )
    group.add_argument("--knn-k", type=int, default=200, help="neighbours of the monitor")
    group.add_argument("--knn-t", type=float, default=0.1, help="temperature of the monitor's votes")
    group.add_argument("--amp", action=on_off, default=None, help="bf16 autocast; None: on CUDA, and on a CPU with AMX")
    group.add_argument("--compile", action=on_off, default=None, help="torch.compile; None is on CUDA alone")
    group.add_argument(
        "--compile-mode",
        choices=["default", "reduce-overhead"],
        default="default",
        help="the latter, by CUDA graphs, for small networks",
    )
    group.add_argument(
        "--sync-bn", action=on_off, default=None, help="BN over several GPUs; None: below 64 images on each"
    )
    group.add_argument("--print-every", type=int, default=50, help="steps between lines on the console")
    group.add_argument("--resume", action=on_off, default=True, help="go on from a checkpoint of this command")
    group.add_argument("--checkpoint-minutes", type=float, default=5.0, help="between checkpoints; 0: at the end alone")
    group.add_argument("--bench", action="store_true", help="time the parts of a step and stop; leaves no run behind")
    group.add_argument("--bench-json", default=None, metavar="FILE", help="what --bench says goes there too")
    group.add_argument("--profile", action="store_true", help="write a trace of steps 4 to 6 to the output folder")
    data_flags(parser)


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    training_flags(parser)
    parser.add_argument("--weights", default=None, help="a backbone.pth of --arch to start from; None starts at random")
    parser.add_argument("--output-dir", default="runs/pretrain")
    return parser


# Numbers are drawn from (--seed, what for, step): a run's batch depends on these alone, so it resumes from its step.
WEIGHTS, ALPHAS, GATES, HELD_OUT, RECALIBRATION, ORDER = range(6)


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 autocast is on by default: on a GPU, and on a CPU with AMX. AVX512-BF16 alone makes steps 1.4 to 1.6
    times as fast, but a short run learned less by it (results/README.md)."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())


# ---- what both loops need -------------------------------------------------------------------------------------------


class Run:
    """Everything that flags decide before the first step: process, images, views, network. Checks all of it first."""

    def __init__(
        self,
        args: argparse.Namespace,
        search_heads: bool = False,
        space: Space | None = None,
        parts: int = 1,
        images: Images | None = None,
    ):
        """search_heads: mixtures in place of --heads; space: its largest network in place of --arch; parts: into how
        many the training images are cut; images: what the flags of the data name, if it is loaded already."""
        for flag in ("epochs", "batch_size", "width", "print_every"):
            if getattr(args, flag) <= 0:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be above 0")
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}: must be 0 or above")
        if not 0 <= args.held_out < 1:
            raise ValueError(f"--held-out {args.held_out}: must be a share, 0 up to 1")
        if args.clip_grad is not None and args.clip_grad <= 0:
            raise ValueError(f"--clip-grad {args.clip_grad}: must be above 0")
        if args.checkpoint_minutes < 0:
            raise ValueError(f"--checkpoint-minutes {args.checkpoint_minutes}: must be above 0, or 0 for never")
        if args.bench_json and not args.bench:
            raise ValueError("--bench-json says where the figures of --bench go: give both")
        if args.bench_json and not Path(args.bench_json).parent.is_dir():
            raise FileNotFoundError(f"--bench-json '{args.bench_json}': there is no such folder")
        self.args = args
        self.rank, self.world, self.device = setup(args.device, args.deterministic)
        if args.batch_size % self.world:
            raise ValueError(
                f"--batch-size {args.batch_size} is the total over ranks and does not divide by {self.world} of them"
            )
        cuda = self.device.type == "cuda"
        self.amp = bf16_pays(self.device) if args.amp is None else args.amp
        self.compile = cuda if args.compile is None else args.compile
        torch._dynamo.reset()  # a process compiles eight networks of one class at most, and then runs eager
        torch.backends.cudnn.benchmark = cuda and space is None and not args.deterministic  # shapes are always the same
        self.arch = space.handcrafted if space else load_arch(args.arch)
        self.epochs, self.output = args.epochs, Path(args.output_dir)
        if not args.bench:
            self.output.mkdir(parents=True, exist_ok=True)
            if not os.access(self.output, os.W_OK):
                raise PermissionError(f"cannot write to --output-dir '{self.output}'")

        torch.manual_seed(args.seed)
        self.method_class = METHODS[args.method]
        self.images = images or load_data(args, args.data, "train")
        self.held_out, *self.parts = split_images(len(self.images.pixels), args.held_out, parts)
        shortest = min(len(p) for p in self.parts)
        if shortest < args.batch_size:
            raise ValueError(
                f"{shortest} training images{' in each part' * (parts > 1)} do not fill one batch of "
                f"{args.batch_size}: lower --batch-size{', --held-out' * (args.held_out > 0)} or give more images"
            )
        self.steps_per_epoch = shortest // args.batch_size
        if args.profile and self.epochs * self.steps_per_epoch < 6:
            raise ValueError(f"--profile traces steps 4 to 6, and this run has {self.epochs * self.steps_per_epoch}")
        places = torch.full((len(self.images.pixels),), -1)  # of each image among those that are trained on
        places[torch.cat(self.parts)] = torch.arange(sum(map(len, self.parts)))
        self.places = places.to(self.device)
        streamed = isinstance(self.images.pixels, Stream)
        self.pixels = self.images.pixels if streamed else self.images.pixels.to(self.device)
        self.size = self.pixels.shape[-1]
        self.stem = args.stem if args.stem != "auto" else "small" if self.size <= 64 else "imagenet"
        self.mean, self.std = channel_stats(self.images.pixels)
        knobs = ("boundary", "global_scale", "local_scale", "global_size", "local_size", "blur", "solarize", "balance")
        kind = self.method_class
        small = (args.global_size or self.size) <= 64
        usual = kind.small_recipe if kind.small_recipe and small else kind.recipe
        recipe = RECIPES[args.recipe or usual]
        counts = {"n_locals": args.locals, "n_globals": args.views_per_image}
        recipe = adjust(recipe, **counts, **{k: getattr(args, k) for k in knobs})
        if len(recipe.globals) < 2 and not self.method_class.classifies_instances:
            raise ValueError(
                f"--method {args.method} compares two views of an image, and the recipe has one: "
                "--views-per-image 2, or another --recipe"
            )
        self.views = MultiCrop(recipe, self.size, self.mean, self.std, self.device)
        method = self.build_method(search_heads, space)
        small_share = args.batch_size // self.world < 64
        method = synced(method, self.device) if args.sync_bn or (args.sync_bn is None and small_share) else method
        self.method = method.to(self.device, memory_format=memory_format(self.device))
        self.method.balance = self.views.balance
        self.drawn: dict[tuple[int, int], Future] = {}  # parameters of the steps to come, see `parameters`
        self.drawer = ThreadPoolExecutor(1)
        if self.compile:
            self.views.compile()
            if space is None:  # else sampled networks differ from step to step; search.py compiles the masked one
                self.method.compile(**self.compile_options())

    def build_method(self, search_heads: bool, space: Space | None) -> nn.Module:
        """The method with its encoder and heads: searchable, or those that flags name."""
        args = self.args
        if space:
            encoder = SearchBackbone(space, args.width, self.stem)
        else:
            drop_path = 0.1 * (describe(self.arch) in VITS) if args.drop_path is None else args.drop_path
            encoder, _ = build_backbone(self.arch, self.stem, args.width, drop_path)
        if weights := getattr(args, "weights", None):
            load_weights(encoder, weights, f"{describe(self.arch)} x{args.width:g} with the {self.stem} stem")
        self.spaces = self.method_class.heads(encoder.feature_dim, args.out_dim)
        self.specs = None if search_heads else load_heads(args.heads, list(self.spaces))
        self.heads = None  # the method's handcrafted ones
        if search_heads:
            self.heads = {name: SearchHead(head_dims(*dims)) for name, dims in self.spaces.items()}
        elif self.specs:
            spaces = {name: self.spaces[name]._replace(layers=len(ops)) for name, ops in self.specs.items()}
            self.heads = {name: build_head(self.specs[name], head_dims(*space)) for name, space in spaces.items()}
        known, options = inspect.signature(self.method_class).parameters, {}
        for option, flag in (
            ("temperature", "temperature"),
            ("momentum", "momentum-teacher"),
            ("queue_size", "queue-size"),
            ("prototypes", "prototypes"),
            ("symmetric", "symmetric"),
            ("projector", "projector"),
            ("teacher", "teacher"),
            ("smoothing", "smoothing"),
        ):
            value = getattr(args, flag.replace("-", "_"))
            if value is not None and option not in known:
                raise ValueError(f"--{flag} means nothing to --method {args.method}: leave it out")
            if value is not None:
                options[option] = value
        if "n_images" in known:
            options["n_images"] = min(map(len, self.parts))  # a queue is for a part
        return self.method_class(encoder, self.heads, args.out_dim, **options)

    def after_backward(self, done: int) -> None:
        """After `done` steps and a backward pass: no gradient for the method's last layer, if it has one, in the first
        epochs; the others clipped."""
        if done < self.args.freeze_last_layer * self.steps_per_epoch and hasattr(self.method, "last_layer"):
            for p in self.method.last_layer.parameters():
                p.grad = None
        if self.args.clip_grad is not None:
            clip_gradients(self.method, self.args.clip_grad)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()

    def compile_options(self) -> dict:
        return {"mode": self.args.compile_mode} if self.args.compile_mode != "default" else {}

    def shuffled(self, rows: Tensor, epoch: int, stream: int = WEIGHTS) -> Tensor:
        """The rows in the order of an epoch: a function of the seed and these."""
        rng = np.random.default_rng((self.args.seed, ORDER, stream, epoch))
        return rows[torch.from_numpy(rng.permutation(len(rows)))]

    def parameters(self, seed: tuple[int, ...]) -> Tensor:
        """This rank's share (V, B, P) of what a step's views are rendered from, on the device; all draw for all ranks,
        so that one or many see the same views. On a GPU the next step's are drawn by a thread while this one runs."""

        def draw(seed: tuple[int, ...]) -> Tensor:
            parameters = self.views.sample(self.args.batch_size, *self.pixels.shape[2:], np.random.default_rng(seed))
            share = parameters[:, self.share()].contiguous()
            return share.pin_memory() if self.device.type == "cuda" else share

        waiting = self.drawn.pop(seed, None)
        parameters = waiting.result() if waiting else draw(seed)
        if self.device.type == "cuda":
            following = *seed[:-1], seed[-1] + 1
            self.drawn = {k: v for k, v in self.drawn.items() if k[:-1] != seed[:-1]}
            self.drawn[following] = self.drawer.submit(draw, following)
        return parameters.to(self.device, non_blocking=True)

    def share(self) -> slice:
        """This rank's places in a batch."""
        b = self.args.batch_size // self.world
        return slice(self.rank * b, (self.rank + 1) * b)

    def batch(self, order: Tensor, step: int, seed: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        """(views, index) of this rank's share of a batch.

        order: rows of the images; step: which batch of these; index: their places among those trained on, -1 for the
        others. seed: of the views, the step that counts up last.
        """
        n = self.args.batch_size
        parameters = self.parameters(seed)
        rows, following = (order[s * n : (s + 1) * n][self.share()] for s in (step, step + 1))
        there = to_device(rows, self.device)
        if isinstance(self.pixels, Stream):
            pixels = to_device(next(in_turn(self.pixels, [rows, following])), self.device)
        else:
            pixels = self.pixels[there]
        views = self.views.render(pixels, parameters)
        return [v.contiguous(memory_format=memory_format(self.device)) for v in views], self.places[there]

    def monitor(self, knn: bool, method: nn.Module | None = None) -> dict[str, float]:
        """Of the method now: std of z and RankMe of h; and, if asked for, kNN accuracy and loss on held-out training
        images."""
        args, method, facts = self.args, method or self.method, {}

        def features(rows):
            return extract(method.encoder, self.pixels, self.mean, self.std, self.device, rows=rows.to(self.device))

        if knn and self.images.labelled and len(self.held_out):
            train, labels = torch.cat(self.parts), self.images.labels
            sets = []
            for rows in (train, self.held_out):
                h = features(rows)
                shown = decoded(self.pixels, rows)
                sets += [h[shown.to(h.device)], labels[rows[shown]]]
            facts["knn"] = knn_accuracy(*sets, args.knn_k, args.knn_t)
        h = features((self.held_out if len(self.held_out) >= 256 else self.parts[0])[:1024])
        method.eval()
        with torch.no_grad():
            z = nn.functional.normalize(method.projector(h), dim=1)
        method.train()
        facts |= {"z_std": (z.std(0).mean() * z.shape[1] ** 0.5).item(), "rankme": rankme(h)}
        return facts | (self.held_out_loss(method) if knn else {})

    @torch.no_grad()
    def held_out_loss(self, method: nn.Module) -> dict[str, float]:
        """{"held_out_loss": its mean over views of the held-out images, always the same ones, in eval mode}; {} where
        these do not fill a batch. A method that classifies instances knows no others: there it is of views that it has
        not seen, of as many training images."""
        losses = []
        images = self.parts[0][: len(self.held_out)] if method.classifies_instances else self.held_out
        method.eval()
        for step in range(len(images) // self.args.batch_size):
            views, index = self.batch(images, step, (0, HELD_OUT, step))
            with self.autocast():
                losses.append(method.loss(*method.outputs(views, index)))
        method.train()
        return {"held_out_loss": mean_over_ranks(torch.stack(losses).mean()).item()} if losses else {}

    def resources(self, start: float) -> dict[str, float]:
        """Seconds since `start`, and the most memory so far, in MiB: of the GPU, else of this process."""
        return {"seconds": time.time() - start, "peak_mib": peak_memory(self.device) / 2**20}

    def monitor_due(self, epoch: int) -> bool:
        """After `epoch` epochs."""
        every = self.args.knn_every
        return epoch == self.epochs or (every > 0 and epoch % every == 0)


def rankme(h: Tensor) -> float:
    """Effective rank of features (N, F): exp of the entropy of their singular values. RankMe, 2210.02885."""
    if not h.isfinite().all():
        return math.nan
    s = torch.linalg.svdvals(h.double())
    p = s / s.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def collapsed(facts: dict[str, float], steps: int) -> str | None:
    """A warning in words where the embedding does not tell images apart, after that many steps.

    Before some 100 of them BN's running statistics, with which the monitor sees z, still are those of the start.
    """
    if steps >= 100 and "z_std" in facts and (facts["z_std"] < 0.05 or facts["rankme"] < 1.5):
        return (
            f"the embedding has collapsed: std x sqrt(D) is {facts['z_std']:.3f} (healthy: about 1), RankMe "
            f"{facts['rankme']:.1f}. Every image gets nearly the same vector, whatever the loss says; try a lower "
            "--lr, longer --warmup-epochs, a larger --batch-size"
        )
    return None


def warn(run: Run, facts: dict[str, float], loss: float, done: int) -> None:
    """What an epoch's figures, after `done` steps, say in words."""
    for warning in (collapsed(facts, done), plateau(loss, run.method.chance(run.args.batch_size), done)):
        if warning:
            say(f"warning: {warning}")


def plateau(loss: float, chance: float | None, steps: int) -> str | None:
    """A warning in words where the loss, after that many steps, is that of a network that tells nothing apart."""
    if steps >= 100 and chance is not None and abs(loss / chance - 1) < 0.002:
        return (
            f"the loss is that of chance, ln K = {chance:.4f}. Where it stays there: a head with BN (--heads), another "
            "--lr or --temperature, for moco and dino a faster teacher (--momentum-teacher 0.9), more epochs"
        )
    return None


def announce(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The learning rate on the console, and where it may not be the right one."""
    peak = optimizer.param_groups[0]["peak"]
    base = peak * 256 / args.batch_size
    say(f"batch {args.batch_size} over all ranks, base lr {base:g} x {args.batch_size}/256 = {peak:g}")
    if args.lr is None and steps < 1000:
        say(
            f"these are {steps:,} steps, and published learning rates are for longer runs: a larger --lr may learn more"
        )


def in_words(facts: dict[str, float]) -> str:
    """What a line on the console says of an epoch's figures."""
    formats = {"normalised": "normalised {:.3f}", "z_std": "std {:.2f}", "rankme": "RankMe {:.1f}"}
    shown = ["  " + text.format(facts[name]) for name, text in formats.items() if name in facts]
    return "".join(shown) + (f"  kNN {100 * facts['knn']:.2f} (held-out)" if "knn" in facts else "")


class Console:
    """Speed, and the losses of an epoch, read from the device only when a line or a checkpoint is due."""

    def __init__(self, run: Run, total: int):
        self.run, self.total = run, total

    def begin(self, epoch: int, partial: dict[str, Tensor], **orders: Tensor) -> None:
        """An epoch; partial: what `read` gave, if it was stopped in its middle; orders: of the images, for each kind of
        loss."""
        self.start, self.views_s, self.epoch, self.orders = time.time(), 0.0, epoch, orders
        self.known = {name: partial[name].tolist() for name in orders if name in partial}
        self.waiting: dict[str, list[Tensor]] = {}
        self.lrs: list[float] = []  # of the steps whose losses wait
        self.before = self.steps = len(self.known.get("loss", []))
        self.lr = partial["lr"].item() if "lr" in partial else math.nan

    def add(self, views_s: float, lr: float, **losses: Tensor) -> None:
        """One step; losses: this rank's `loss` and, where the alphas made a step too, `alpha_loss`."""
        for name, loss in losses.items():
            self.waiting.setdefault(name, []).append(loss.detach().clone())  # CUDA graphs write over theirs
        self.views_s, self.steps, self.lr = self.views_s + views_s, self.steps + 1, lr
        self.lrs.append(lr)

    def read(self) -> dict[str, Tensor]:
        """The losses of the epoch's steps so far, means over ranks; one that is not finite stops the run."""
        for name, losses in self.waiting.items():
            known = self.known.setdefault(name, [])
            new = mean_over_ranks(torch.stack(losses).float()).tolist() if losses else []
            for i, loss in enumerate(new):
                if not math.isfinite(loss):
                    self.stop(name, loss, i - len(new), [*known, *new[:i]])
            known += new
            losses.clear()
        self.lrs.clear()
        return {name: torch.tensor(x, dtype=torch.float64) for name, x in (self.known | {"lr": self.lr}).items()}

    def stop(self, name: str, loss: float, back: int, before: list[float]) -> None:
        """Ends the run, as of a wrong command, and leaves what the loss that is not finite was computed on; back: -1
        for the last step."""
        run, n, step, lr = self.run, self.run.args.batch_size, self.steps + back, self.lrs[back]
        rows = self.orders[name][step * n : (step + 1) * n].tolist()
        facts = {"what": name, "value": str(loss), "epoch": self.epoch + 1, "step": step + 1, "lr": lr}
        facts |= {"last_finite": before[-1] if before else None, "rows": rows}
        facts["images"] = [run.images.names[i] for i in rows]
        with user_errors():
            if run.rank == 0:
                write_atomic(json.dumps(facts, indent=2) + "\n", run.output / "not-finite.json")
            barrier()
            raise ValueError(
                f"the {name.replace('_', ' ')} is {loss} at epoch {self.epoch + 1}, step {step + 1} (lr {lr:.3g}, "
                f"the last finite one {facts['last_finite']}): stopped; a checkpoint is from before, the batch is in "
                f"'{run.output / 'not-finite.json'}'. Try a lower --lr, longer --warmup-epochs or --clip-grad"
            )

    def line(self, done: int) -> None:
        """Every --print-every steps."""
        if self.steps % self.run.args.print_every == 0:
            where = f"epoch {self.epoch + 1}/{self.run.epochs} step {self.steps}/{self.run.steps_per_epoch}"
            self.text(where, self.read()["loss"].mean(), done)

    def text(self, where: str, loss: float, done: int, more: str = "") -> None:
        """done: steps of the whole run."""
        if self.steps == self.before:  # gone on from a checkpoint after the epoch's last step
            say(f"{where}  loss {loss:.4f}{more}")
            return
        seconds = (time.time() - self.start) / (self.steps - self.before)
        eta = time.strftime("%H:%M:%S", time.gmtime((self.total - done) * seconds))
        say(
            f"{where}  loss {loss:.4f}  lr {self.lr:.4f}  views {1e3 * self.views_s / (self.steps - self.before):.0f} "
            f"ms  step {1e3 * seconds:.0f} ms  {self.run.args.batch_size / seconds:,.0f} images/s  ETA {eta}{more}"
        )


def save_views(run: Run, views: list[Tensor]) -> None:
    """views.png: the views of the batch's first images, an image a column, or a row where there are more views."""
    mean, std = run.views.mean, run.views.std
    side = max(v.shape[-1] for v in views)
    n = min(16, len(views[0]), max(4, 1024 // side))
    tiles = [nn.functional.pad(v[:n] * std + mean, [0, side - v.shape[-1]] * 2, value=1.0) for v in views]
    grid = torch.stack(tiles, 0 if n >= len(views) else 1).flatten(0, 1).cpu().clamp(0, 1)
    save_image(make_grid(grid, nrow=max(n, len(views)), pad_value=1.0), run.output / "views.png")


# ---- the script -----------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has held on the GPU, or that this process has had in main memory, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_flop(run: Run, views: list[Tensor], index: Tensor) -> int:
    """Floating-point operations of a step's networks, counted: a forward pass, and twice as much backward but for
    momentum networks. (To count the backward pass itself gives too many for grouped convolutions.)"""
    counter, teacher, hooks = FlopCounterMode(display=False), [], []
    for name, module in run.method.named_children():
        if name.startswith("momentum"):
            hooks.append(module.register_forward_pre_hook(lambda *_: teacher.append(-counter.get_total_flops())))
            hooks.append(module.register_forward_hook(lambda *_: teacher.append(counter.get_total_flops())))
    with torch.no_grad(), run.autocast(), counter:
        run.method.outputs(views, index)
    for hook in hooks:
        hook.remove()
    return 3 * counter.get_total_flops() - 2 * sum(teacher)


def product_peak(run: Run) -> float:
    """FLOP/s of a large matrix product in the networks' precision, the best of ten."""
    n, times = 8192 if run.device.type == "cuda" else 2048, []
    a = torch.randn(n, n, device=run.device, dtype=torch.bfloat16 if run.amp else torch.float32)
    for _ in range(10):
        start = clock(run.device)
        a @ a
        times.append(clock(run.device) - start)
    return 2 * n**3 / min(times)


def bench(run: Run, optimizer: torch.optim.Optimizer, steps: int = 20, warm_up: int = 5) -> dict:
    """Where a step's time goes: median seconds of its parts, which take turns, so that a noisy machine bears on all
    alike; memory in bytes at the peak, and before the steps; FLOP/s beside a matrix product's. Prints and returns them.

    network is the bare forward and backward of encoder and heads; loss is the mathematics on their outputs, both ways.
    """
    before = peak_memory(run.device)
    method, order = run.method, run.shuffled(run.parts[0], 0)
    options = run.compile_options()
    outputs, criterion = ((torch.compile(f, **options) if run.compile else f) for f in (method.outputs, method.loss))
    seconds: dict[str, list[float]] = {"views": [], "network": [], "loss": [], "optimiser": []}
    drawing: list[float] = []

    for step in range(warm_up + steps):
        t0 = clock(run.device)
        views, index = run.batch(order, step % run.steps_per_epoch, (run.args.seed, WEIGHTS, step))
        t1 = clock(run.device)
        with run.autocast():
            out = outputs(views, index)
        t2 = clock(run.device)
        leaves = [o.detach().requires_grad_(o.requires_grad) for o in out]
        criterion(*leaves).backward()
        t3 = clock(run.device)
        pairs = [(o, leaf.grad) for o, leaf in zip(out, leaves) if o.requires_grad]
        torch.autograd.backward(*zip(*pairs))
        t4 = clock(run.device)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.0)
        t5 = clock(run.device)
        if step >= warm_up:
            for part, t in zip(seconds, (t1 - t0, t2 - t1 + t4 - t3, t3 - t2, t5 - t4)):
                seconds[part].append(t)
        t0 = time.perf_counter()  # what the host does for it, without a wait
        run.parameters((run.args.seed, HELD_OUT, 2 * step))
        drawing.append(time.perf_counter() - t0)
    median = {part: sorted(t)[len(t) // 2] for part, t in seconds.items()}
    total, peak = sum(median.values()), peak_memory(run.device)
    flop, most = step_flop(run, views, index), product_peak(run)
    share = "  ".join(f"{part} {1e3 * t:.1f} ms ({100 * t / total:.1f} %)" for part, t in median.items())
    added = total / median["network"] - 1
    say(f"{run.args.batch_size / total:,.0f} images/s: {share}")
    say(f"views, loss and optimiser add {100 * added:.1f} % to the network's own forward and backward")
    host = sorted(drawing)[len(drawing) // 2]
    say(f"of the views {1e3 * host:.2f} ms are the host's, to draw their parameters and hand them over")
    say(
        f"{flop / 1e9:,.1f} GFLOP a step on each rank, {flop / total / 1e12:.3f} TFLOP/s, "
        f"{100 * flop / total / most:.1f} % of a matrix product's {most / 1e12:.3f}"
    )
    say(f"peak memory {peak / 2**20:,.0f} MiB, {before / 2**20:,.0f} before the first step")
    figures = {
        "images_per_s": run.args.batch_size / total,
        "seconds": median,
        "added": added,
        "flop": flop,
        "host": host,
    }
    figures |= {"flop_per_s": flop / total, "product_flop_per_s": most, "memory": peak, "memory_before": before}
    return figures


def write_bench(run: Run, figures: dict, command: str) -> None:
    """--bench-json: the figures, and where they were taken."""
    cuda = run.device.type == "cuda"
    where = {"device": torch.cuda.get_device_name(run.device) if cuda else platform.processor() or platform.machine()}
    where |= {"ranks": run.world, "threads": torch.get_num_threads(), "torch": torch.__version__, "command": command}
    if run.args.bench_json and run.rank == 0:
        write_atomic(json.dumps(figures | where, indent=2) + "\n", Path(run.args.bench_json))


def profiled(run: Run) -> Callable[[], None]:
    """What to call after each step. With --profile, steps 4 to 6 go to trace.json, for chrome://tracing or
    ui.perfetto.dev."""
    if not run.args.profile or run.rank > 0:
        return lambda: None

    def write(profiler):
        profiler.export_chrome_trace(str(run.output / "trace.json"))
        say(f"wrote {run.output / 'trace.json'}")

    schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)
    profiler.start()
    return profiler.step


def train(run: Run, optimizer: torch.optim.Optimizer, keeper: Keeper) -> list[dict]:
    """The loop: a line of history an epoch; goes on from where the keeper is."""
    args, method, total = run.args, run.method, run.epochs * run.steps_per_epoch
    warmup, tick = warmup_steps(args, optimizer, run.steps_per_epoch), profiled(run)
    model, console = distributed(method), Console(run, total)
    done = keeper.epoch * run.steps_per_epoch + keeper.step
    with keeper:
        for epoch in range(keeper.epoch, args.epochs):
            start, order = time.time(), run.shuffled(run.parts[0], epoch)
            console.begin(epoch, keeper.partial, loss=order)
            for step in range(keeper.step, run.steps_per_epoch):
                begun = time.time()
                views, index = run.batch(order, step, (args.seed, WEIGHTS, done))
                views_s = time.time() - begun
                if done == 0 and run.rank == 0:
                    with user_errors():
                        save_views(run, views)
                lr = set_lr(optimizer, done, warmup, total)
                with run.autocast():
                    loss = model(views, index)
                loss.backward()
                run.after_backward(done)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                method.after_step(done / total)
                console.add(views_s, lr, loss=loss)
                console.line(done)
                keeper.after_step(step + 1, console.read)
                tick()
            loss = console.read()["loss"].mean().item()
            facts = run.monitor(args.knn_every > 0) if run.monitor_due(epoch + 1) else {}
            if method.classifies_instances:
                facts["normalised"] = method.normalised(loss)
            console.text(f"epoch {epoch + 1}/{args.epochs}", loss, done, in_words(facts))
            warn(run, facts, loss, done)
            keeper.after_epoch({"epoch": epoch + 1, "loss": loss, "lr": console.lr} | facts | run.resources(start))
    return keeper.history


def main(args: argparse.Namespace, images: Images | None = None) -> dict[str, float]:
    """Returns the last line of the log. images: what the flags of the data name, if it is loaded already."""
    with user_errors():
        run = Run(args, images=images)
        method = run.method
        optimizer = optimizer_of([(n, p) for n, p in method.named_parameters() if p.requires_grad], method, args)
        command = command_line("pretrain.py", get_parser(), args)
        keeper = None if args.bench else Keeper(run, [optimizer], command)
    say(
        f"{args.method}, {describe(run.arch)} x{args.width:g} ({sum(p.numel() for p in method.encoder.parameters()):,} "
        f"parameters), heads {args.heads}, {len(run.parts[0]):,} images of {run.size} px ({len(run.held_out):,} "
        f"held out), {run.world} x {run.device.type}{', bf16' * run.amp}{', compiled' * run.compile}"
    )
    announce(args, optimizer, run.epochs * run.steps_per_epoch)
    if args.bench:
        figures = bench(run, optimizer)
        write_bench(run, figures, command)
        return figures
    if keeper.epoch or keeper.step:
        say(f"goes on after {keeper} of {keeper.path}")
    if args.knn_every and not run.images.labelled:
        say("no labels: the monitor gives std and RankMe, but no kNN")

    last = train(run, optimizer, keeper)[-1]
    if run.rank == 0:
        with user_errors():
            knn = {k: last[k] for k in ("knn",) if k in last}
            save_backbone(run, method.encoder, command, run.output, heads=args.heads, **knn)
    barrier()
    say(f"wrote {run.output / 'backbone.pth'}; next: torchrun linear_eval.py --weights {run.output / 'backbone.pth'}")
    return last


if __name__ == "__main__":
    main(get_parser().parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()
