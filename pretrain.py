"""Pre-trains a backbone without labels.

    torchrun pretrain.py                                                            # made-up images, a laptop
    torchrun pretrain.py --data cifar10 --width 1 --epochs 200 --batch-size 512     # one GPU
    torchrun --nproc-per-node 8 pretrain.py --data my/images --image-size 224 --arch resnet50 --width 1
    torchrun pretrain.py --heads runs/search/arch.json                              # heads that search.py found
    torchrun pretrain.py --arch runs/search/arch.json --weights runs/search/backbone.pth   # train a found one further
    torchrun pretrain.py --bench                                                    # where a step's time goes

The output folder gets views.png (look at it first), curves.svg, log.txt (one JSON line per epoch), checkpoint.pth (the
same command resumes from it, to the same weights) and, at the end, backbone.pth, a plain state dict with torchvision's
keys, and backbone.json, which describes it.

To change something, copy this file: main() builds what a run needs, one line each, and train() is the loop.
"""

import launch  # ahead of torch: it says how threads wait

# isort: split

import contextlib
import math
import os
import platform
import re
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image

from checkpoint import UNKNOWN, Checkpoint, load_arch, load_heads, load_weights, save_backbone, write_atomic, write_json
from data import HELD_OUT, Batches, Images, Stream, channel_stats, decoded, fingerprint, load_data, split_images
from launch import Meter, Parser, barrier, dashed, given, is_main, memory_format, say, user_errors
from linear_eval import extract, knn_accuracy
from losses import METHODS, Method, ranks
from models import ARCHS, VITS, ViT, build_backbone, build_head, describe, head_dims
from optim import clip_gradients, distributed, optimizer_of, set_lr, warmup_steps
from pictures import draw_curves
from views import RECIPES, MultiCrop, adjust

SCRIPT = Path(__file__).name  # so that a copy does not go on from the original's checkpoint

# ---- flags ----------------------------------------------------------------------------------------------------------


def training_flags(parser: Parser) -> None:
    """The flags that search.py and pretrain.py share."""
    on_off = BooleanOptionalAction
    group = parser.add_argument_group("model")
    group.add_argument("--data", default="shapes", help="shapes (made in memory), a torchvision name or a folder")
    group.add_argument("--arch", default="resnet18", help=f"{', '.join(ARCHS)}, or an arch.json with a backbone")
    group.add_argument("--heads", default="default", help="default (handcrafted), a preset's name, or an arch.json")
    group.add_argument("--width", type=float, default=0.25, help="times torchvision's channels; 1 is the full network")
    group.add_argument("--drop-path", type=float, help="share of branches that a ViT skips; default: .1")
    group.add_argument("--stem", choices=["auto", "small", "imagenet"], default="auto", help="auto: small up to 64 px")
    group = parser.add_argument_group("method and its hyper-parameters (defaults in brackets)")
    group.add_argument("--method", choices=list(METHODS), default="simsiam")
    group.add_argument("--freeze-last-layer", type=float, default=1.0, help="epochs; swav's prototypes, dino's last")
    launch.keyword_flags(group, METHODS)
    group = parser.add_argument_group("views (defaults: the recipe's)")
    group.add_argument("--recipe", choices=list(RECIPES), help="default: the method's")
    launch.keyword_flags(group, {"": adjust})
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=12)
    group.add_argument("--batch-size", type=int, default=64, help="images per step, the total over all ranks")
    group.add_argument("--optimizer", choices=["sgd", "adamw", "lars"], help="default: the method's; for a ViT adamw")
    group.add_argument("--lr", type=float, help="at batch size 256, scaled with it; default: the method's")
    group.add_argument("--final-lr", type=float, help="at batch size 256, scaled like --lr; default: 0, or a ViT's")
    group.add_argument("--weight-decay", type=float, help="default: the method's, or the optimiser's")
    group.add_argument("--final-weight-decay", type=float, help="by a cosine; default: constant, but .4 for a ViT")
    group.add_argument("--warmup-epochs", type=float, help="default: 10, at most a tenth of the run; 0 with sgd")
    group.add_argument("--clip-grad", type=float, help="largest norm of all gradients, for a run that diverges")
    group.add_argument("--held-out", type=float, default=0.1, help="share of the training images kept for the monitor")
    group.add_argument("--knn-every", type=int, default=5, help="epochs between the monitor's metrics; 0: at the end")
    group.add_argument("--knn-k", type=int, default=200, help="neighbours of the monitor")
    group.add_argument("--knn-t", type=float, default=0.1, help="temperature of the monitor's votes")
    group.add_argument("--amp", action=on_off, help="bf16 autocast; default: on CUDA, and on a CPU with AMX")
    group.add_argument("--compile", action=on_off, help="torch.compile; default: on CUDA")
    modes = ["default", "reduce-overhead"]
    group.add_argument("--compile-mode", choices=modes, default=modes[0], help="reduce-overhead: for small networks")
    group.add_argument("--sync-bn", action=on_off, help="BN over several GPUs; default: below 64 images on each")
    group.add_argument("--print-every", type=int, default=50, help="steps between lines on the console")
    group.add_argument("--tensorboard", action="store_true", help="log to --output-dir/tensorboard too")
    group.add_argument("--resume", action=on_off, default=True, help="continue from a checkpoint of this command")
    group.add_argument("--checkpoint-minutes", type=float, default=5.0, help="between checkpoints; 0: only at the end")
    group.add_argument("--bench", action="store_true", help="time the parts of a step and stop; writes nothing")
    group.add_argument("--bench-json", metavar="FILE", help="write the figures of --bench there")
    group.add_argument("--profile", action="store_true", help="write a trace of steps 4 to 6 to the output folder")
    launch.data_flags(parser)


