"""Backbones whose keys are torchvision's, and MLP heads: handcrafted, from a list of operations, or searchable.

build_backbone(arch, stem, width)   (module, feature_dim): images (B, 3, H, W) -> features h (B, F)
OPS, build_head(spec, dims)         the seven operations of NASiam (arXiv 2302.00059) and a chain of them
SearchHead(dims)                    the full mixture of all seven in each layer, with its alphas (L, 7)
PRESETS                             the seven genotypes that the authors published

To add an operation, add a line to OPS; to add a backbone, a function to BACKBONES.

How many heads there are. A layer in -> out has seven names, but not always seven functions (see `distinct_ops`):
where in > out, `identity` is `linear_relu`; where in < out, five of the seven are the same bare Linear, and the
activation that is recorded there means nothing. Where in == out, `identity` commutes with its neighbours: only the
order of the other operations counts. SimSiam's space of 6 + 4 layers so has 7^10 = 282,475,249 names, 103,766,418
choices that differ layer by layer and 43,333,938 heads that differ as functions (`count_heads`).
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, _make_divisible
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import Conv2dNormActivation

# ---- backbones ------------------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    """torchvision's ResNet (1512.03385) without its classifier, of any width; (B, 3, H, W) -> h (B, F).

    stem  "imagenet": 7x7 convolution of stride 2 and max-pool; "small": 3x3, stride 1, no pool, for up to 64 px.
    The last BN of each residual branch starts at zero, as SimSiam's authors do.
    """

    def __init__(self, block: type[nn.Module], depths: Sequence[int], width: float = 1.0, stem: str = "imagenet"):
        super().__init__()
        channels = base = round(64 * width)
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1)}[stem]
        self.conv1 = nn.Conv2d(3, base, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                planes, stride = base * 2**stage, 2 if stage > 0 and i == 0 else 1
                out, shortcut = planes * block.expansion, None
                if stride > 1 or channels != out:
                    shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
                blocks.append(block(channels, planes, stride, shortcut))
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = channels
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, BasicBlock):
                nn.init.zeros_(m.bn2.weight)
            elif isinstance(m, Bottleneck):
                nn.init.zeros_(m.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))  # (B, F, h, w) -> (B, F)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 without its classifier (1801.04381), of any width; images (B, 3, H, W) -> h (B, F).

    stem "small" keeps the resolution in the first convolution and in the second stage: 32 px end at 4x4 instead of 1x1.
    """

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, width: float = 1.0, stem: str = "imagenet"):
        super().__init__()
        small = {"imagenet": False, "small": True}[stem]
        channels = _make_divisible(32 * width, 8)
        layers = [Conv2dNormActivation(3, channels, stride=1 if small else 2, activation_layer=nn.ReLU6)]
        for stage, (expansion, planes, depth, stride) in enumerate(self.STAGES):
            out = _make_divisible(planes * width, 8)
            for i in range(depth):
                first = stride if i == 0 and not (small and stage == 1) else 1
                layers.append(InvertedResidual(channels, out, first, expansion))
                channels = out
        self.feature_dim = _make_divisible(1280 * max(1.0, width), 8)
        layers.append(Conv2dNormActivation(channels, self.feature_dim, kernel_size=1, activation_layer=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


BACKBONES: dict[str, Callable[[float, str], nn.Module]] = {
    "resnet18": lambda width, stem: ResNet(BasicBlock, (2, 2, 2, 2), width, stem),
    "resnet34": lambda width, stem: ResNet(BasicBlock, (3, 4, 6, 3), width, stem),
    "resnet50": lambda width, stem: ResNet(Bottleneck, (3, 4, 6, 3), width, stem),
    "mobilenet_v2": lambda width, stem: MobileNetV2(width, stem),
}


def build_backbone(arch: str, stem: str = "imagenet", width: float = 1.0) -> tuple[nn.Module, int]:
    """(module, feature_dim). Raises ValueError for a name that BACKBONES does not have."""
    if arch not in BACKBONES:
        raise ValueError(f"unknown --arch '{arch}': choose from {', '.join(BACKBONES)}")
    module = BACKBONES[arch](width, stem)
    return module, module.feature_dim


# ---- heads ----------------------------------------------------------------------------------------------------------


def _linear(activation):
    """Linear, BN, activation; where the layer widens, a bare Linear."""

    def build(i, o):
        return nn.Linear(i, o) if i < o else nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), activation())

    return build


