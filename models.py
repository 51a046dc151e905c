"""Backbones with torchvision's keys, MLP heads, and the searchable forms of both. Imports no other file here.

build_backbone(arch, stem, width)   (module, feature_dim); the module takes images (B, 3, H, W) to features h (B, F)
SearchBackbone(space, width, stem)  the supernet of a space in SPACES, its alphas, and its subnets as slices of it
build_head(spec, dims)              a chain of the operations in OPS, those of NASiam (arXiv 2302.00059)
SearchHead(dims)                    the mixture of all operations in each layer, with its alpha (L, 7)
PRESETS                             the seven genotypes that NASiam's authors published

To add a backbone of known blocks, add an entry to BACKBONES; an operation, to OPS; a space, to SPACES. A new kind of
choice (squeeze-excite, say) needs a field of BlockSpec, an entry in FIELDS, a value in each of BACKBONES, a module in a
block that does nothing where its masked weights are zero, its entries in MASKS, and a term of the block's `macs`. Older
arch.json files lack the new field and are refused. `derive` looks at all options: keep them below about 50 per stage.
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
    """All that a block is built from."""

    stage: int
    c_in: int
    c_out: int
    inner: int
    kernel: int
    stride: int
    index: int = 0  # its place in its stage

    @property
    def reshapes(self) -> bool:
        return self.stride > 1 or self.c_in != self.c_out

    def strided(self, side: int) -> int:
        """The side of the feature map that comes out of one that goes in."""
        return -(-side // self.stride)


# The fields of a stage and their legal values: types (exact, so no bool for an int), minimum, maximum, whether odd.
FIELDS = {
    "depth": ([int], 1, 64, False),
    "inner": ([int, float], 1 / 64, 64, False),  # a share of the planes; of inverted blocks: a multiple of c_in
    "kernel": ([int], 1, 31, True),
}
# An architecture, as it stands in arch.json: the block, and for each of FIELDS a list over the stages.
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
    """An architecture as in BACKBONES; else ValueError, which says what is wrong with that of `source`."""
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
    """A line for a person: depth x inner width, kernel, stage after stage."""
    if isinstance(arch, str):
        return arch
    stages = zip(arch["depth"], arch["inner"], arch["kernel"])
    return " ".join([arch["block"], *(f"{depth}x{inner:g}k{kernel}" for depth, inner, kernel in stages)])


class Plan(NamedTuple):
    channels: int  # of the stem's convolution
    kernel: int
    stride: int
    pool: int  # stride of the max-pool behind it; 1: none
    blocks: list[BlockSpec]
    last: int | None  # channels of MobileNetV2's last 1x1 convolution


def plan(arch: dict, width: float = 1.0, stem: str = "imagenet") -> Plan:
    """The channels and strides that torchvision's networks have, for any depths, inner widths and kernels.

    stem  "imagenet": a convolution of stride 2, in ResNets 7x7 with a max-pool behind it; "small", for up to 64 px: 3x3
    of stride 1 and no pool, and MobileNetV2 keeps the resolution in its second stage too: 32 px end at 4x4.
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
    """Multiply-accumulates of the stem, of every stage, and of the last convolution, if there is one, for one image."""
    channels, kernel, stride, pool, blocks, last = plan(arch, width, stem)
    side = -(-size // stride)  # padded: rounded up
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
    """torchvision's, of any inner width and kernel."""

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
    """torchvision's, of any inner width and kernel; c_out: four times the planes."""

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
    """torchvision's, of any kernel; inner is c_in times the expansion. An expansion of 1 leaves out the first
    convolution, which moves the keys: a space must not have it as an option."""

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
    """A 1x1 convolution without bias, of the pixels alone that its stride leaves: the backward of torch's own, strided,
    corrupts memory on a CPU in channels_last (torch 2.11 and 2.15; 8 channels in, 64 px)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight)


def _shortcut(spec: BlockSpec) -> nn.Module | None:
    if not spec.reshapes:
        return None
    conv = Pointwise(spec.c_in, spec.c_out, 1, spec.stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(spec.c_out))


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck, "inverted": InvertedResidual}
# What a choice masks in a block of the supernet. Inner channels are masked where the next convolution takes them in,
# that is after BN and activation: before BN, which undoes any scale, their gates would have no gradients.
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
    """torchvision's ResNet (1512.03385) without its classifier; images (B, 3, H, W) -> h (B, F).

    The last BN of each residual branch starts at zero, as SimSiam's authors do.
    """

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
    def prefixes(arch: dict) -> list[list[str]]:  # of the keys of each stage's blocks
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
    """torchvision's MobileNetV2 (1801.04381) without its classifier; images (B, 3, H, W) -> h (B, F)."""

    def __init__(self, arch: dict, width: float = 1.0, stem: str = "imagenet", make_block: Callable = new_block):
        super().__init__()
        channels, kernel, stride, _, blocks, self.feature_dim = plan(arch, width, stem)
        self.features = nn.Sequential(
            Conv2dNormActivation(3, channels, kernel, stride, activation_layer=nn.ReLU6),
            *(make_block("inverted", spec) for spec in blocks),
            Conv2dNormActivation(blocks[-1].c_out, self.feature_dim, 1, activation_layer=nn.ReLU6),
        )
        self.ends = set(accumulate(arch["depth"]))  # where in `features` a stage ends
        self.features[0].apply(_kaiming)
        self.features[-1].apply(_kaiming)

    @staticmethod
    def prefixes(arch: dict) -> list[list[str]]:  # here the last convolution is one stage more
        numbers = count(1)  # features.0 is the stem
        return [[f"features.{next(numbers)}" for _ in range(depth)] for depth in (*arch["depth"], 1)]

    def stages(self, x: Tensor) -> list[Tensor]:
        """The feature maps (B, C, h, w) of the seven stages, the last one behind the last 1x1 convolution."""
        maps = []
        for n, module in enumerate(self.features):
            x = module(x)
            if n in self.ends:
                maps.append(x)
        return [*maps[:-1], x]

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1].mean((2, 3))  # (B, F, h, w) -> (B, F)