# flags that do not change the result: a run may be resumed with others
FREE_FLAGS = {"output_dir", "data_root", "cache", "resident_gb", "workers", "device", "rank_timeout", "resume"}
FREE_FLAGS |= {"checkpoint_minutes", "print_every", "tensorboard", "bench", "bench_json", "profile"}


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    training_flags(parser)
    parser.add_argument("--weights", help="a backbone.pth of --arch to start from; default: random initialisation")
    parser.add_argument("--output-dir", default=f"runs/{Path(SCRIPT).stem}")
    return parser


def check(args: Namespace) -> None:
    """Raises ValueError or OSError for invalid flags."""
    positive = ("epochs", "batch_size", "width", "print_every", "knn_k", "knn_t", "clip_grad", "lr", "temperature")
    for name in positive:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"{dashed(name)} {value}: must be above 0")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or above")
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held-out {args.held_out}: must be a share, 0 up to 1")
    if args.checkpoint_minutes < 0:
        raise ValueError(f"--checkpoint-minutes {args.checkpoint_minutes}: must be above 0, or 0: at the end alone")
    if args.bench_json and not args.bench:
        raise ValueError("--bench-json says where the figures of --bench go: give both")
    if args.bench_json and not Path(args.bench_json).parent.is_dir():
        raise FileNotFoundError(f"--bench-json '{args.bench_json}': there is no such folder")
    if not args.bench:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if not os.access(args.output_dir, os.W_OK):
            raise PermissionError(f"cannot write to --output-dir '{args.output_dir}'")


# ---- the parts of a run ---------------------------------------------------------------------------------------------


def start(args: Namespace) -> tuple[Namespace, torch.device]:
    """(args, device): checked, and with the defaults that depend on the machine filled in."""
    check(args)
    device = launch.setup(args.device, args.deterministic, args.rank_timeout)
    world = ranks()[1]
    if args.batch_size % world:
        raise ValueError(
            f"--batch-size {args.batch_size} is the total over ranks and does not divide by {world} of them"
        )
    launch.forget(device)
    args = Namespace(**vars(args))
    args.amp = launch.bf16_pays(device) if args.amp is None else args.amp
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    args.sync_bn = args.batch_size // world < 64 if args.sync_bn is None else args.sync_bn
    return args, device


def load_training_images(args: Namespace, device: torch.device, images: Images | None) -> Images:
    """The images, with pixels on the device unless they are streamed. images: given if they are loaded already."""
    images = images or load_data(args, args.data, "train")
    return images if isinstance(images.pixels, Stream) else images._replace(pixels=images.pixels.to(device))


