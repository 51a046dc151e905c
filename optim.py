"""Optimisers, their groups and schedules."""

import argparse
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from losses import reduced
from models import ViT


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are as long as each tensor's own norm says. 1708.03888, as 2210.02808 has it:
    d = g + decay p, q = .001 |p| / |d|, m = .9 m + q d, p = p - lr m; groups with scale=False have q = 1."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": True})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            d = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["scale"]:
                norms = zip(torch._foreach_norm(params), torch._foreach_norm(d))
                torch._foreach_mul_(d, [torch.where((p > 0) & (g > 0), 1e-3 * p / g, 1.0) for p, g in norms])
            torch._foreach_mul_(momenta, 0.9)
            torch._foreach_add_(momenta, d)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


class Settings(NamedTuple):
    """How a method is optimised; learning rates at batch size 256."""

    optimizer: str
    lr: float
    weight_decay: float
    final_lr: float = 0.0
    final_weight_decay: float | None = None  # None: it stays


# A ViT by SGD does not learn: 2e-3 at batch 1024 and .04 to .4, 2104.14294 and 2210.02808
OF_A_VIT = Settings("adamw", 5e-4, 0.04, 2.5e-6, 0.4)


OTHERS = {"sgd": (0.12, 5e-4), "adamw": (1e-3, 0.05), "lars": (0.48, 1e-6)}  # where --optimizer is not the method's


def settings_of(method: nn.Module, args: argparse.Namespace) -> Settings:
    """What the flags say, else the method's own, or, in place of SGD, what ViTs are trained by."""
    lr = method.lr if method.fixed_lr is None else method.fixed_lr * 256 / args.batch_size
    settings = Settings(method.optimizer, lr, method.weight_decay)
    if isinstance(method.encoder, ViT) and settings.optimizer == "sgd":
        settings = OF_A_VIT
    if args.optimizer and args.optimizer != settings.optimizer:
        settings = Settings(args.optimizer, *OTHERS[args.optimizer])
    flags = {name: getattr(args, name) for name in Settings._fields[1:]}
    return settings._replace(**{name: value for name, value in flags.items() if value is not None})


def optimizer_of(
    named: list[tuple[str, nn.Parameter]], method: nn.Module, args: argparse.Namespace
) -> torch.optim.Optimizer:
    """SGD with momentum .9, AdamW or LARS, by `settings_of`.

    Groups: parameters of the method whose learning rate stays (SimSiam's predictor); for AdamW and LARS tensors of one
    dimension, which do not decay; for LARS depthwise kernels, which do not either.
    """
    optimizer, lr, decay, final_lr, final_decay = settings_of(method, args)
    scale = args.batch_size / 256
    lr *= scale
    groups: dict[tuple, dict] = {}
    for name, p in named:
        kind = "1-D" if p.ndim < 2 else "depthwise" if p.ndim == 4 and p.shape[1] == 1 < p.shape[0] else "normal"
        kind = kind if optimizer == "lars" or (optimizer == "adamw" and kind == "1-D") else "normal"
        group = {"constant": name.startswith(method.constant_lr), "decays": kind == "normal"}
        if optimizer == "lars":
            group["scale"] = kind != "1-D"
        groups.setdefault(tuple(group.values()), group | {"params": []})["params"].append(p)
    ends = {"peak": lr, "final_lr": final_lr * scale, "first_decay": decay, "final_decay": final_decay}
    parts = [g | ends | {"weight_decay": decay * g["decays"]} for g in groups.values()]
    kind = named[0][1].device.type
    if optimizer == "sgd":
        sgd = torch.optim.SGD(parts, lr, momentum=0.9, fused=kind == "cuda" or None)
        for _, p in named:  # fused SGD fails where some have one and others do not; .9 x 0 + g is g
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    # on a CPU too: else DIET's classifier would need its size in temporaries, twice
    return LARS(parts, lr) if optimizer == "lars" else torch.optim.AdamW(parts, lr, fused=kind != "mps")


def distributed(method: nn.Module, **options) -> nn.Module:
    """DDP where there are several ranks; it leaves the parameters alone of which every rank has its own rows."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return method
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, list(method.sharded))
    return DistributedDataParallel(method, **options)


def warmup_steps(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> int:
    """By default none of SGD, with which published CIFAR runs start at full rate: it would cost a short run a tenth."""
    epochs = 0 if isinstance(optimizer, torch.optim.SGD) else min(10, args.epochs / 10)
    return round((epochs if args.warmup_epochs is None else args.warmup_epochs) * steps_per_epoch)


def set_lr(optimizer: torch.optim.Optimizer, step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then a cosine to the group's final_lr, where its lr is not constant; weight decay by a cosine
    over the whole run, where it has an end. Returns the first group's lr."""
    cosine, whole = (0.5 * (1 + math.cos(math.pi * (step - s) / max(1, total - s))) for s in (warmup, 0))
    for group in optimizer.param_groups:
        peak, final, last_decay = group["peak"], group["final_lr"], group["final_decay"]
        if not group["constant"]:
            group["lr"] = peak * (step + 1) / warmup if step < warmup else final + (peak - final) * cosine
        if last_decay is not None and group["decays"]:
            group["weight_decay"] = last_decay + (group["first_decay"] - last_decay) * whole
    return optimizer.param_groups[0]["lr"]


def clip_gradients(method: nn.Module, most: float) -> None:
    """Scales all gradients down together to a norm of `most`. Every rank's rows of a shared-out parameter count, so
    that all ranks scale alike."""
    named = [(n, p) for n, p in method.named_parameters() if p.grad is not None]
    gradients = [[p.grad for n, p in named if (n in method.sharded) == rows] for rows in (False, True)]
    whole, rows = (nn.utils.get_total_norm(g) ** 2 for g in gradients)
    norm = (whole + reduced(rows) if method.sharded else whole).sqrt()
    nn.utils.clip_grads_with_norm_([p for _, p in named], most, norm)