class ViT(nn.Module):
    """torchvision's VisionTransformer (2010.11929) without its classifier; images (B, 3, H, W) -> h (B, dim), the class
    token after the last norm.

    stem  "imagenet": patches of 16 px on a grid of 14 x 14; "small": of 4 px on one of 8 x 8. Images of other sizes
    have the position embeddings interpolated, bicubically as in DINO. drop_path: the share of images that skip a
    branch, rising linearly over the blocks (1603.09382), in training.
    """

    def __init__(self, dim: int, heads: int, layers: int = 12, stem: str = "imagenet", drop_path: float = 0.0):
        super().__init__()
        self.patch, grid = {"imagenet": (16, 14), "small": (4, 8)}[stem]
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.conv_proj = nn.Conv2d(3, dim, self.patch, self.patch)
        self.encoder = vision_transformer.Encoder(grid**2 + 1, layers, heads, dim, 4 * dim, 0.0, 0.0, norm)
        for block, p in zip(self.encoder.layers, np.linspace(0, drop_path, layers).tolist()):
            if p:  # after the attention and after the MLP, where torchvision has dropout, which has no keys either
                block.dropout = block.mlp[-1] = StochasticDepth(p, "row")
        self.feature_dim = dim
        fan_in = 3 * self.patch**2
        nn.init.trunc_normal_(self.conv_proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.conv_proj.bias)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + patches, dim), with position embeddings of that size."""
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
        """The class tokens after each of the last n blocks, normed, side by side: (B, n dim), as DINO's linear
        evaluation takes them (2104.14294)."""
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
    """(MACs of an image of that size, parameters); of a ViT no MACs. Raises ValueError where it cannot be built."""
    with torch.device("meta"):
        network, _ = build_backbone(arch, stem, width)
    spec = BACKBONES.get(arch) if isinstance(arch, str) else arch
    return spec and macs(spec, width, stem, size), sum(p.numel() for p in network.parameters())


def build_backbone(
    arch: str | dict, stem: str = "imagenet", width: float = 1.0, drop_path: float = 0.0
) -> tuple[nn.Module, int]:
    """(module, feature_dim) of a name in ARCHS or of an architecture as in BACKBONES; width: a factor of all channels.

    Raises ValueError for any other architecture, one of too many parameters, or a drop_path that has no meaning.
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
    if not named or width > 8:  # anyone's numbers: how large would it be?
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
    """Architectures with every choice made anew in each of some stages; the rest is as in a handcrafted one."""

    handcrafted: str
    stages: tuple[int, ...]
    choices: dict[str, tuple] = field(hash=False)  # values for some of FIELDS, the largest last

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
        """The choice that makes up an architecture; None where it is no point of the space."""
        arch = BACKBONES[arch] if isinstance(arch, str) else arch
        try:
            choice = [self.options.index(tuple(arch[name][stage] for name in self.choices)) for stage in self.stages]
        except (ValueError, IndexError):  # no such option, or fewer stages
            return None
        return choice if self.arch(choice) == arch else None

    def costs(self, width: float, stem: str, size: int) -> tuple[int, Tensor]:
        """(base, table (S, O)): MACs of the smallest network, and what each option adds to it, which is independent of
        the other stages since widths between stages are fixed: a network's MACs are base + the sum of its choices'."""
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
BAND = 0.95, 1.0  # a network meets its target with MACs in this band of it