def split(images: Images, args: Namespace, parts: int = 1) -> list[Tensor]:
    """[held-out, part, ...]: rows of the images. Raises ValueError if a part does not fill a batch."""
    rows = split_images(len(images.pixels), args.held_out, parts)
    shortest = min(len(part) for part in rows[1:])
    if shortest < args.batch_size:
        raise ValueError(
            f"{shortest} training images{' in each part' * (parts > 1)} do not fill one batch of "
            f"{args.batch_size}: lower --batch-size{', --held-out' * (args.held_out > 0)} or give more images"
        )
    steps = args.epochs * (shortest // args.batch_size)
    if args.profile and steps < 6:
        raise ValueError(f"--profile traces steps 4 to 6, and this run has {steps}")
    return rows


def stem_of(args: Namespace, images: Images) -> str:
    if args.stem != "auto":
        return args.stem
    return "small" if images.pixels.shape[-1] <= 64 else "imagenet"


def build_multi_crop(args: Namespace, images: Images, stats: tuple, device: torch.device) -> MultiCrop:
    """The views of --recipe, or the method's, with those knobs that are given. stats: (mean, std) of the channels."""
    kind, size = METHODS[args.method], images.pixels.shape[-1]
    usual = kind.small_recipe if kind.small_recipe and (args.global_size or size) <= 64 else kind.recipe
    recipe = adjust(RECIPES[args.recipe or usual], **given(args, adjust))
    if len(recipe.globals) < 2 and not kind.classifies_instances:
        raise ValueError(
            f"--method {args.method} compares two views of an image, and the recipe has one: "
            "--views-per-image 2, or another --recipe"
        )
    multi_crop = MultiCrop(recipe, size, *stats, device)
    if args.compile:
        multi_crop.compile()
    return multi_crop


def build_encoder(args: Namespace, arch: str | dict, stem: str) -> nn.Module:
    """A ViT skips a tenth of its branches by default; raises ValueError for --drop-path with another network."""
    drop_path = 0.1 * (describe(arch) in VITS) if args.drop_path is None else args.drop_path
    return build_backbone(arch, stem, args.width, drop_path)[0]


def build_method(
    args: Namespace, encoder: nn.Module, heads: dict | None, n_images: int, multi_crop: MultiCrop, device: torch.device
) -> Method:
    """The method on the device, with its keywords from the flags. n_images: the number of images to train on."""
    launch.refuse_others(args, METHODS, args.method)
    for view in multi_crop.views:
        if isinstance(encoder, ViT) and view.size % encoder.patch:
            raise ValueError(
                f"views of {view.size} px: a ViT needs multiples of its patch, {encoder.patch}: --global-size, ..."
            )
    method = METHODS[args.method](encoder, heads, n_images, **given(args, METHODS[args.method]))
    method.balance = multi_crop.balance
    method = launch.synced(method, device) if args.sync_bn else method
    return method.to(device, memory_format=memory_format(device))


def build_heads(args: Namespace, feature_dim: int) -> tuple[dict | None, dict | None]:
    """(operations, modules) by the names of the method's heads; (None, None) for the handcrafted heads."""
    spaces = METHODS[args.method].heads(feature_dim, args.out_dim)
    operations = load_heads(args.heads, list(spaces))
    if operations is None:
        return None, None
    modules = {}
    for name, ops in operations.items():
        modules[name] = build_head(ops, head_dims(*spaces[name]._replace(layers=len(ops))))
    return operations, modules


def autocast(args: Namespace, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)


def facts_of(
    script: str, args: Namespace, arch: str | dict, heads: dict | None, images: Images, free: set[str]
) -> dict:
    """What identifies a run in its checkpoint: script, flags, networks, images. The keys become part of the message
    that refuses another run's checkpoint."""
    facts = {"script": script}
    facts |= {dashed(k): v for k, v in vars(args).items() if k not in free and k not in ("arch", "heads")}
    facts["network (--arch)"] = {"is": arch}
    facts["set of heads (--heads)"] = {"are": heads}
    *shape, pixels = fingerprint(images)
    facts["set of images (--data)"] = shape
    facts["set of images (--data), by their pixels"] = UNKNOWN if pixels is None else [pixels]  # None: streamed
    return facts


# ---- metrics and pictures while it trains ---------------------------------------------------------------------------


# metrics that rank networks, all but kNN without labels, and the sign that makes higher better
SCORES = {"infonce": -1, "rankme": 1, "held_out_loss": -1, "knn": 1}


@dataclass(eq=False)
class Monitor:
    """Metrics of a method while it trains. Their views are the same every time, so that epochs can be compared."""

    args: Namespace
    images: Images
    stats: tuple  # (mean, std) of the channels
    held_out: Tensor  # rows of images
    rows: Tensor  # those that are trained on
    multi_crop: MultiCrop
    device: torch.device

    def __post_init__(self):
        # InfoNCE is always computed on SimCLR's views, so that runs with different views can be compared
        self.simclr_views = MultiCrop("simclr", self.images.pixels.shape[-1], *self.stats, self.device)
        if self.args.knn_every and not self.images.labelled:
            say("no labels (train/ and test/ with a folder a class): the monitor gives std and RankMe, but no kNN")

    def due(self, epoch: int) -> bool:
        """After `epoch` epochs."""
        every = self.args.knn_every
        return epoch == self.args.epochs or (every > 0 and epoch % every == 0)

    @torch.no_grad()
    def __call__(self, method: Method) -> dict[str, float]:
        """All metrics by name; those that lack labels or images are left out, and kNN where --knn-every is 0."""
        method.eval()
        rows = self.held_out if len(self.held_out) >= 256 else self.rows
        h = self.features(method.encoder, rows[:1024])  # (N, F)
        z = nn.functional.normalize(method.projector(h), dim=1)  # (N, D)
        facts = {
            "knn": self.knn(method, self.held_out) if self.args.knn_every > 0 else None,
            "z_std": (z.std(0).mean() * z.shape[1] ** 0.5).item(),
            "rankme": rankme(h),
            "infonce": self.infonce(method, self.held_out),
            "held_out_loss": self.held_out_loss(method, self.held_out),
        }
        method.train()
        return {name: value for name, value in facts.items() if value is not None}

    @torch.no_grad()
    def score(self, name: str, method: Method, rows: Tensor) -> float:
        """One of SCORES on some of the held-out images, with the sign that makes higher better; nan if it lacks labels
        or images."""
        method.eval()
        value = getattr(self, name)(method, rows)
        method.train()
        return math.nan if value is None else SCORES[name] * value

    # each returns None where it lacks labels or images, and expects the method in eval mode

    def features(self, encoder: nn.Module, rows: Tensor) -> Tensor:
        where = rows.to(self.images.pixels.device)
        return extract(encoder, self.images.pixels, *self.stats, self.device, rows=where)

    def batches(self, rows: Tensor, multi_crop: MultiCrop, batch_size: int, whole: bool = False) -> Batches:
        how = {"purpose": HELD_OUT, "shuffle": False, "whole": whole}
        return Batches(self.images.pixels, rows, multi_crop, batch_size, self.device, **how)

    def knn(self, method: Method, held_out: Tensor) -> float | None:
        if not self.images.labelled or not len(held_out):
            return None
        sets = []
        for rows in (self.rows, held_out):
            h, shown = self.features(method.encoder, rows), decoded(self.images.pixels, rows)
            sets += [h[shown.to(h.device)], self.images.labels[rows[shown]]]
        return knn_accuracy(*sets, self.args.knn_k, self.args.knn_t)

    def rankme(self, method: Method, rows: Tensor) -> float:
        return rankme(self.features(method.encoder, rows))

    def infonce(self, method: Method, rows: Tensor) -> float | None:
        """InfoNCE of the features of two views, the mean over batches of 256 images."""
        size = min(256, len(rows))
        if size < 8:
            return None
        batches, losses = self.batches(rows, self.simclr_views, size, whole=True), []
        for step in range(batches.steps_per_epoch):
            views, _ = batches(step)
            with autocast(self.args, self.device):
                h1, h2 = (method.encoder(view) for view in views)
            losses.append(infonce(h1.float(), h2.float()))
        return torch.stack(losses).mean().item()

    def held_out_loss(self, method: Method, rows: Tensor) -> float | None:
        """The method's loss; None where the images do not fill a batch. A method that classifies instances has no class
        for a held-out image: there it is the loss on new views of as many training images."""
        rows = self.rows[: len(rows)] if method.classifies_instances else rows
        batches, losses = self.batches(rows, self.multi_crop, self.args.batch_size), []
        for step in range(batches.steps_per_epoch):
            with autocast(self.args, self.device):
                losses.append(method.loss(*method.outputs(*batches(step))))
        return launch.mean_over_ranks(torch.stack(losses).mean()).item() if losses else None


def infonce(h1: Tensor, h2: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE (1807.03748) of the features (N, F) of two views of the same images, centred and normalised: how well a
    view's partner is told from the 2N - 2 other views. Lower is better; ln(2N - 1) is chance."""
    h = torch.cat([h1, h2])
    h = nn.functional.normalize(h - h.mean(0), dim=1)
    similarity = (h @ h.T / temperature).fill_diagonal_(-math.inf)  # (2N, 2N)
    partner = torch.arange(len(h), device=h.device).roll(len(h1))
    return nn.functional.cross_entropy(similarity, partner)


def rankme(h: Tensor) -> float:
    """RankMe (2210.02885), the effective rank of features (N, F): exp of the entropy of their singular values."""
    if not h.isfinite().all():
        return math.nan
    s = torch.linalg.svdvals(h.double())
    p = s / s.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def collapsed(facts: dict[str, float], steps: int) -> str | None:
    """A warning if the embedding has collapsed after that many steps. The limits are lower in the first 100 steps, in
    which BN's running statistics, used by the monitor for z, are still close to their initial values."""
    std, rank = (0.05, 1.5) if steps >= 100 else (0.002, 1.05)
    if "z_std" in facts and (facts["z_std"] < std or facts["rankme"] < rank):
        return (
            f"the embedding has collapsed: std x sqrt(D) is {facts['z_std']:.3f} (healthy: about 1), RankMe "
            f"{facts['rankme']:.1f}. Every image gets nearly the same vector, whatever the loss says; try a lower "
            "--lr, longer --warmup-epochs, a larger --batch-size"
        )
    return None


def plateau(loss: float, chance: float | None, steps: int) -> str | None:
    """A warning if the loss, after that many steps, is at chance."""
    if steps >= 100 and chance is not None and abs(loss / chance - 1) < 0.002:
        return (
            f"the loss is that of chance, ln K = {chance:.4f}. If it stays there, try a head with BN (--heads), "
            "another --lr or --temperature, a faster teacher for moco and dino (--momentum-teacher 0.9), or more epochs"
        )
    return None


def warn(method: Method, facts: dict[str, float], loss: float, batch_size: int, steps: int) -> None:
    """Prints the warnings that an epoch's metrics call for, after that many steps."""
    for warning in (collapsed(facts, steps), plateau(loss, method.chance(batch_size), steps)):
        if warning:
            say(f"warning: {warning}")


def machine(args: Namespace, device: torch.device) -> str:
    return f"{ranks()[1]} x {device.type}{', bf16' * args.amp}{', compiled' * args.compile}"


def announce(args: Namespace, optimizer: Optimizer, steps: int) -> None:
    """Prints the learning rate, and a note if it may be too low."""
    peak = optimizer.param_groups[0]["peak"]
    base = peak * 256 / args.batch_size
    say(f"batch size {args.batch_size} over all ranks, lr {peak:g} (--lr {base:g}, scaled from a batch size of 256)")
    if args.lr is None and steps < 1000:
        few = f"only {steps:,} step{'s' * (steps != 1)}"
        say(f"{few}: the default learning rate is for longer runs, and a larger --lr may learn more")


def in_words(facts: dict[str, float]) -> str:
    """An epoch's metrics, for its line on the console."""
    formats = {"normalised": "normalised {:.3f}", "z_std": "std {:.2f}", "rankme": "RankMe {:.1f}"}
    shown = ["  " + text.format(facts[name]) for name, text in formats.items() if name in facts]
    return "".join(shown) + (f"  kNN {100 * facts['knn']:.2f} (held-out)" if "knn" in facts else "")


def resources(begun: float, device: torch.device) -> dict[str, float]:
    """Seconds since `begun`, and the peak memory so far in MiB, of the GPU or else of this process."""
    return {"seconds": time.time() - begun, "peak_mib": peak_memory(device) / 2**20}


PANELS = {  # of curves.svg: {title: {line: key in the log}}
    "loss": {"training": "loss", "held out": "held_out_loss", "alphas": "alpha_loss"},
    "InfoNCE of h": {"held out": "infonce"},
    "kNN, % of held-out images": {"held out": "knn"},
    "std of z": {"held out": "z_std"},
    "RankMe": {"held out": "rankme"},
    "learning rate": {"training": "lr"},
    "E[cost] / target": {"alphas": "expected_cost"},
    "signal / noise": {"alphas": "alpha_signal"},
}


def save_curves(history: list[dict], chance: float | None, folder: Path) -> None:
    """curves.svg of the log so far. chance: the loss at chance, if it is known."""
    if not is_main():
        return
    epoch = history[-1]["epoch"]
    panels: dict[str, dict[str, list]] = {}
    for title, lines in PANELS.items():
        factor = 100 if "%" in title else 1
        for name, key in lines.items():
            points = [(line["epoch"], factor * line[key]) for line in history if isinstance(line.get(key), float)]
            if points:
                panels.setdefault(title, {})[name] = points
    if chance is not None:
        panels["loss"]["chance"] = [(0, chance), (epoch, chance)]
    with user_errors():
        write_atomic(draw_curves(panels, f"Epoch {epoch}", "epoch"), folder / "curves.svg", sync=False)


def save_views(views: list[Tensor], multi_crop: MultiCrop, path: Path) -> None:
    """The views of a batch's first images, a column per image (if there are more views than images, a row)."""
    if not is_main():
        return
    side = max(v.shape[-1] for v in views)
    n = min(16, len(views[0]), max(4, 1024 // side))
    tiles = [
        nn.functional.pad(v[:n] * multi_crop.std + multi_crop.mean, [0, side - v.shape[-1]] * 2, value=1.0)
        for v in views
    ]
    grid = torch.stack(tiles, 0 if n >= len(views) else 1).flatten(0, 1).cpu()
    with user_errors():
        save_image(grid, path, nrow=max(n, len(views)), pad_value=1.0)


# ---- --bench and --profile ------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """time.perf_counter(), once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Bytes that torch has allocated on the GPU at most so far; on a CPU, the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_flop(method: Method, views: list[Tensor], index: Tensor) -> int:
    """Floating-point operations of a step's networks: those of the forward pass are counted, the backward pass takes
    twice as many, without the momentum networks. (FlopCounterMode overcounts the backward of grouped convolutions.)"""
    counter, teacher, hooks = FlopCounterMode(display=False), [], []
    for name, module in method.named_children():
        if name.startswith("momentum"):
            hooks.append(module.register_forward_pre_hook(lambda *_: teacher.append(-counter.get_total_flops())))
            hooks.append(module.register_forward_hook(lambda *_: teacher.append(counter.get_total_flops())))
    with torch.no_grad(), counter:
        method.outputs(views, index)
    for hook in hooks:
        hook.remove()
    return 3 * counter.get_total_flops() - 2 * sum(teacher)


def product_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    n, times = 8192 if device.type == "cuda" else 2048, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(10):
        begun = clock(device)
        a @ a
        times.append(clock(device) - begun)
    return 2 * n**3 / min(times)


def bench(
    args: Namespace, method: Method, batches: Batches, optimizer: Optimizer, device: torch.device, steps=20, warm_up=5
) -> dict:
    """Prints and returns where a step's time goes: median seconds of its parts, memory in bytes at the peak and before
    the steps, and FLOP/s beside those of a matrix product.

    network: forward and backward of encoder and heads alone; loss: forward and backward of the loss on their outputs.
    """
    before = peak_memory(device)
    outputs, criterion = method.outputs, method.loss
    if args.compile and launch.traceable(method):
        outputs, criterion = (torch.compile(f, mode=args.compile_mode) for f in (outputs, criterion))
    times = []  # (steps, parts)
    for step in range(warm_up + steps):
        t0 = clock(device)
        views, index = batches(step)
        t1 = clock(device)
        with autocast(args, device):
            out = outputs(views, index)
        t2 = clock(device)
        leaves = [o.detach().requires_grad_(o.requires_grad) for o in out]
        criterion(*leaves).backward()
        t3 = clock(device)
        pairs = [(o, leaf.grad) for o, leaf in zip(out, leaves) if o.requires_grad]
        torch.autograd.backward(*zip(*pairs))
        t4 = clock(device)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.0)
        t5 = clock(device)
        batches.draw(step)  # what the host does for the views, without a wait
        t6 = time.perf_counter()
        times.append((t1 - t0, t2 - t1 + t4 - t3, t3 - t2, t5 - t4, t6 - t5))
    *of_parts, host = np.median(times[warm_up:], 0).tolist()
    seconds = dict(zip(("views", "network", "loss", "optimiser"), of_parts))
    total = sum(of_parts)
    added = total / seconds["network"] - 1
    peak = peak_memory(device)
    with autocast(args, device):
        flop = step_flop(method, views, index)
    most = product_peak(torch.bfloat16 if args.amp else torch.float32, device)
    shares = "  ".join(f"{part} {1e3 * t:.1f} ms ({100 * t / total:.1f} %)" for part, t in seconds.items())
    say(f"{args.batch_size / total:,.0f} images/s: {shares}")
    say(f"views, loss and optimiser add {100 * added:.1f} % to the network's own forward and backward")
    say(f"of the views {1e3 * host:.2f} ms are the host's, to draw their parameters")
    say(
        f"{flop / 1e9:,.1f} GFLOP a step on each rank, {flop / total / 1e12:.3f} TFLOP/s, "
        f"{100 * flop / total / most:.1f} % of a matrix product's {most / 1e12:.3f}"
    )
    say(f"peak memory {peak / 2**20:,.0f} MiB, {before / 2**20:,.0f} before the first step")
    return {
        "images_per_s": args.batch_size / total,
        "seconds": seconds,
        "added": added,
        "host": host,
        "flop": flop,
        "flop_per_s": flop / total,
        "product_flop_per_s": most,
        "memory": peak,
        "memory_before": before,
    }


def write_bench(args: Namespace, figures: dict, device: torch.device, command: str) -> dict:
    """Returns the figures; writes them and a description of the machine to --bench-json."""
    cpu = platform.processor() or platform.machine()
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "ranks": ranks()[1],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": command,
    }
    if args.bench_json:
        write_json({**figures, **where}, Path(args.bench_json))
    return figures


def profiler_of(args: Namespace, folder: Path) -> torch.profiler.profile | None:
    """With --profile, a profiler whose step() is to be called after each step; it writes steps 4 to 6 to trace.json,
    for chrome://tracing or ui.perfetto.dev."""
    if not args.profile or not is_main():
        return None

    def write(profiler):
        profiler.export_chrome_trace(str(folder / "trace.json"))
        say(f"wrote {folder / 'trace.json'}")

    schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)
    profiler.start()
    return profiler


# ---- the script -----------------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int) -> None:
    """Seeds what networks draw themselves, such as a ViT's skipped branches: a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, ranks()[0])).generate_state(1)[0]))


def train(
    args: Namespace,
    method: Method,
    batches: Batches,
    optimizer: Optimizer,
    monitor: Monitor,
    meter: Meter,
    checkpoint: Checkpoint,
    device: torch.device,
) -> None:
    """The loop. It starts at the checkpoint's step and adds a line per epoch to checkpoint.history."""
    total, per_epoch = checkpoint.total, batches.steps_per_epoch
    warmup = warmup_steps(args, optimizer, per_epoch)
    model = distributed(method)
    profiler = profiler_of(args, checkpoint.folder)
    with checkpoint:  # SIGTERM and Ctrl-C: finish the step, save, exit with 128 + signal
        begun = time.time()
        for step in range(checkpoint.step, checkpoint.until):
            seed_step(args.seed, step)
            lr = set_lr(optimizer, step, warmup, total)
            views, index = batches(step)  # [(B, 3, S, S), ...] globals first, (B,)
            if step == 0:
                save_views(views, batches.multi_crop, checkpoint.folder / "views.png")
            with autocast(args, device):
                loss = model(views, index)
            loss.backward()
            if step < args.freeze_last_layer * per_epoch:
                method.drop_last_layer_grad()
            if args.clip_grad:
                clip_gradients(method, args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step((step + 1) / total)  # teacher, queue, centre
            meter.add(step, lr, loss=loss)
            meter.print(step)  # the only wait for the device in a step; a loss that is not finite stops the run here
            if (step + 1) % per_epoch == 0:
                epoch = (step + 1) // per_epoch
                mean_loss = meter.end_epoch()["loss"]
                due = monitor.due(epoch) or step + 1 == checkpoint.until
                facts = monitor(method) if due else {}
                if method.classifies_instances:
                    facts["normalised"] = method.normalised(mean_loss)
                say(f"epoch {epoch}/{args.epochs}  loss {mean_loss:.4f}{meter.speed(step)}{in_words(facts)}")
                warn(method, facts, mean_loss, args.batch_size, step + 1)
                checkpoint.log({"epoch": epoch, "loss": mean_loss, "lr": lr, **facts, **resources(begun, device)})
                save_curves(checkpoint.history, method.chance(args.batch_size), checkpoint.folder)
                begun = time.time()
                meter.restart()
            checkpoint.after_step(step + 1)
            if profiler:
                profiler.step()


def main(args: Namespace, images: Images | None = None, until: int | None = None) -> dict[str, float]:
    """Returns the last line of the log. images: given if they are loaded already; until: the epoch after which the run
    stops for now."""
    command = launch.command_line(SCRIPT, get_parser(), args)
    asked = args
    with user_errors():
        args, device = start(args)
        folder = Path(args.output_dir)
        arch = load_arch(args.arch)
        images = load_training_images(args, device, images)
        held_out, rows = split(images, args)
        stats = channel_stats(images.pixels)
        multi_crop = build_multi_crop(args, images, stats, device)
        stem = stem_of(args, images)
        what = f"{describe(arch)} x{args.width:g}"
        torch.manual_seed(args.seed)
        encoder = build_encoder(args, arch, stem)
        if args.weights:
            load_weights(encoder, args.weights, f"{what} with the {stem} stem")
        operations, heads = build_heads(args, encoder.feature_dim)
        method = build_method(args, encoder, heads, len(rows), multi_crop, device)
        if args.compile and launch.traceable(method):
            method.compile(mode=args.compile_mode)
        torch.backends.cudnn.benchmark = device.type == "cuda" and not args.deterministic  # shapes are always the same
        batches = Batches(images.pixels, rows, multi_crop, args.batch_size, device, seed=args.seed)
        optimizer = optimizer_of([(n, p) for n, p in method.named_parameters() if p.requires_grad], method, args)
        monitor = Monitor(args, images, stats, held_out, rows, multi_crop, device)
        total = args.epochs * batches.steps_per_epoch
        meter = Meter(total, {"loss": batches}, images.names, folder, args.print_every)
        parameters = sum(p.numel() for p in encoder.parameters())
        data = f"{len(rows):,} images of {images.pixels.shape[-1]} px ({len(held_out):,} held out)"
        say(f"{args.method}, {what} ({parameters:,} parameters), heads {args.heads}, {data}, {machine(args, device)}")
        announce(args, optimizer, total)
        if args.bench:
            return write_bench(args, bench(args, method, batches, optimizer, device), device, command)
        things = {"method": method, "optimizer": optimizer, "meter": meter}
        facts = facts_of(SCRIPT, asked, arch, operations, images, FREE_FLAGS)
        until_step = until and until * batches.steps_per_epoch
        how = command, device, total, args.checkpoint_minutes, args.resume, until_step, args.tensorboard
        checkpoint = Checkpoint(folder, things, facts, *how)
    train(args, method, batches, optimizer, monitor, meter, checkpoint, device)
    last = checkpoint.history[until - 1 if until else -1]  # it may have gone further before
    if last["epoch"] < args.epochs:
        return last
    if is_main():
        knn = {"knn": last["knn"]} if "knn" in last else {}
        facts = {**backbone_facts(args, arch, stem, stats, command), "heads": args.heads, **knn}
        with user_errors():
            save_backbone(encoder, facts, folder)
    barrier()
    path = folder / "backbone.pth"
    say(f"wrote {path}; next: torchrun linear_eval.py --weights {path}")
    return last


def backbone_facts(args: Namespace, arch: str | dict, stem: str, stats: tuple, command: str) -> dict[str, object]:
    """The contents of backbone.json."""
    return {
        "arch": arch,
        "width": args.width,
        "stem": stem,
        "mean": stats[0],
        "std": stats[1],
        "data": args.data,
        "resized_to": args.image_size,
        "method": args.method,
        "epochs": args.epochs,
        "seed": args.seed,
        "command": command,
    }


def run_in(
    folder: Path,
    args: Namespace,
    images: Images,
    arch: str | dict,
    heads: dict | None = None,
    until: int | None = None,
    **flags,
) -> dict:
    """Runs main() in a folder of its own, for another script, with those of its flags (args) that pretrain.py has too,
    overridden by `flags`. The console output goes to console.txt in the folder.

    Returns the last line of the log, or {"error": message} if the run fails: a loss that is not finite, a network that
    cannot be built or does not fit into memory. Raises SystemExit if a signal or a full disk has ended it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "arch.json"
    write_json({"backbone": {"arch": arch}} | ({"heads": heads} if heads else {}), path)
    defaults = vars(get_parser().parse_args([]))
    known = {name: getattr(args, name, default) for name, default in defaults.items()}
    where = {"arch": str(path), "heads": str(path) if heads else args.heads, "output_dir": str(folder)}
    try:
        with open(folder / "console.txt", "a") as console, contextlib.redirect_stdout(console):
            return main(Namespace(**{**known, **where, **flags}), images, until)
    except (SystemExit, ValueError, RuntimeError) as error:  # RuntimeError: from torch, such as out of memory
        full_disk = isinstance(error.__context__, OSError)
        if isinstance(error, SystemExit) and (not isinstance(error.code, str) or full_disk):
            raise
        if isinstance(error, RuntimeError) and ranks()[1] > 1:  # the other ranks may not have it
            raise
        return {"error": re.sub(r"^\S+: error(?: on rank \d+)?: ", "", str(error))}


if __name__ == "__main__":
    launch.run(main, get_parser())