def _fit(i, o):
    """What brings i features to o ahead of an operation that itself keeps their number."""
    return [] if i == o else [_linear(nn.ReLU)(i, o)]


class FeaturePool(nn.Module):
    """Pooling of window 3, stride 1, padding 1 along the feature axis of (B, C); the average counts the padding."""

    def __init__(self, pool: type[nn.Module]):
        super().__init__()
        self.pool = pool(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x[:, None])[:, 0]  # (B, C) -> (B, 1, C) -> (B, C)


def _pool(pool):
    return lambda i, o: nn.Sequential(*_fit(i, o), FeaturePool(pool), nn.BatchNorm1d(o))


OPS: dict[str, Callable[[int, int], nn.Module]] = {  # (in, out) -> module on (B, in); 2302.00059, as its code has them
    "maxpool_3x3": _pool(nn.MaxPool1d),
    "avgpool_3x3": _pool(nn.AvgPool1d),
    "identity": lambda i, o: nn.Sequential(*_fit(i, o)),
    "linear_relu": _linear(nn.ReLU),
    "linear_silu": _linear(nn.SiLU),
    "linear_hardswish": _linear(nn.Hardswish),
    "linear_elu": _linear(nn.ELU),
}

PRESETS: dict[str, dict[str, list[str]]] = {
    name: {head: [OP if OP in OPS else "linear_" + OP for OP in ops.split()] for head, ops in heads.items()}
    for name, heads in {
        "simsiam_cifar10_resnet18": {
            "projector": "relu silu elu identity identity relu",
            "predictor": "hardswish avgpool_3x3 avgpool_3x3 hardswish",
        },
        "simsiam_cifar10_resnet50": {
            "projector": "silu hardswish hardswish hardswish silu silu",
            "predictor": "hardswish hardswish avgpool_3x3 silu",
        },
        "simsiam_cifar100_resnet50": {
            "projector": "identity silu silu elu silu elu",
            "predictor": "elu elu elu hardswish",
        },
        "moco_cifar10_resnet18": {"projector": "avgpool_3x3 avgpool_3x3 avgpool_3x3 avgpool_3x3"},
        "moco_cifar100_resnet18": {"projector": "avgpool_3x3 avgpool_3x3 avgpool_3x3 avgpool_3x3"},
        "moco_cifar10_resnet50": {"projector": "identity avgpool_3x3 avgpool_3x3 avgpool_3x3"},
        "simclr_cifar10_resnet50": {"projector": "hardswish hardswish avgpool_3x3 relu relu relu"},
    }.items()
}


def head_dims(layers: int, i: int, hidden: int, o: int) -> list[int]:
    """L + 1 feature counts of a head of L layers: in, then hidden, and out at the end."""
    return [i] + [hidden] * (layers - 1) + [o]


def build_head(spec: Sequence[str], dims: Sequence[int]) -> nn.Sequential:
    """A chain of operations of OPS, the l-th from dims[l] to dims[l + 1] features: (B, dims[0]) -> (B, dims[-1])."""
    if len(dims) != len(spec) + 1:
        raise ValueError(f"a head of {len(spec)} operations needs {len(spec) + 1} dims, not {len(dims)}")
    unknown = [name for name in spec if name not in OPS]
    if unknown:
        raise ValueError(f"unknown operation {unknown[0]!r} in a head: choose from {', '.join(OPS)}")
    return nn.Sequential(*(OPS[name](i, o) for name, i, o in zip(spec, dims, dims[1:])))


