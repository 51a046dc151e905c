"""Optimisers, parameter groups and schedules."""

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from losses import own_rows, ranks, reduced, whole_rows
from models import ViT


class LARS(torch.optim.Optimizer):
    """SGD with momentum, each tensor's step scaled by the tensor's norm. 1708.03888, in the form of 2210.02808:
    d = g + decay p, q = .001 |p| / |d|, m = .9 m + q d, p = p - lr m. Groups with scale=False have q = 1."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": True})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            momenta = [self.state[p]["momentum"] for p in params]
            d = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["scale"]:
                norms = zip(torch._foreach_norm(params), torch._foreach_norm(d))
                torch._foreach_mul_(d, [torch.where((p > 0) & (g > 0), 1e-3 * p / g, 1.0) for p, g in norms])
            torch._foreach_mul_(momenta, 0.9)
            torch._foreach_add_(momenta, d)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


class Settings(NamedTuple):
    """How a method is optimised; learning rates are for a batch size of 256."""

    optimizer: str
    lr: float
    weight_decay: float
    final_lr: float = 0.0
    final_weight_decay: float | None = None  # None: constant


# ViTs do not learn with SGD. lr 2e-3 at batch 1024, weight decay from .04 to .4: 2104.14294 and 2210.02808
OF_A_VIT = Settings("adamw", 5e-4, 0.04, 2.5e-6, 0.4)
OTHERS = {"sgd": (0.12, 5e-4), "adamw": (1e-3, 0.05), "lars": (0.48, 1e-6)}  # where --optimizer is not the method's
# The smallest batch of published CIFAR runs. Smaller batches take its learning rate, but at most twice the linearly
# scaled one, with which short runs at batch 64 learned 2 points less (results/README.md). Below 64: not measured.
SMALLEST_BATCH = 128


def settings_of(method: nn.Module, args: argparse.Namespace) -> Settings:
    """The method's settings, or in place of SGD those of a ViT, overridden by the flags."""
    lr = method.lr if method.fixed_lr is None else method.fixed_lr * 256 / args.batch_size
    settings = Settings(method.optimizer, lr, method.weight_decay)
    if isinstance(method.encoder, ViT) and settings.optimizer == "sgd":
        settings = OF_A_VIT
    if args.optimizer and args.optimizer != settings.optimizer:
        settings = Settings(args.optimizer, *OTHERS[args.optimizer])
    if method.fixed_lr is None or settings.optimizer != method.optimizer:
        above_linear = min(2.0, max(1.0, SMALLEST_BATCH / args.batch_size))
        settings = settings._replace(lr=settings.lr * above_linear, final_lr=settings.final_lr * above_linear)
    flags = {name: getattr(args, name) for name in Settings._fields[1:]}
    return settings._replace(**{name: value for name, value in flags.items() if value is not None})


def kind_of(p: Tensor) -> str:
    """Returns "vector" (biases and norms), "depthwise" (depthwise convolutions) or "matrix"."""
    if p.ndim < 2:
        return "vector"
    return "depthwise" if p.ndim == 4 and p.shape[1] == 1 < p.shape[0] else "matrix"


UNDECAYED = {"sgd": (), "adamw": ("vector",), "lars": ("vector", "depthwise")}  # kinds without weight decay


def optimizer_of(
    named: list[tuple[str, nn.Parameter]], method: nn.Module, args: argparse.Namespace
) -> torch.optim.Optimizer:
    """SGD with momentum .9, AdamW or LARS, by `settings_of`. Parameters are grouped by whether their learning rate
    stays constant, as that of SimSiam's predictor does, and by kind."""
    settings = settings_of(method, args)
    lr, final_lr = settings.lr * args.batch_size / 256, settings.final_lr * args.batch_size / 256
    groups = []
    for constant in (False, True):
        for kind in ("matrix", "depthwise", "vector"):
            decays = kind not in UNDECAYED[settings.optimizer]
            group = {
                "params": [p for n, p in named if n.startswith(method.constant_lr) == constant and kind_of(p) == kind],
                "constant": constant,
                "peak": lr,
                "final_lr": final_lr,
                "decays": decays,
                "first_decay": settings.weight_decay,
                "final_decay": settings.final_weight_decay,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            if settings.optimizer == "lars":
                group["scale"] = kind != "vector"
            if group["params"]:
                groups.append(group)
    device = named[0][1].device.type
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9, fused=device == "cuda" or None)
    elif settings.optimizer == "adamw":
        # fused on a CPU too: else DIET's classifier would need its size in temporaries, twice
        optimizer = torch.optim.AdamW(groups, lr, fused=device != "mps")
    else:
        optimizer = LARS(groups, lr)
    return with_state(optimizer, method)