class Choices(nn.Module):
    """An alpha (S, options) for each choice of a space, and the gates sampled last: one-hot, of the same shapes.

    A copy is the same object: a momentum teacher has the student's alphas and takes its gates.
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
        """Gates from a Gumbel softmax of temperature tau (1611.01144), hard, with straight-through gradients where
        alphas have any. The noise comes from the host, in one copy, so that ranks and devices sample the same."""
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
        """Gates of one option a stage; copies nothing to a GPU."""
        self.gates = {name: torch.zeros_like(alpha) for name, alpha in self.alphas().items()}
        values = np.unravel_index(choice, [gate.shape[1] for gate in self.gates.values()])
        for gate, value_of_stage in zip(self.gates.values(), values):
            for row, value in enumerate(value_of_stage.tolist()):
                gate[row, value].fill_(1.0)  # an assignment would copy the 1 from the host
        self.known_choice = list(choice)

    def choice(self) -> list[int]:
        """The options that the gates hold now, as Space.arch takes them; of sampled ones it waits for the device."""
        if self.known_choice is None:
            option = 0
            for gate in self.gates.values():
                option = option * gate.shape[1] + gate.argmax(1)
            self.known_choice = option.tolist()
        return self.known_choice

    def log_probabilities(self) -> Tensor:
        """(S, O): of every option, the sum over its choices, which are independent."""
        total, *others = (alpha.log_softmax(1) for alpha in self.alphas().values())
        for other in others:
            total = (total[:, :, None] + other[:, None, :]).flatten(1)
        return total

    def expected_macs(self, base: int, table: Tensor) -> Tensor:
        """E[MACs] under the alphas, in closed form and differentiable; (base, table) as Space.costs gives them."""
        return base + (self.log_probabilities().exp() * table).sum()


class SearchBackbone(nn.Module):
    """The supernet: the largest network of a space, of which every choice masks part (2203.08130; the design is ours).

    A kernel is the centre of the largest, inner channels are the first ones, and a block that depth leaves out has its
    last BN at zero. So the masked network costs what the largest costs, every option gets a gradient, and what is left
    out changes nothing: a subnet, sliced out of the weights, gives the same numbers but for the order of sums.

    Gates with gradients run the masked network, whose shapes never change, as a compiler wants it. Gates without run
    the subnet, at its own cost; weights outside it have no gradient, so that no optimiser moves them.
    """

    def __init__(self, space: Space, width: float = 1.0, stem: str = "imagenet"):
        super().__init__()
        self.space, self.width, self.stem = space, width, stem
        self.choices = Choices(space)
        arch = space.arch(self.choices.largest)
        self.supernet, self.feature_dim = build_backbone(arch, stem, width)
        shapes = {choice: [self._shapes(choice, value) for value in values] for choice, values in space.choices.items()}
        rows = {prefix: row for row, s in enumerate(space.stages) for prefix in self.supernet.prefixes(arch)[s]}
        self.masked = []  # what the n-th buffer of masks is for: (row of the gates, choice, parameter, shape)
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
        """The supernet's parameters under the gates, by name: those that a choice touches."""
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
        """Views of the supernet's parameters and buffers that make up a subnet, by its names."""
        _, parts = self.skeleton(choice)
        supernet = self.supernet.state_dict(keep_vars=True)
        return {name: _slice(supernet[source], shape) for name, (source, shape) in parts.items()}

    def subnet(self, choice: Sequence[int]) -> nn.Module:
        """A network with a copy of its part of the weights; its BN statistics want `recalibrate`."""
        network, _ = build_backbone(self.space.arch(choice), self.stem, self.width)
        network.to(next(self.supernet.parameters()))  # device and precision
        network.load_state_dict(self.slices(choice))
        return network