class SearchHead(nn.Module):
    """Every layer is y = sum_k softmax(alpha_l)_k op_k(x) over all of OPS (2302.00059); alpha (L, 7) starts at zero."""

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        self.dims = list(dims)
        self.alpha = nn.Parameter(torch.zeros(len(dims) - 1, len(OPS)))
        self.layers = nn.ModuleList(nn.ModuleList(op(i, o) for op in OPS.values()) for i, o in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for ops, weights in zip(self.layers, self.alpha.softmax(1)):
            x = sum(weight * op(x) for weight, op in zip(weights, ops))
        return x

    def discretise(self) -> list[str]:
        """The strongest operation of each layer, identity and pools included."""
        names = list(OPS)
        return [names[k] for k in self.alpha.argmax(1).tolist()]

    def entropy(self) -> list[float]:
        """Of softmax(alpha) in each layer, over ln 7: 1 where nothing is decided, 0 where all is."""
        p = self.alpha.detach().double().softmax(1)
        return (torch.special.entr(p).sum(1) / math.log(len(OPS))).tolist()


def true_name(op: str, i: int, o: int) -> str:
    """What an operation comes to in a layer i -> o: its name, or that of the one that it coincides with there."""
    if i > o and op == "identity":
        return "linear_relu"
    return "linear" if i < o and op not in ("maxpool_3x3", "avgpool_3x3") else op


def distinct_ops(i: int, o: int) -> list[str]:
    """The operations that differ as functions in a layer i -> o, one name for each."""
    return list({true_name(op, i, o): op for op in OPS}.values())


def random_head(layers: int, rng: random.Random) -> list[str]:
    """Each layer drawn evenly from the names in OPS: what the argmax of random alphas would be."""
    return [rng.choice(list(OPS)) for _ in range(layers)]


def count_heads(dims: Sequence[int]) -> tuple[int, int, int]:
    """How many heads there are: by name, by choices that differ within their layer, and as functions.

    The third counts a run of m layers with in == out as its sequences of 0..m operations without identity.
    """
    names = choices = functions = 1
    run = 0
    for i, o in [*pairwise(dims), (0, 1)]:
        if i == o:
            run += 1
        else:
            functions *= sum((len(OPS) - 1) ** k for k in range(run + 1))
            run = 0
    for i, o in pairwise(dims):
        names, choices = names * len(OPS), choices * len(distinct_ops(i, o))
        functions *= len(distinct_ops(i, o)) if i != o else 1
    return names, choices, functions


def load_heads(source: str, expected: Sequence[str]) -> dict[str, list[str]] | None:
    """--heads: `default` -> None (handcrafted), a preset's name, or the path of an arch.json -> {head: operations}.

    Raises FileNotFoundError or ValueError, naming what is wrong, where a head of `expected` is missing or cannot be
    built.
    """
    if source == "default":
        return None
    if source in PRESETS:
        heads = PRESETS[source]
    else:
        try:
            with open(source) as file:
                heads = json.load(file)["heads"]
        except OSError as error:
            known = ", ".join(["default", *PRESETS])
            raise FileNotFoundError(f"--heads '{source}' is neither a readable file nor one of {known}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{source}' is not an arch.json: no JSON object with \"heads\" in it") from error
    if not isinstance(heads, dict) or sorted(heads) != sorted(expected):
        have = ", ".join(map(str, heads)) if isinstance(heads, dict) else type(heads).__name__
        raise ValueError(
            f"'{source}' holds heads for another method: it has {have}; this one needs {', '.join(expected)}"
        )
    for head, ops in heads.items():
        if not isinstance(ops, list) or not ops:
            raise ValueError(f"'{source}': {head} must be a list of operations")
        unknown = [op for op in ops if not isinstance(op, str) or op not in OPS]
        if unknown:
            raise ValueError(f"'{source}': {head} has the unknown operation {unknown[0]!r}; known: {', '.join(OPS)}")
    return heads