# The state of each optimiser. Fused SGD fails where only some parameters have a buffer. Zero is the same as none:
# .9 x 0 + g is g.
STATE = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), LARS: ("momentum",)}


def with_state(optimizer: torch.optim.Optimizer, method: nn.Module) -> torch.optim.Optimizer:
    """The optimiser with its state initialised to zero. A loaded state must have the same shapes (ValueError), which
    torch does not check. The state of sharded parameters is saved whole, and each rank loads its own rows."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        optimizer.state[p] = {name: torch.zeros_like(p) for name in STATE[type(optimizer)]}
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[p]["step"] = torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu")
    sharded = {id(method.get_parameter(name)) for name in method.sharded}

    def change(state: dict, change_rows) -> dict:
        changed = dict(state["state"])
        for i, tensors in changed.items():
            if id(params[i]) in sharded:
                changed[i] = {k: change_rows(x, method.n) if x.ndim else x for k, x in tensors.items()}
        return {**state, "state": changed}

    def save(_, state: dict) -> dict:
        return change(state, whole_rows)

    def load(_, state: dict) -> dict:
        state = change(state, own_rows)
        for i, p in enumerate(params):
            want = {name: x.shape for name, x in optimizer.state[p].items()}
            if {name: x.shape for name, x in state["state"][i].items()} != want:
                raise ValueError(f"the optimiser's state of parameter {i}")
        return state

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return optimizer


# ---- a step ---------------------------------------------------------------------------------------------------------


def distributed(method: nn.Module, **options) -> nn.Module:
    """The method, in DDP if there are several ranks. DDP leaves sharded parameters alone."""
    if ranks()[1] == 1:
        return method
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, list(method.sharded))
    return DistributedDataParallel(method, **options)


def clip_gradients(method: nn.Module, most: float) -> None:
    """Clips the total norm of all gradients to `most`. It counts the rows of sharded parameters on all ranks, so that
    all ranks scale alike."""
    named = [(name, p) for name, p in method.named_parameters() if p.grad is not None]
    whole = nn.utils.get_total_norm([p.grad for name, p in named if name not in method.sharded]) ** 2
    if method.sharded:
        whole = whole + reduced(nn.utils.get_total_norm([p.grad for name, p in named if name in method.sharded]) ** 2)
    nn.utils.clip_grads_with_norm_([p for _, p in named], most, whole.sqrt())


def warmup_steps(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> int:
    """--warmup-epochs in steps. The default is 10 epochs, at most a tenth of the run, and none for SGD: published CIFAR
    runs with SGD start at the full learning rate."""
    if args.warmup_epochs is not None:
        return round(args.warmup_epochs * steps_per_epoch)
    if isinstance(optimizer, torch.optim.SGD):
        return 0
    return round(min(10, args.epochs / 10) * steps_per_epoch)


def cosine(step: int, first_step: int, last_step: int, first: float, last: float) -> float:
    """Cosine annealing from `first` to `last`."""
    progress = (step - first_step) / max(1, last_step - first_step)
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, step: int, warmup: int, total: int) -> float:
    """Sets the learning rate of groups that are not constant: linear warm-up, then a cosine to final_lr. Where weight
    decay has a final value, it follows a cosine over the whole run. Returns the first group's learning rate."""
    for group in optimizer.param_groups:
        if not group["constant"] and step < warmup:
            group["lr"] = group["peak"] * (step + 1) / warmup
        elif not group["constant"]:
            group["lr"] = cosine(step, warmup, total, group["peak"], group["final_lr"])
        if group["final_decay"] is not None and group["decays"]:
            group["weight_decay"] = cosine(step, 0, total, group["first_decay"], group["final_decay"])
    return optimizer.param_groups[0]["lr"]