def _slice(large: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of a supernet's tensor that a subnet has: of channels the first ones, of a kernel the centre."""
    for dim, n in enumerate(shape):
        if n < large.shape[dim]:
            start = (large.shape[dim] - n) // 2 if dim > 1 else 0
            large = large.narrow(dim, start, n)
    return large


def _masks(small: list[Sequence[int] | None], large: Sequence[int]) -> Tensor:
    """(..., options): ones where the slice of shape small[option] lies, zeros elsewhere; None: nothing of it is used.
    Of size 1 along dimensions where all options have all, and along what the parameter puts out: see MASKS."""
    least = [min(sizes) for sizes in zip(*filter(None, small))]
    size = [n if dim > 0 and n > least[dim] else 1 for dim, n in enumerate(large)]
    masks = torch.zeros(*size, len(small))
    for option, shape in enumerate(small):
        if shape is not None:
            _slice(masks[..., option], [min(n, most) for n, most in zip(shape, size)]).fill_(1)
    return masks


# A search visits a new subnet nearly every step, so blocks, which take long to make, are kept for the next. A block's
# spec says which block of its stage it is, so no network holds one twice.
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
    """The choice with the highest total score (S, O) among all whose MACs, or other cost, lie in BAND of the target, by
    enumeration. Raises ValueError where there is none, with costs as `text` has them.

    With scores = log probabilities the likeliest network that meets the target; each stage's own argmax would miss it.
    """
    scores = scores.detach().double().cpu()
    stages, options = table.shape
    # all combinations of all stages but the first: with that one too they would take O times the memory
    rest_score, rest_cost = (_sums(of_options[1:]) for of_options in (scores, table))
    found = []  # the best of those with each first option
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
    """Of all combinations of an entry from each row of (S, O): (O^S,)."""
    total = torch.zeros(1, dtype=torch.float64)
    for row in table:
        total = (total[:, None] + row).flatten()
    return total


def random_choice(
    base: int, table: Tensor, target: float, generator: torch.Generator, band: tuple[float, float] = BAND
) -> list[int]:
    """A choice drawn evenly from those whose MACs lie in a band, no narrower than BAND, of the target."""
    stages, options = table.shape
    while True:
        choices = torch.randint(options, (4096, stages), generator=generator)
        cost = base + table[torch.arange(stages), choices].sum(1)
        good = choices[(cost >= band[0] * target) & (cost <= band[1] * target)]
        if len(good):
            return good[0].tolist()
        derive(table, base, table, target)  # raises


def handcrafted_scores(space: Space) -> Tensor:
    """(S, O), with which `derive` finds the network nearest to the handcrafted one: minus the sum, over the choices, of
    the squared logarithm of how many times the handcrafted's value an option has."""
    arch = BACKBONES[space.handcrafted]
    distances = torch.zeros(len(space.stages), len(space.options))
    for s, stage in enumerate(space.stages):
        for o, option in enumerate(space.options):
            distances[s, o] = sum(math.log(v / arch[name][stage]) ** 2 for name, v in zip(space.choices, option))
    return -distances


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """BN by the statistics of the batch at hand in eval mode too, as if none had ever been gathered: cheaper than to
    recalibrate, for a look at a subnet in large batches."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean = m.running_var = None
    return module


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable, forward: Callable | None = None) -> nn.Module:
    """BN statistics anew: the mean over batches, in place of those that other networks have left. forward: what takes
    a batch, by default the module itself."""
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
    """Linear, BN, activation; where the layer widens, a bare Linear."""
    if in_dim < out_dim:
        return nn.Linear(in_dim, out_dim)
    return nn.Sequential(nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), activation())


def _identity(in_dim: int, out_dim: int) -> nn.Sequential:
    """Nothing, where the layer keeps the number of features."""
    return nn.Sequential() if in_dim == out_dim else nn.Sequential(_linear(nn.ReLU, in_dim, out_dim))


def _pool(pool: type[nn.Module], in_dim: int, out_dim: int) -> nn.Sequential:
    """Pooling along the features, the average with the padding: torch takes (B, F) for B channels of length F."""
    return nn.Sequential(*_identity(in_dim, out_dim), pool(3, 1, 1), nn.BatchNorm1d(out_dim))


OPS: dict[str, Callable[[int, int], nn.Module]] = {  # (in_dim, out_dim) -> module; 2302.00059, as its code has them
    "maxpool_3x3": partial(_pool, nn.MaxPool1d),
    "avgpool_3x3": partial(_pool, nn.AvgPool1d),
    "identity": _identity,
    "linear_relu": partial(_linear, nn.ReLU),
    "linear_silu": partial(_linear, nn.SiLU),
    "linear_hardswish": partial(_linear, nn.Hardswish),
    "linear_elu": partial(_linear, nn.ELU),
}


def _genotype(**heads: str) -> dict[str, list[str]]:
    """Names of OPS from the authors' shorter ones."""
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
    """Numbers of features before, between and after the layers of a head: layers + 1 of them."""
    return [in_dim] + [hidden] * (layers - 1) + [out_dim]


def build_head(spec: Sequence[str], dims: Sequence[int]) -> nn.Sequential:
    """A chain of operations of OPS, the l-th from dims[l] to dims[l + 1] features: (B, dims[0]) -> (B, dims[-1])."""
    if len(dims) != len(spec) + 1:
        raise ValueError(f"a head of {len(spec)} operations needs {len(spec) + 1} dims, not {len(dims)}")
    unknown = [name for name in spec if name not in OPS]
    if unknown:
        raise ValueError(f"unknown operation {unknown[0]!r} in a head: choose from {', '.join(OPS)}")
    return nn.Sequential(*(OPS[name](*layer) for name, layer in zip(spec, pairwise(dims))))


class SearchHead(nn.Module):
    """Every layer is y = sum_k softmax(alpha_l)_k op_k(x) over all of OPS (2302.00059); alpha (L, 7) starts at zero."""

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(len(dims) - 1, len(OPS)))
        self.layers = nn.ModuleList(nn.ModuleList(op(*layer) for op in OPS.values()) for layer in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:  # to join the Linears of a layer in one product was no faster
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


# How many heads there are. A layer has seven names, but not always seven functions. Where it narrows, `identity` is
# `linear_relu`. Where it widens, five of the seven are the same bare Linear. Where it keeps the number of features,
# `identity` is nothing, and only the order of the other operations counts. So SimSiam's space of 6 + 4 layers has
# 7^10 = 282,475,249 names, 103,766,418 choices that differ layer by layer, and 43,333,938 different functions.


def true_name(op: str, in_dim: int, out_dim: int) -> str:
    """What an operation comes to in such a layer: its name, or that of the one that it coincides with there."""
    if in_dim > out_dim and op == "identity":
        return "linear_relu"
    if in_dim < out_dim and op not in ("maxpool_3x3", "avgpool_3x3"):
        return "linear"
    return op


def distinct_ops(in_dim: int, out_dim: int) -> list[str]:
    """The operations that differ as functions in such a layer, one name for each."""
    return list({true_name(op, in_dim, out_dim): op for op in OPS}.values())


def random_head(layers: int, rng: random.Random) -> list[str]:
    """Each layer drawn evenly from the names in OPS: what the argmax of random alphas would be."""
    return [rng.choice(list(OPS)) for _ in range(layers)]


def count_heads(dims: Sequence[int]) -> tuple[int, int, int]:
    """How many heads there are: by name, by choices that differ within their layer, and as functions."""
    names = differing = functions = 1
    for layer, run in groupby(pairwise(dims)):
        n, m = len(distinct_ops(*layer)), len(list(run))
        names *= len(OPS) ** m
        differing *= n**m
        # m layers that keep the number of features: all sequences of 0 to m operations other than identity
        functions *= sum((n - 1) ** k for k in range(m + 1)) if layer[0] == layer[1] else n**m
    return names, differing, functions
