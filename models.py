"""Backbones with torchvision's keys, MLP heads, and the searchable forms of both. Imports no other file here.

build_backbone(arch, stem, width)   (module, feature_dim); the module takes images (B, 3, H, W) to features h (B, F)
SearchBackbone(space, width, stem)  the supernet of a space in SPACES, its alphas, and its subnets as slices
build_head(spec, dims)              a chain of operations in OPS, those of NASiam (arXiv 2302.00059)
SearchHead(dims)                    a mixture of all operations in each layer, with alpha (L, 7)
PRESETS                             the seven genotypes that NASiam's authors published

New backbones of known blocks go to BACKBONES, operations to OPS, and spaces to SPACES. A new kind of choice, such as
squeeze-excite, needs a field of BlockSpec, an entry in FIELDS, a value in each of BACKBONES, a module in a block that
does nothing if its masked weights are zero, entries in MASKS, and a term in the block's `macs`. Older arch.json files
without the field are refused. `derive` enumerates all networks: keep to about 50 options per stage.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, count, groupby, pairwise, product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import mobilenetv2, resnet, vision_transformer
from torchvision.ops import Conv2dNormActivation, StochasticDepth

# ---- architectures: plain data --------------------------------------------------------------------------------------


class BlockSpec(NamedTuple):
    """The arguments of a block."""

    stage: int
    c_in: int
    c_out: int
    inner: int
    kernel: int
    stride: int
    index: int = 0  # within its stage

    @property
    def reshapes(self) -> bool:
        return self.stride > 1 or self.c_in != self.c_out

    def strided(self, side: int) -> int:
        """The side of the output's feature map, given that of the input."""
        return -(-side // self.stride)


# The fields of a stage and their legal values: exact types (bool is no int), minimum, maximum, whether odd.
FIELDS = {
    "depth": ([int], 1, 64, False),
    "inner": ([int, float], 1 / 64, 64, False),  # a factor of the planes, or in inverted blocks of c_in
    "kernel": ([int], 1, 31, True),
}
# Architectures as in arch.json: the block, and for each of FIELDS a list over the stages.
BACKBONES: dict[str, dict] = {
    "resnet18": {"block": "basic", "depth": [2, 2, 2, 2], "inner": [1.0] * 4, "kernel": [3] * 4},
    "resnet34": {"block": "basic", "depth": [3, 4, 6, 3], "inner": [1.0] * 4, "kernel": [3] * 4},
    "resnet50": {"block": "bottleneck", "depth": [3, 4, 6, 3], "inner": [1.0] * 4, "kernel": [3] * 4},
    "mobilenet_v2": {
        "block": "inverted",
        "depth": [1, 2, 3, 4, 3, 3, 1],
        "inner": [1.0] + [6.0] * 6,
        "kernel": [3] * 7,
    },
}
VITS = {"vit_tiny": {"dim": 192, "heads": 3}}
ARCHS = (*BACKBONES, *VITS)


def check_arch(arch: object, source: str = "arch") -> dict:
    """Returns arch if it is an architecture as in BACKBONES, else raises ValueError; `source` starts the message."""
    if not isinstance(arch, dict) or set(arch) != {"block", *FIELDS}:
        raise ValueError(f"{source}: an architecture has the keys {', '.join(('block', *FIELDS))}, and no others")
    if not isinstance(arch["block"], str) or arch["block"] not in BLOCKS:
        raise ValueError(f"{source}: unknown block {arch['block']!r}: choose from {', '.join(BLOCKS)}")
    stages = 7 if arch["block"] == "inverted" else 4
    for name, (types, low, high, odd) in FIELDS.items():
        values = arch[name] if isinstance(arch[name], list) else []
        good = [v for v in values if type(v) in types and low <= v <= high and (v % 2 or not odd)]
        if not len(good) == len(values) == stages:
            numbers = "odd numbers" if odd else "numbers"
            raise ValueError(f'{source}: "{name}" must be a list of {stages} {numbers}, {low:g} to {high:g}')
    return arch


def describe(arch: str | dict) -> str:
    """A readable line: the block, then depth x inner width and kernel of each stage."""
    if isinstance(arch, str):
        return arch
    stages = zip(arch["depth"], arch["inner"], arch["kernel"])
    return " ".join([arch["block"], *(f"{depth}x{inner:g}k{kernel}" for depth, inner, kernel in stages)])


class Plan(NamedTuple):
    channels: int  # of the stem's convolution, as kernel and stride
    kernel: int
    stride: int
    pool: int  # stride of the stem's max-pool; 1: no pool
    blocks: list[BlockSpec]
    last: int | None  # channels of MobileNetV2's last 1x1 convolution


def plan(arch: dict, width: float = 1.0, stem: str = "imagenet") -> Plan:
    """The channels and strides of torchvision's networks, for any depths, inner widths and kernels.

    stem: "imagenet" is a convolution of stride 2, in ResNets 7x7 with a max-pool. "small", for up to 64 px, is a 3x3
    convolution of stride 1 without pool; MobileNetV2's second stage has stride 1 too, so that 32 px end at 4x4.
    """
    inverted = arch["block"] == "inverted"
    if inverted:
        widths = [mobilenetv2._make_divisible(c * width, 8) for c in (32, 16, 24, 32, 64, 96, 160, 320)]
        channels, *c_outs = widths
        kernel, stride, pool = (3, 1, 1) if stem == "small" else (3, 2, 1)
        strides = [1, stride, 2, 2, 1, 2, 1]
        last = mobilenetv2._make_divisible(1280 * max(1.0, width), 8)  # torchvision never narrows it
    else:
        channels = round(64 * width)
        kernel, stride, pool = (3, 1, 1) if stem == "small" else (7, 2, 2)
        expansion = BLOCKS[arch["block"]].expansion
        c_outs = [channels * 2**stage * expansion for stage in range(4)]
        strides = [1, 2, 2, 2]
        last = None
    blocks = []
    c_in = channels
    for stage, c_out in enumerate(c_outs):
        values = {name: arch[name][stage] for name in FIELDS}
        ratio = values.pop("inner")
        for index in range(values.pop("depth")):
            inner = max(1, round(ratio * (c_in if inverted else c_out // expansion)))
            block_stride = strides[stage] if index == 0 else 1
            blocks.append(BlockSpec(stage, c_in, c_out, inner, stride=block_stride, index=index, **values))
            c_in = c_out
    return Plan(channels, kernel, stride, pool, blocks, last)


def stage_macs(arch: dict, width: float = 1.0, stem: str = "imagenet", size: int = 224) -> list[int]:
    """Multiply-accumulates for one image: of the stem, each stage, and the last convolution if there is one."""
    channels, kernel, stride, pool, blocks, last = plan(arch, width, stem)
    side = -(-size // stride)  # rounded up
    parts = [side**2 * kernel**2 * 3 * channels] + [0] * len(arch["depth"])
    side = -(-side // pool)
    for spec in blocks:
        parts[1 + spec.stage] += BLOCKS[arch["block"]].macs(spec, side)
        side = spec.strided(side)
    return [*parts, side**2 * blocks[-1].c_out * last] if last else parts


def macs(arch: dict, width: float = 1.0, stem: str = "imagenet", size: int = 224) -> int:
    return sum(stage_macs(arch, width, stem, size))


# ---- blocks ---------------------------------------------------------------------------------------------------------


class BasicBlock(resnet.BasicBlock):
    """torchvision's BasicBlock with any inner width and kernel."""

    def __init__(self, spec: BlockSpec):
        super().__init__(spec.c_in, spec.c_out, spec.stride, _shortcut(spec))
        self.conv1 = _conv(spec.c_in, spec.inner, spec.kernel, spec.stride)
        self.bn1 = nn.BatchNorm2d(spec.inner)
        self.conv2 = _conv(spec.inner, spec.c_out, spec.kernel)
        nn.init.zeros_(self.bn2.weight)

    @staticmethod
    def macs(spec: BlockSpec, side: int) -> int:
        convs = spec.kernel**2 * spec.inner * (spec.c_in + spec.c_out)
        return spec.strided(side) ** 2 * (convs + spec.c_in * spec.c_out * spec.reshapes)


class Bottleneck(resnet.Bottleneck):
    """torchvision's Bottleneck with any inner width and kernel; c_out is four times the planes."""

    def __init__(self, spec: BlockSpec):
        super().__init__(spec.c_in, spec.c_out // self.expansion, spec.stride, _shortcut(spec))
        self.conv1 = _conv(spec.c_in, spec.inner, 1)
        self.bn1 = nn.BatchNorm2d(spec.inner)
        self.conv2 = _conv(spec.inner, spec.inner, spec.kernel, spec.stride)
        self.bn2 = nn.BatchNorm2d(spec.inner)
        self.conv3 = _conv(spec.inner, spec.c_out, 1)
        nn.init.zeros_(self.bn3.weight)

    @staticmethod
    def macs(spec: BlockSpec, side: int) -> int:
        convs = spec.kernel**2 * spec.inner**2 + spec.inner * spec.c_out
        at_output = spec.strided(side) ** 2 * (convs + spec.c_in * spec.c_out * spec.reshapes)
        return side**2 * spec.c_in * spec.inner + at_output


class InvertedResidual(mobilenetv2.InvertedResidual):
    """torchvision's InvertedResidual with any kernel; inner is c_in times the expansion. An expansion of 1 has no first
    convolution and so other keys: it must not be an option of a space."""

    def __init__(self, spec: BlockSpec):
        super().__init__(spec.c_in, spec.c_out, spec.stride, spec.inner / spec.c_in)
        self.conv[-3] = Conv2dNormActivation(
            spec.inner, spec.inner, spec.kernel, spec.stride, groups=spec.inner, activation_layer=nn.ReLU6
        )

    @staticmethod
    def macs(spec: BlockSpec, side: int) -> int:
        expand = spec.c_in * spec.inner if spec.inner != spec.c_in else 0
        return side**2 * expand + spec.strided(side) ** 2 * spec.inner * (spec.kernel**2 + spec.c_out)


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


class Pointwise(nn.Conv2d):
    """A strided 1x1 convolution without bias that slices its input. Backward of torch's own strided one corrupts memory
    on a CPU in channels_last (torch 2.11 and 2.15; 8 input channels, 64 px)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight)


def _shortcut(spec: BlockSpec) -> nn.Module | None:
    if not spec.reshapes:
        return None
    conv = Pointwise(spec.c_in, spec.c_out, 1, spec.stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(spec.c_out))


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck, "inverted": InvertedResidual}
# The parameters of a supernet's block that a choice masks. Inner channels are masked at the input of the next
# convolution, after BN and activation. Before BN, which undoes any scale, their gates would have no gradient.
MASKS = {
    "basic": {
        "kernel": ["conv1.weight", "conv2.weight"],
        "inner": ["conv2.weight"],
        "depth": ["bn2.weight", "bn2.bias"],
    },
    "bottleneck": {
        "kernel": ["conv2.weight"],
        "inner": ["conv2.weight", "conv3.weight"],
        "depth": ["bn3.weight", "bn3.bias"],
    },
    "inverted": {"kernel": ["conv.1.0.weight"], "inner": ["conv.2.weight"], "depth": ["conv.3.weight", "conv.3.bias"]},
}


def _kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def new_block(block: str, spec: BlockSpec) -> nn.Module:
    return BLOCKS[block](spec).apply(_kaiming)


# ---- networks -------------------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    """torchvision's ResNet (1512.03385) without the classifier: images (B, 3, H, W) -> h (B, F). The last BN of each
    residual branch is initialised to zero, as in SimSiam's code."""

    def __init__(self, arch: dict, width: float = 1.0, stem: str = "imagenet", make_block: Callable = new_block):
        super().__init__()
        channels, kernel, stride, pool, blocks, _ = plan(arch, width, stem)
        self.conv1 = _conv(3, channels, kernel, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool > 1 else nn.Identity()
        for stage in range(4):
            layer = [make_block(arch["block"], spec) for spec in blocks if spec.stage == stage]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.feature_dim = blocks[-1].c_out
        self.conv1.apply(_kaiming)

    @staticmethod
    def prefixes(arch: dict) -> list[list[str]]:  # of the state dict's keys, by stage and block
        return [[f"layer{stage + 1}.{index}" for index in range(depth)] for stage, depth in enumerate(arch["depth"])]

    def stages(self, x: Tensor) -> list[Tensor]:
        """The feature maps (B, C, h, w) of the four stages."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1].mean((2, 3))  # (B, F, h, w) -> (B, F)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 (1801.04381) without the classifier: images (B, 3, H, W) -> h (B, F)."""

    def __init__(self, arch: dict, width: float = 1.0, stem: str = "imagenet", make_block: Callable = new_block):
        super().__init__()
        channels, kernel, stride, _, blocks, self.feature_dim = plan(arch, width, stem)
        self.features = nn.Sequential(
            Conv2dNormActivation(3, channels, kernel, stride, activation_layer=nn.ReLU6),
            *(make_block("inverted", spec) for spec in blocks),
            Conv2dNormActivation(blocks[-1].c_out, self.feature_dim, 1, activation_layer=nn.ReLU6),
        )
        self.ends = set(accumulate(arch["depth"]))  # indices in `features` of each stage's last block
        self.features[0].apply(_kaiming)
        self.features[-1].apply(_kaiming)

    @staticmethod
    def prefixes(arch: dict) -> list[list[str]]:  # the last convolution counts as a stage
        numbers = count(1)  # features.0 is the stem
        return [[f"features.{next(numbers)}" for _ in range(depth)] for depth in (*arch["depth"], 1)]

    def stages(self, x: Tensor) -> list[Tensor]:
        """The feature maps (B, C, h, w) of the seven stages; the last includes the last 1x1 convolution."""
        maps = []
        for n, module in enumerate(self.features):
            x = module(x)
            if n in self.ends:
                maps.append(x)
        return [*maps[:-1], x]

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1].mean((2, 3))  # (B, F, h, w) -> (B, F)


class ViT(nn.Module):
    """torchvision's VisionTransformer (2010.11929) without the classifier: images (B, 3, H, W) -> h (B, dim), the class
    token after the last norm.

    stem: "imagenet" has 14 x 14 patches of 16 px, "small" 8 x 8 of 4 px. For images of other sizes, position embeddings
    are interpolated bicubically, as in DINO. drop_path: probability that an image skips a residual branch in training,
    rising linearly over the blocks (1603.09382).
    """

    def __init__(self, dim: int, heads: int, layers: int = 12, stem: str = "imagenet", drop_path: float = 0.0):
        super().__init__()
        self.patch, grid = {"imagenet": (16, 14), "small": (4, 8)}[stem]
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.conv_proj = nn.Conv2d(3, dim, self.patch, self.patch)
        self.encoder = vision_transformer.Encoder(grid**2 + 1, layers, heads, dim, 4 * dim, 0.0, 0.0, norm)
        for block, p in zip(self.encoder.layers, np.linspace(0, drop_path, layers).tolist()):
            if p:  # replaces torchvision's dropout after the attention and the MLP, which has no keys either
                block.dropout = block.mlp[-1] = StochasticDepth(p, "row")
        self.feature_dim = dim
        fan_in = 3 * self.patch**2
        nn.init.trunc_normal_(self.conv_proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.conv_proj.bias)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + patches, dim), with position embeddings added."""
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"views of {height} x {width} px: a ViT needs multiples of its patch, {self.patch}")
        x = self.conv_proj(x)  # (B, dim, rows, columns)
        rows, columns = x.shape[2:]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        cls, position = self.encoder.pos_embedding.split([1, self.encoder.pos_embedding.shape[1] - 1], 1)
        grid = math.isqrt(position.shape[1])
        if (rows, columns) != (grid, grid):
            position = position.transpose(1, 2).unflatten(2, (grid, grid))  # (1, dim, grid, grid)
            position = F.interpolate(position, (rows, columns), mode="bicubic").flatten(2).transpose(1, 2)
        return x + torch.cat([cls, position], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_blocks(x, 1)

    def stages(self, x: Tensor) -> list[Tensor]:
        """One feature map (B, dim, rows, columns): the patches' tokens after the last norm."""
        patches = self.encoder.ln(self.encoder.layers(self.tokens(x)))[:, 1:]  # (B, rows * columns, dim)
        return [patches.transpose(1, 2).unflatten(2, (x.shape[2] // self.patch, -1))]

    def last_blocks(self, x: Tensor, n: int) -> Tensor:
        """The normalised class tokens after each of the last n blocks, concatenated: (B, n dim), as in DINO's linear
        evaluation (2104.14294)."""
        x = self.tokens(x)
        out = []
        for k, block in enumerate(self.encoder.layers):
            x = block(x)
            if k >= len(self.encoder.layers) - n:
                out.append(self.encoder.ln(x)[:, 0])
        return torch.cat(out, 1)


NETWORKS = {"basic": ResNet, "bottleneck": ResNet, "inverted": MobileNetV2}
MAX_PARAMETERS = 2_000_000_000


def size_of(arch: str | dict, width: float, stem: str, size: int) -> tuple[int | None, int]:
    """Returns (MACs for an image, None for a ViT; parameters). Raises ValueError if the network cannot be built."""
    with torch.device("meta"):
        network, _ = build_backbone(arch, stem, width)
    spec = BACKBONES.get(arch) if isinstance(arch, str) else arch
    return spec and macs(spec, width, stem, size), sum(p.numel() for p in network.parameters())


def build_backbone(
    arch: str | dict, stem: str = "imagenet", width: float = 1.0, drop_path: float = 0.0
) -> tuple[nn.Module, int]:
    """Returns (module, feature_dim) for a name in ARCHS or an architecture as in BACKBONES. width scales all channels.

    Raises ValueError for any other architecture, one with too many parameters, or a drop_path without a ViT.
    """
    named = isinstance(arch, str)
    if named and arch not in ARCHS:
        raise ValueError(f"unknown architecture '{arch}': choose from {', '.join(ARCHS)}")
    if named and arch in VITS:
        heads = VITS[arch]["heads"]
        dim = heads * max(1, round(VITS[arch]["dim"] * width / heads))
        return ViT(dim, heads, stem=stem, drop_path=drop_path), dim
    if drop_path:
        raise ValueError(f"a drop path of {drop_path:g} means nothing to {describe(arch)}: it is for a ViT")
    spec = BACKBONES[arch] if named else check_arch(arch)
    network = NETWORKS[spec["block"]]
    if not named or width > 8:  # it may be of any size
        with torch.device("meta"):
            size = sum(p.numel() for p in network(spec, width, stem).parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"{describe(arch)} x{width:g} has {size:,} parameters, more than {MAX_PARAMETERS:,}")
    if not all(block.c_out for block in plan(spec, width, stem).blocks):
        raise ValueError(f"{describe(arch)} x{width:g} has no channels left: a larger width is needed")
    module = network(spec, width, stem)
    return module, module.feature_dim


# ---- searchable backbones -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """Architectures that differ from a handcrafted one by the choices made in each of some stages."""

    handcrafted: str
    stages: tuple[int, ...]
    choices: dict[str, tuple] = field(hash=False)  # values of some of FIELDS, the largest last

    @property
    def options(self) -> list[tuple]:
        """All combinations of a stage's choices, the largest last: O of them."""
        return list(product(*self.choices.values()))

    def arch(self, choice: Sequence[int]) -> dict:
        """The architecture with the choice[s]-th option in the s-th searched stage."""
        arch = copy.deepcopy(BACKBONES[self.handcrafted])
        for stage, option in zip(self.stages, choice, strict=True):
            for name, value in zip(self.choices, self.options[option]):
                arch[name][stage] = value
        return arch

    def choice(self, arch: str | dict) -> list[int] | None:
        """The inverse of `arch`; None if the architecture is not in the space."""
        arch = BACKBONES[arch] if isinstance(arch, str) else arch
        try:
            choice = [self.options.index(tuple(arch[name][stage] for name in self.choices)) for stage in self.stages]
        except (ValueError, IndexError):  # no such option, or fewer stages
            return None
        return choice if self.arch(choice) == arch else None

    def costs(self, width: float, stem: str, size: int) -> tuple[int, Tensor]:
        """Returns (base, table (S, O)): MACs of the smallest network, and what each option adds to it. Widths between
        stages are fixed, so that stages are independent: a network's MACs are base + the sum of its entries."""
        one_hot = np.eye(len(self.stages), dtype=int)
        base = macs(self.arch(0 * one_hot[0]), width, stem, size)
        options = range(len(self.options))
        table = [[macs(self.arch(option * row), width, stem, size) - base for option in options] for row in one_hot]
        return base, torch.tensor(table, dtype=torch.float64)


RESNET_CHOICES = {"depth": (1, 2, 3, 4), "inner": (0.25, 0.5, 0.75, 1.0), "kernel": (3, 5)}
MOBILENET_CHOICES = {"depth": (1, 2, 3, 4), "inner": (2.0, 4.0, 6.0), "kernel": (3, 5, 7)}
# ResNet18 and MobileNetV2 are points of their spaces; ResNet50, with its stage of 6 blocks, is not.
SPACES: dict[str, Space] = {
    "resnet": Space("resnet18", (0, 1, 2, 3), RESNET_CHOICES),
    "resnetk1": Space("resnet18", (0, 1, 2, 3), {**RESNET_CHOICES, "inner": (0.25, 0.5, 1.0), "kernel": (1, 3, 5)}),
    "bottleneck": Space("resnet50", (0, 1, 2, 3), RESNET_CHOICES),
    "mobilenet": Space("mobilenet_v2", (1, 2, 3, 4, 5), MOBILENET_CHOICES),
}
BAND = 0.95, 1.0  # a network meets its target if its MACs are within these multiples of it


class Choices(nn.Module):
    """An alpha (S, options) for each choice of a space, and the current one-hot gates of the same shapes.

    A deep copy is the same object, so that a momentum teacher shares the student's alphas and gates.
    """

    def __init__(self, space: Space):
        super().__init__()
        self.space = space
        for name, values in space.choices.items():
            setattr(self, f"{name}_alpha", nn.Parameter(torch.zeros(len(space.stages), len(values))))
        self.set(self.largest)

    def __deepcopy__(self, memo):
        return self

    @property
    def largest(self) -> list[int]:
        return [len(self.space.options) - 1] * len(self.space.stages)

    def alphas(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(f"{name}_alpha") for name in self.space.choices}

    def sample(self, tau: float, rng: np.random.Generator) -> None:
        """Samples hard gates by Gumbel softmax of temperature tau (1611.01144), with straight-through gradients if
        alphas require them. The noise is drawn on the host, so that all ranks and devices sample the same gates."""
        alphas = self.alphas()
        first, *_ = alphas.values()
        sizes = [alpha.shape[1] for alpha in alphas.values()]
        noise = torch.from_numpy(rng.gumbel(size=(len(first), sum(sizes)))).to(first.dtype)
        if first.device.type == "cuda":
            noise = noise.pin_memory()  # from pageable memory the host would wait for the copy
        self.gates = {}
        self.known_choice = None
        for (name, alpha), gumbel in zip(alphas.items(), noise.to(first.device, non_blocking=True).split(sizes, 1)):
            soft = ((alpha + gumbel) / tau).softmax(1)
            hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype)
            self.gates[name] = hard + (soft - soft.detach()) if alpha.requires_grad else hard

    def set(self, choice: Sequence[int]) -> None:
        """Sets the gates to one option a stage, without a copy to a GPU."""
        self.gates = {name: torch.zeros_like(alpha) for name, alpha in self.alphas().items()}
        values = np.unravel_index(choice, [gate.shape[1] for gate in self.gates.values()])
        for gate, value_of_stage in zip(self.gates.values(), values):
            for row, value in enumerate(value_of_stage.tolist()):
                gate[row, value].fill_(1.0)  # an assignment would copy the 1 from the host
        self.known_choice = list(choice)

    def choice(self) -> list[int]:
        """The options of the current gates, as for Space.arch. Synchronises with the device if they were sampled."""
        if self.known_choice is None:
            option = 0
            for gate in self.gates.values():
                option = option * gate.shape[1] + gate.argmax(1)
            self.known_choice = option.tolist()
        return self.known_choice

    def log_probabilities(self) -> Tensor:
        """Log probabilities (S, O) of all options, the sums over their independent choices."""
        total, *others = (alpha.log_softmax(1) for alpha in self.alphas().values())
        for other in others:
            total = (total[:, :, None] + other[:, None, :]).flatten(1)
        return total

    def expected_cost(self, base: int, table: Tensor) -> Tensor:
        """The expected MACs or time under the alphas, differentiable; base and table are as in Space.costs."""
        return base + (self.log_probabilities().exp() * table).sum()


class SearchBackbone(nn.Module):
    """The supernet: the largest network of a space, partly masked by each choice (2203.08130; the design is ours).

    A smaller kernel is the centre of the largest, fewer inner channels are the first ones, and a block beyond the depth
    has its last BN at zero. The masked network costs as much as the largest, and every option gets a gradient. The
    subnet, sliced out of the weights, has the same outputs but for the order of sums.

    If gates require gradients, forward runs the masked network, whose shapes never change, which suits a compiler. If
    not, it runs the subnet at its own cost. Blocks beyond the depth then get no gradient, so that optimisers leave them
    alone; channels and kernel borders outside the slice get zeros, and still move by momentum and weight decay.
    """

    def __init__(self, space: Space, width: float = 1.0, stem: str = "imagenet"):
        super().__init__()
        self.space, self.width, self.stem = space, width, stem
        self.choices = Choices(space)
        arch = space.arch(self.choices.largest)
        self.supernet, self.feature_dim = build_backbone(arch, stem, width)
        shapes = {choice: [self._shapes(choice, value) for value in values] for choice, values in space.choices.items()}
        rows = {prefix: row for row, s in enumerate(space.stages) for prefix in self.supernet.prefixes(arch)[s]}
        self.masked = []  # (row of the gates, choice, parameter, shape) for the n-th buffer of masks
        for prefix, row in rows.items():
            for name, parameter in self.supernet.get_submodule(prefix).named_parameters():
                for choice, names in MASKS[arch["block"]].items():
                    if choice in space.choices and name in names:
                        masks = _masks([small.get(f"{prefix}.{name}") for small in shapes[choice]], parameter.shape)
                        # flat: Module.to(channels_last) refuses tensors of five dimensions
                        self.register_buffer(f"masks_{len(self.masked)}", masks.flatten(0, -2), persistent=False)
                        self.masked.append((row, choice, f"{prefix}.{name}", masks.shape[:-1]))

    def _shapes(self, choice: str, value: float) -> dict[str, torch.Size]:
        """Shapes, by the supernet's names, of the subnet that is the largest in all but one choice."""
        option = tuple(value if name == choice else values[-1] for name, values in self.space.choices.items())
        _, parts = self.skeleton([self.space.options.index(option)] * len(self.space.stages))
        return dict(parts.values())

    def masked_weights(self) -> dict[str, Tensor]:
        """The parameters that have masks, masked by the gates, by name."""
        weights = {}
        for n, (row, choice, name, size) in enumerate(self.masked):
            masks = getattr(self, f"masks_{n}")  # (elements, options)
            # a matrix product would round the gates' gradients under autocast
            mask = (masks * self.choices.gates[choice][row]).sum(-1).view(size)
            weights[name] = weights.get(name, self.supernet.get_parameter(name)) * mask
        return weights

    def forward(self, x: Tensor) -> Tensor:
        if any(gate.requires_grad for gate in self.choices.gates.values()):
            return functional_call(self.supernet, self.masked_weights(), x)
        choice = self.choices.choice()
        network, _ = self.skeleton(choice)
        network.train(self.training)
        return functional_call(network, self.slices(choice), x)

    def skeleton(self, choice: Sequence[int]) -> tuple[nn.Module, dict[str, tuple[str, torch.Size]]]:
        """(the subnet on the meta device, {name of its tensor: (name in the supernet, shape in the subnet)})"""
        synced = any(isinstance(m, nn.SyncBatchNorm) for m in self.supernet.modules())
        return _skeleton(self.space, tuple(choice), self.width, self.stem, synced)

    def slices(self, choice: Sequence[int]) -> dict[str, Tensor]:
        """The subnet's parameters and buffers, views of the supernet's, by the subnet's names."""
        _, parts = self.skeleton(choice)
        supernet = self.supernet.state_dict(keep_vars=True)
        return {name: _slice(supernet[source], shape) for name, (source, shape) in parts.items()}

    def subnet(self, choice: Sequence[int]) -> nn.Module:
        """A subnet with a copy of its weights. Its BN statistics need `recalibrate`."""
        network, _ = build_backbone(self.space.arch(choice), self.stem, self.width)
        network.to(next(self.supernet.parameters()))  # device and precision
        network.load_state_dict(self.slices(choice))
        return network


def _slice(large: Tensor, shape: Sequence[int]) -> Tensor:
    """A subnet's part of a supernet's tensor: the first channels and the centre of the kernel."""
    for dim, n in enumerate(shape):
        if n < large.shape[dim]:
            start = (large.shape[dim] - n) // 2 if dim > 1 else 0
            large = large.narrow(dim, start, n)
    return large


def _masks(small: list[Sequence[int] | None], large: Sequence[int]) -> Tensor:
    """Masks (..., options): ones in the slice of shape small[option], zeros elsewhere; all zeros for None. They have
    size 1 along the output dimension (see MASKS) and along dimensions that all options use whole."""
    least = [min(sizes) for sizes in zip(*filter(None, small))]
    size = [n if dim > 0 and n > least[dim] else 1 for dim, n in enumerate(large)]
    masks = torch.zeros(*size, len(small))
    for option, shape in enumerate(small):
        if shape is not None:
            _slice(masks[..., option], [min(n, most) for n, most in zip(shape, size)]).fill_(1)
    return masks


# A search visits a new subnet nearly every step, and blocks take long to build, so they are cached. A spec includes the
# block's index in its stage, so that no network contains a block twice.
@lru_cache(maxsize=4096)
def _meta_block(block: str, spec: BlockSpec) -> nn.Module:
    with torch.device("meta"):
        return BLOCKS[block](spec)


@lru_cache(maxsize=256)
def _skeleton(space: Space, choice: tuple[int, ...], width: float, stem: str, synced: bool) -> tuple[nn.Module, dict]:
    arch = space.arch(choice)
    with torch.device("meta"):
        network = NETWORKS[arch["block"]](arch, width, stem, _meta_block)
    renamed = {}
    for own, supernets in zip(network.prefixes(arch), network.prefixes(space.arch([-1] * len(choice)))):
        renamed.update(zip(own, supernets))
    parts = {}
    for name, tensor in network.state_dict().items():
        prefix = ".".join(name.split(".")[:2])
        parts[name] = renamed.get(prefix, prefix) + name[len(prefix) :], tensor.shape
    return (nn.SyncBatchNorm.convert_sync_batchnorm(network) if synced else network), parts


def in_mmacs(macs: float) -> str:
    return f"{macs / 1e6:.4g} MMACs"


def derive(
    scores: Tensor, base: float, table: Tensor, target: float, text: Callable[[float], str] = in_mmacs
) -> list[int]:
    """The choice with the highest sum of scores (S, O) among all whose cost, by default MACs, is in BAND of the target.
    Raises ValueError if there is none; `text` formats costs.

    With log probabilities as scores this is the most likely network at that cost, which an argmax in each stage misses.
    """
    scores = scores.detach().double().cpu()
    stages, options = table.shape
    # combinations of all stages but the first, with which they would take O times the memory
    rest_score, rest_cost = (_sums(of_options[1:]) for of_options in (scores, table))
    found = []  # the best network for each option of the first stage
    for first in range(options):
        cost = base + table[0, first] + rest_cost
        in_band = (cost >= BAND[0] * target) & (cost <= BAND[1] * target)
        score, rest = torch.where(in_band, rest_score, -math.inf).max(0)
        found.append((float(score + scores[0, first]), first, rest))
    best_score, first, rest = max(found, key=lambda entry: entry[0])
    if best_score == -math.inf:
        largest = base + float(table.max(1).values.sum())
        wanted = f"{BAND[0]:g} to {BAND[1]:g} of {text(target)}"
        have = f"they go from {text(base)} to {text(largest)}"
        raise ValueError(f"no network of the space has {wanted}: {have}")
    return [first, *map(int, torch.unravel_index(rest, [options] * (stages - 1)))]


def _sums(table: Tensor) -> Tensor:
    """Sums of all combinations of one entry per row: (S, O) -> (O^S,)."""
    total = torch.zeros(1, dtype=torch.float64)
    for row in table:
        total = (total[:, None] + row).flatten()
    return total


def random_choice(
    base: int, table: Tensor, target: float, generator: torch.Generator, band: tuple[float, float] = BAND
) -> list[int]:
    """A uniformly random choice among those whose cost is in a band of the target; the band must include BAND."""
    stages, options = table.shape
    for _ in range(20):
        choices = torch.randint(options, (4096, stages), generator=generator)
        cost = base + table[torch.arange(stages), choices].sum(1)
        good = choices[(cost >= band[0] * target) & (cost <= band[1] * target)]
        if len(good):
            return good[0].tolist()
    derive(table, base, table, target)  # raises ValueError if there is no such choice
    good = choices_in(base, table, target, band)  # few among very many
    return good[torch.randint(len(good), (1,), generator=generator)[0]].tolist()


def choices_in(base: float, table: Tensor, target: float, band: tuple[float, float] = BAND) -> Tensor:
    """All choices (N, S) whose cost is in a band of the target."""
    stages, options = table.shape
    rest_cost, found = _sums(table[1:]), []
    for first in range(options):
        cost = base + table[0, first] + rest_cost
        rows = ((cost >= band[0] * target) & (cost <= band[1] * target)).nonzero()[:, 0]
        rest = torch.unravel_index(rows, [options] * (stages - 1))
        found.append(torch.stack([torch.full_like(rows, first), *rest], 1))
    return torch.cat(found)


def handcrafted_scores(space: Space) -> Tensor:
    """Scores (S, O) with which `derive` finds the network nearest to the handcrafted one: minus the sum over choices of
    the squared logarithm of (the option's value / the handcrafted one). A value of 0 counts as a half."""
    arch = BACKBONES[space.handcrafted]
    distances = torch.zeros(len(space.stages), len(space.options))
    for s, stage in enumerate(space.stages):
        for o, option in enumerate(space.options):
            for name, value in zip(space.choices, option):
                distances[s, o] += math.log((value or 0.5) / (arch[name][stage] or 0.5)) ** 2
    return -distances


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Makes BN use batch statistics in eval mode too. This is cheaper than `recalibrate` and needs large batches."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean = m.running_var = None
    return module


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable, forward: Callable | None = None) -> nn.Module:
    """Resets BN statistics to the mean over batches. forward is called with each batch; by default it is the module."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    training = module.training
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean over the batches
    module.train()
    for batch in batches:
        (forward or module)(batch)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
    return module.train(training)


# ---- heads ----------------------------------------------------------------------------------------------------------


def _linear(activation: type[nn.Module], in_dim: int, out_dim: int) -> nn.Module:
    """Linear, BN, activation; only Linear if the layer widens."""
    if in_dim < out_dim:
        return nn.Linear(in_dim, out_dim)
    return nn.Sequential(nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), activation())


def _identity(in_dim: int, out_dim: int) -> nn.Sequential:
    """The identity if the layer keeps the number of features, else `linear_relu`."""
    return nn.Sequential() if in_dim == out_dim else nn.Sequential(_linear(nn.ReLU, in_dim, out_dim))


def _pool(pool: type[nn.Module], in_dim: int, out_dim: int) -> nn.Sequential:
    """Pooling along the features, as torch takes (B, F) for B channels of length F. Averages include the padding."""
    return nn.Sequential(*_identity(in_dim, out_dim), pool(3, 1, 1), nn.BatchNorm1d(out_dim))


OPS: dict[str, Callable[[int, int], nn.Module]] = {  # (in_dim, out_dim) -> module; as in the code of 2302.00059
    "maxpool_3x3": partial(_pool, nn.MaxPool1d),
    "avgpool_3x3": partial(_pool, nn.AvgPool1d),
    "identity": _identity,
    "linear_relu": partial(_linear, nn.ReLU),
    "linear_silu": partial(_linear, nn.SiLU),
    "linear_hardswish": partial(_linear, nn.Hardswish),
    "linear_elu": partial(_linear, nn.ELU),
}


def _genotype(**heads: str) -> dict[str, list[str]]:
    """Translates the authors' names of operations to those in OPS."""
    short = {op.removeprefix("linear_").removesuffix("_3x3"): op for op in OPS}
    return {head: [short[op] for op in ops.split()] for head, ops in heads.items()}


PRESETS = {
    "simsiam_cifar10_resnet18": _genotype(
        projector="relu silu elu identity identity relu", predictor="hardswish avgpool avgpool hardswish"
    ),
    "simsiam_cifar10_resnet50": _genotype(
        projector="silu hardswish hardswish hardswish silu silu", predictor="hardswish hardswish avgpool silu"
    ),
    "simsiam_cifar100_resnet50": _genotype(
        projector="identity silu silu elu silu elu", predictor="elu elu elu hardswish"
    ),
    "moco_cifar10_resnet18": _genotype(projector="avgpool avgpool avgpool avgpool"),
    "moco_cifar100_resnet18": _genotype(projector="avgpool avgpool avgpool avgpool"),
    "moco_cifar10_resnet50": _genotype(projector="identity avgpool avgpool avgpool"),
    "simclr_cifar10_resnet50": _genotype(projector="hardswish hardswish avgpool relu relu relu"),
}


def head_dims(layers: int, in_dim: int, hidden: int, out_dim: int) -> list[int]:
    """The layers + 1 numbers of features before, between and after the layers of a head."""
    return [in_dim] + [hidden] * (layers - 1) + [out_dim]


def build_head(spec: Sequence[str], dims: Sequence[int]) -> nn.Sequential:
    """A chain of operations in OPS, the l-th from dims[l] to dims[l + 1] features: (B, dims[0]) -> (B, dims[-1])."""
    if len(dims) != len(spec) + 1:
        raise ValueError(f"a head of {len(spec)} operations needs {len(spec) + 1} dims, not {len(dims)}")
    unknown = [name for name in spec if name not in OPS]
    if unknown:
        raise ValueError(f"unknown operation {unknown[0]!r} in a head: choose from {', '.join(OPS)}")
    return nn.Sequential(*(OPS[name](*layer) for name, layer in zip(spec, pairwise(dims))))


class SearchHead(nn.Module):
    """Each layer is y = sum_k softmax(alpha_l)_k op_k(x) over all of OPS (2302.00059); alpha (L, 7) starts at zero."""

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(len(dims) - 1, len(OPS)))
        self.layers = nn.ModuleList(nn.ModuleList(op(*layer) for op in OPS.values()) for layer in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:  # joining the Linears of a layer in one product was no faster
        for ops, weights in zip(self.layers, self.alpha.softmax(1)):
            x = sum(weight * op(x) for weight, op in zip(weights, ops))
        return x

    def discretise(self) -> list[str]:
        """The operation with the largest alpha in each layer."""
        names = list(OPS)
        return [names[k] for k in self.alpha.argmax(1).tolist()]

    def entropy(self) -> list[float]:
        """Entropy of softmax(alpha) / ln 7 of each layer: 1 if undecided, 0 if one operation has all the weight."""
        p = self.alpha.detach().double().softmax(1)
        return (torch.special.entr(p).sum(1) / math.log(len(OPS))).tolist()


# The number of heads. The seven operations of a layer are not always seven functions. If the layer narrows, `identity`
# is `linear_relu`. If it widens, five of the seven are the same Linear. If it keeps the number of features, `identity`
# does nothing, and only the order of the other operations counts. So SimSiam's space of 6 + 4 layers has 7^10 =
# 282,475,249 names, 103,766,418 choices that differ layer by layer, and 43,333,938 different functions.


def true_name(op: str, in_dim: int, out_dim: int) -> str:
    """The operation's name, or that of the operation that is the same in such a layer."""
    if in_dim > out_dim and op == "identity":
        return "linear_relu"
    if in_dim < out_dim and op not in ("maxpool_3x3", "avgpool_3x3"):
        return "linear"
    return op


def distinct_ops(in_dim: int, out_dim: int) -> list[str]:
    """One name for each different function among the operations in such a layer."""
    return list({true_name(op, in_dim, out_dim): op for op in OPS}.values())


def random_head(layers: int, rng: random.Random) -> list[str]:
    """Operations drawn uniformly from OPS, as by the argmax of random alphas."""
    return [rng.choice(list(OPS)) for _ in range(layers)]


def count_heads(dims: Sequence[int]) -> tuple[int, int, int]:
    """The number of heads by name, by choices that differ within their layer, and as functions."""
    names = differing = functions = 1
    for layer, run in groupby(pairwise(dims)):
        n, m = len(distinct_ops(*layer)), len(list(run))
        names *= len(OPS) ** m
        differing *= n**m
        # m layers that keep the number of features: all sequences of 0 to m operations other than identity
        functions *= sum((n - 1) ** k for k in range(m + 1)) if layer[0] == layer[1] else n**m
    return names, differing, functions
