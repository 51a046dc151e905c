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

import copy
import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import chain, pairwise, product
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import mobilenetv2, resnet, vision_transformer
from torchvision.ops import Conv2dNormActivation, StochasticDepth

# ---- backbones ------------------------------------------------------------------------------------------------------


class BasicBlock(resnet.BasicBlock):
    """torchvision's, of any inner width and kernel."""

    MASKS: ClassVar = {
        "conv1.weight": "kernel",
        "conv2.weight": "kernel inner",
        "bn2.weight": "depth",
        "bn2.bias": "depth",
    }

    def __init__(self, i: int, o: int, inner: int, kernel: int, stride: int):
        super().__init__(i, o, stride, _shortcut(i, o, stride))
        self.conv1, self.bn1 = _conv(i, inner, kernel, stride), nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, o, kernel)
        nn.init.zeros_(self.bn2.weight)

    @staticmethod
    def macs(i: int, o: int, inner: int, kernel: int, stride: int, side: int) -> int:
        out = -(-side // stride)
        return out**2 * (kernel**2 * inner * (i + o) + i * o * (stride > 1 or i != o))


class Bottleneck(resnet.Bottleneck):
    """torchvision's, of any inner width and kernel; o is four times the planes."""

    MASKS: ClassVar = {
        "conv2.weight": "kernel inner",
        "conv3.weight": "inner",
        "bn3.weight": "depth",
        "bn3.bias": "depth",
    }

    def __init__(self, i: int, o: int, inner: int, kernel: int, stride: int):
        super().__init__(i, o // self.expansion, stride, _shortcut(i, o, stride))
        self.conv1, self.bn1 = _conv(i, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, kernel, stride), nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, o, 1)
        nn.init.zeros_(self.bn3.weight)

    @staticmethod
    def macs(i: int, o: int, inner: int, kernel: int, stride: int, side: int) -> int:
        out = -(-side // stride)
        shortcut = i * o * (stride > 1 or i != o)
        return side**2 * i * inner + out**2 * (kernel**2 * inner**2 + inner * o + shortcut)


class InvertedResidual(mobilenetv2.InvertedResidual):
    """torchvision's, of any kernel; inner is i times the expansion."""

    MASKS: ClassVar = {
        "conv.1.0.weight": "kernel",
        "conv.2.weight": "inner",
        "conv.3.weight": "depth",
        "conv.3.bias": "depth",
    }

    def __init__(self, i: int, o: int, inner: int, kernel: int, stride: int):
        super().__init__(i, o, stride, inner / i)
        self.conv[-3] = Conv2dNormActivation(inner, inner, kernel, stride, groups=inner, activation_layer=nn.ReLU6)

    @staticmethod
    def macs(i: int, o: int, inner: int, kernel: int, stride: int, side: int) -> int:
        out = -(-side // stride)
        return side**2 * i * inner * (inner != i) + out**2 * inner * (kernel**2 + o)


def _conv(i: int, o: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution without bias, of the pixels alone that its stride leaves: the backward of torch's own, strided,
    corrupts memory on a CPU in channels_last (torch 2.11 and 2.15; 8 channels in, 64 px)."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight)


def _shortcut(i: int, o: int, stride: int) -> nn.Module | None:
    return nn.Sequential(Pointwise(i, o, stride), nn.BatchNorm2d(o)) if stride > 1 or i != o else None


def _kaiming(network: nn.Module) -> None:
    for m in network.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck, "inverted": InvertedResidual}


def _handcrafted(block: str, depth: Sequence[int], inner: Sequence[float]) -> dict:
    return {"block": block, "depth": list(depth), "inner": list(inner), "kernel": [3] * len(depth)}


# An architecture, as it stands in arch.json: the block, and for every stage its depth, the inner width of its blocks
# (a share of the planes; in inverted blocks a multiple of the input's channels) and their kernel.
BACKBONES: dict[str, dict] = {
    "resnet18": _handcrafted("basic", (2, 2, 2, 2), (1.0,) * 4),
    "resnet34": _handcrafted("basic", (3, 4, 6, 3), (1.0,) * 4),
    "resnet50": _handcrafted("bottleneck", (3, 4, 6, 3), (1.0,) * 4),
    "mobilenet_v2": _handcrafted("inverted", (1, 2, 3, 4, 3, 3, 1), (1.0, *(6.0,) * 6)),
}
STEMS = {"imagenet": (7, 2, 2), "small": (3, 1, 1)}  # of ResNets: kernel, stride, stride of the pool


class Place(NamedTuple):
    """A block of a network: its stage, channels in, out and inside, kernel and stride."""

    stage: int
    i: int
    o: int
    inner: int
    kernel: int
    stride: int


class Plan(NamedTuple):
    """What a network is built of: the stem's channels, kernel, stride and pool, its blocks, the last convolution's."""

    stem: tuple[int, int, int, int]
    blocks: list[Place]
    last: int | None  # channels of MobileNetV2's last 1x1 convolution


def plan(arch: dict, width: float = 1.0, stem: str = "imagenet") -> Plan:
    """The channels and strides that torchvision's networks have, for any depths, inner widths and kernels.

    stem  "imagenet": a convolution of stride 2, in ResNets 7x7 with a max-pool behind it; "small", for up to 64 px: 3x3
    of stride 1 and no pool, and MobileNetV2 keeps the resolution in its second stage too: 32 px end at 4x4.
    """
    if arch["block"] == "inverted":
        divisible = mobilenetv2._make_divisible
        channels, last = divisible(32 * width, 8), divisible(1280 * max(1.0, width), 8)
        outs = [divisible(c * width, 8) for c in (16, 24, 32, 64, 96, 160, 320)]
        strides = [1, 1 if stem == "small" else 2, 2, 2, 1, 2, 1]
        head = (channels, 3, STEMS[stem][1], 1)
    else:
        channels, last = round(64 * width), None
        outs = [channels * 2**stage * BLOCKS[arch["block"]].expansion for stage in range(4)]
        strides = [1, 2, 2, 2]
        head = (channels, *STEMS[stem])
    blocks = []
    for stage, (depth, inner, kernel) in enumerate(zip(arch["depth"], arch["inner"], arch["kernel"], strict=True)):
        for j in range(depth):
            base = channels if last else outs[stage] // BLOCKS[arch["block"]].expansion
            stride = strides[stage] if j == 0 else 1
            blocks.append(Place(stage, channels, outs[stage], max(1, round(base * inner)), kernel, stride))
            channels = outs[stage]
    return Plan(head, blocks, last)


def stage_macs(arch: dict, width: float = 1.0, stem: str = "imagenet", size: int = 224) -> list[int]:
    """Multiply-accumulates of the convolutions for one image of size x size pixels, in closed form: of the stem, of
    every stage, and of the last convolution, if there is one."""
    (channels, kernel, stride, pool), blocks, last = plan(arch, width, stem)
    side = -(-size // stride)
    parts, side = [side**2 * kernel**2 * 3 * channels] + [0] * len(arch["depth"]), -(-side // pool)
    for stage, *shape, stride in blocks:
        parts[1 + stage] += BLOCKS[arch["block"]].macs(*shape, stride, side)
        side = -(-side // stride)
    return parts + ([side**2 * blocks[-1].o * last] if last else [])


def macs(arch: dict, width: float = 1.0, stem: str = "imagenet", size: int = 224) -> int:
    """Multiply-accumulates of the whole network, see `stage_macs`."""
    return sum(stage_macs(arch, width, stem, size))


def new_block(block: str, place: Place, n: int) -> nn.Module:
    """The n-th block of a network, initialised."""
    module = BLOCKS[block](*place[1:])
    _kaiming(module)
    return module


class ResNet(nn.Module):
    """torchvision's ResNet (1512.03385) without its classifier; images (B, 3, H, W) -> h (B, F).

    The last BN of each residual branch starts at zero, as SimSiam's authors do.
    """

    def __init__(self, arch: dict, width: float = 1.0, stem: str = "imagenet", make: Callable = new_block):
        super().__init__()
        (channels, kernel, stride, pool), blocks, _ = plan(arch, width, stem)
        self.conv1, self.bn1 = _conv(3, channels, kernel, stride), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool > 1 else nn.Identity()
        for stage in range(4):
            layer = (make(arch["block"], place, n) for n, place in enumerate(blocks) if place.stage == stage)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.feature_dim = blocks[-1].o
        self.places = [[f"layer{s + 1}.{j}" for j in range(d)] for s, d in enumerate(arch["depth"])]
        _kaiming(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))  # (B, F, h, w) -> (B, F)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 (1801.04381) without its classifier; images (B, 3, H, W) -> h (B, F)."""

    def __init__(self, arch: dict, width: float = 1.0, stem: str = "imagenet", make: Callable = new_block):
        super().__init__()
        (channels, kernel, stride, _), blocks, self.feature_dim = plan(arch, width, stem)
        self.features = nn.Sequential(
            Conv2dNormActivation(3, channels, kernel, stride, activation_layer=nn.ReLU6),
            *(make("inverted", place, n) for n, place in enumerate(blocks)),
            Conv2dNormActivation(blocks[-1].o, self.feature_dim, 1, activation_layer=nn.ReLU6),
        )
        names = (f"features.{n}" for n in range(1, len(blocks) + 2))
        self.places = [[next(names) for _ in range(d)] for d in (*arch["depth"], 1)]  # the last convolution is one more
        _kaiming(self.features[0]), _kaiming(self.features[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


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
        for block, p in zip(self.encoder.layers, torch.linspace(0, drop_path, layers).tolist()):
            if p:  # after the attention and after the MLP; neither dropout nor its place has a key
                block.dropout = block.mlp[-1] = StochasticDepth(p, "row")
        self.feature_dim = dim
        fan_in = 3 * self.patch**2
        nn.init.trunc_normal_(self.conv_proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.conv_proj.bias)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + patches, dim), with position embeddings of that size."""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(
                f"views of {x.shape[2]} x {x.shape[3]} px: a ViT needs multiples of its patch, {self.patch}"
            )
        x = self.conv_proj(x)
        rows, columns = x.shape[2:]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        cls, position = self.encoder.pos_embedding.split([1, self.encoder.pos_embedding.shape[1] - 1], 1)
        grid = math.isqrt(position.shape[1])
        if (rows, columns) != (grid, grid):
            position = position.transpose(1, 2).unflatten(2, (grid, grid))
            position = F.interpolate(position, (rows, columns), mode="bicubic").flatten(2).transpose(1, 2)
        return x + torch.cat([cls, position], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.ln(self.encoder.layers(self.tokens(x)))[:, 0]

    def last_blocks(self, x: Tensor, n: int) -> Tensor:
        """The class tokens after each of the last n blocks, normed, side by side: (B, n dim), as DINO's linear
        evaluation takes them (2104.14294)."""
        x, out = self.tokens(x), []
        for k, block in enumerate(self.encoder.layers):
            x = block(x)
            if k >= len(self.encoder.layers) - n:
                out.append(self.encoder.ln(x)[:, 0])
        return torch.cat(out, 1)


VITS = {"vit_tiny": {"dim": 192, "heads": 3}}
NETWORKS = {"basic": ResNet, "bottleneck": ResNet, "inverted": MobileNetV2}
ARCHS = (*BACKBONES, *VITS)
MOST_PARAMETERS = 2_000_000_000


def check_arch(arch: object, source: str = "arch") -> dict:
    """An architecture as in BACKBONES; else ValueError, which says what is wrong with that of `source`."""
    if not isinstance(arch, dict) or set(arch) != {"block", "depth", "inner", "kernel"}:
        raise ValueError(f'{source}: an architecture has "block", "depth", "inner" and "kernel", and nothing else')
    if not isinstance(arch["block"], str) or arch["block"] not in BLOCKS:
        raise ValueError(f"{source}: unknown block {arch['block']!r}: choose from {', '.join(BLOCKS)}")
    stages = 7 if arch["block"] == "inverted" else 4
    for key, kind, low, high in ("depth", int, 1, 64), ("inner", (int, float), 1 / 64, 64), ("kernel", int, 1, 31):
        values = arch[key] if isinstance(arch[key], list) else [None]
        ok = len(values) == stages and all(type(v) is not bool and isinstance(v, kind) for v in values)
        if not ok or not all(low <= v <= high and (key != "kernel" or v % 2) for v in values):
            odd = "odd numbers" if key == "kernel" else "numbers"
            raise ValueError(f'{source}: "{key}" must be a list of {stages} {odd}, {low:g} to {high:g}')
    return arch


def describe(arch: str | dict) -> str:
    """A line for a person: depth x inner width, kernel, stage after stage."""
    if isinstance(arch, str):
        return arch
    stages = zip(arch["depth"], arch["inner"], arch["kernel"])
    return f"{arch['block']} " + " ".join(f"{d}x{r:g}k{k}" for d, r, k in stages)


def build_backbone(
    arch: str | dict, stem: str = "imagenet", width: float = 1.0, drop_path: float = 0.0
) -> tuple[nn.Module, int]:
    """(module, feature_dim) of a name in ARCHS or of an architecture as in BACKBONES. Raises ValueError for others."""
    if isinstance(arch, str) and arch not in ARCHS:
        raise ValueError(f"unknown --arch '{arch}': choose from {', '.join(ARCHS)}")
    if isinstance(arch, str) and arch in VITS:
        dim, heads = max(1, round(VITS[arch]["dim"] * width / VITS[arch]["heads"])), VITS[arch]["heads"]
        return ViT(dim * heads, heads, stem=stem, drop_path=drop_path), dim * heads
    if drop_path:
        raise ValueError(f"--drop-path {drop_path:g} means nothing to {describe(arch)}: it is for a ViT")
    if not isinstance(arch, str) or width > 8:  # anyone's numbers: how large would it be?
        spec = BACKBONES[arch] if isinstance(arch, str) else check_arch(arch)
        with torch.device("meta"):
            size = sum(p.numel() for p in NETWORKS[spec["block"]](spec, width, stem).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{describe(arch)} x{width:g} has {size:,} parameters, more than {MOST_PARAMETERS:,}")
    arch = BACKBONES[arch] if isinstance(arch, str) else arch
    module = NETWORKS[arch["block"]](arch, width, stem)
    return module, module.feature_dim


# ---- searchable backbones -------------------------------------------------------------------------------------------


class Space(NamedTuple):
    """Architectures with every choice made anew in each of some stages; the other stages are the handcrafted one's."""

    handcrafted: str
    stages: tuple[int, ...]
    depth: tuple[int, ...]
    inner: tuple[float, ...]
    kernel: tuple[int, ...]

    @property
    def options(self) -> list[tuple[int, float, int]]:
        """All (depth, inner, kernel) of a stage, the largest last: O of them."""
        return list(product(self.depth, self.inner, self.kernel))

    def arch(self, choice: Sequence[int]) -> dict:
        """The architecture with the choice[s]-th option in the s-th searched stage."""
        arch = copy.deepcopy(BACKBONES[self.handcrafted])
        for stage, o in zip(self.stages, choice, strict=True):
            arch["depth"][stage], arch["inner"][stage], arch["kernel"][stage] = self.options[o]
        return arch

    def choice(self, arch: str | dict) -> list[int] | None:
        """The choice that makes up an architecture; None where it is no point of the space."""
        arch = BACKBONES[arch] if isinstance(arch, str) else arch
        try:
            choice = [self.options.index((arch["depth"][s], arch["inner"][s], arch["kernel"][s])) for s in self.stages]
        except (ValueError, IndexError):
            return None
        return choice if self.arch(choice) == arch else None

    def costs(self, width: float, stem: str, size: int) -> tuple[int, Tensor]:
        """(base, (S, O)): MACs of the smallest network, and what each option adds to it, which is independent of the
        other stages since widths between stages are fixed: a network's MACs are base + the sum of its choices'."""
        smallest = [0] * len(self.stages)
        base = macs(self.arch(smallest), width, stem, size)
        table = torch.zeros(len(self.stages), len(self.options), dtype=torch.float64)
        for s, o in product(range(len(self.stages)), range(len(self.options))):
            choice = [o if stage == s else 0 for stage in range(len(self.stages))]
            table[s, o] = macs(self.arch(choice), width, stem, size) - base
        return base, table


# ResNet18 and MobileNetV2 are points of their spaces; ResNet50, with its stage of 6 blocks, is not.
SPACES: dict[str, Space] = {
    "resnet": Space("resnet18", (0, 1, 2, 3), (1, 2, 3, 4), (0.25, 0.5, 0.75, 1.0), (3, 5)),
    "bottleneck": Space("resnet50", (0, 1, 2, 3), (1, 2, 3, 4), (0.25, 0.5, 0.75, 1.0), (3, 5)),
    "mobilenet": Space("mobilenet_v2", (1, 2, 3, 4, 5), (1, 2, 3, 4), (2.0, 4.0, 6.0), (3, 5, 7)),
}
BAND = 0.95, 1.0  # a network meets its target with MACs in this band of it


class Choices(nn.Module):
    """Alphas (S, options) of depth, inner width and kernel, and the gates sampled last: one-hot, of the same shapes.

    A copy is the thing itself: a momentum twin has the student's alphas and takes its gates.
    """

    def __init__(self, space: Space):
        super().__init__()
        self.space = space
        self.depth_alpha, self.inner_alpha, self.kernel_alpha = (
            nn.Parameter(torch.zeros(len(space.stages), len(options))) for options in space[2:]
        )
        self.set_largest()

    def __deepcopy__(self, memo):
        return self

    @property
    def largest(self) -> list[int]:
        return [len(self.space.options) - 1] * len(self.space.stages)

    def alphas(self) -> list[nn.Parameter]:
        return [self.depth_alpha, self.inner_alpha, self.kernel_alpha]

    def sample(self, tau: float, rng: np.random.Generator) -> None:
        """Gates from a Gumbel softmax of temperature tau, hard, with straight-through gradients where alphas have any.

        The noise comes from the host, in one copy, so that ranks and devices sample the same.
        """
        alphas = self.alphas()
        noise = rng.gumbel(size=(len(alphas[0]), sum(a.shape[1] for a in alphas)))
        noise, device = torch.from_numpy(noise).to(alphas[0].dtype), alphas[0].device
        noise = noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)
        self.gates, self.known = [], None
        for alpha, own in zip(alphas, noise.split([a.shape[1] for a in alphas], 1)):
            soft = ((alpha + own) / tau).softmax(1)
            hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype)
            self.gates.append(hard + (soft - soft.detach()) if alpha.requires_grad else hard)

    def set(self, choice: Sequence[int]) -> None:
        """Gates of one option a stage."""
        options = torch.unravel_index(torch.tensor(choice), [a.shape[1] for a in self.alphas()])
        self.gates = [F.one_hot(o, a.shape[1]).to(a) for o, a in zip(options, self.alphas())]
        self.known = list(choice)

    def set_largest(self) -> None:
        """Gates of the largest network; unlike `set` it copies nothing to a GPU."""
        last = [torch.arange(a.shape[1], device=a.device) == a.shape[1] - 1 for a in self.alphas()]
        self.gates = [one.to(a).expand_as(a) for one, a in zip(last, self.alphas())]
        self.known = self.largest

    def choice(self) -> list[int]:
        """The options that the gates hold now, as Space.arch takes them; of sampled ones it waits for the device."""
        if self.known is None:
            d, r, k = (gate.argmax(1) for gate in self.gates)
            self.known = ((d * self.inner_alpha.shape[1] + r) * self.kernel_alpha.shape[1] + k).tolist()
        return self.known

    def log_probabilities(self) -> Tensor:
        """(S, O): of every option, the sum over its depth, inner width and kernel, which are independent."""
        d, r, k = (alpha.log_softmax(1) for alpha in self.alphas())
        return (d[:, :, None, None] + r[:, None, :, None] + k[:, None, None, :]).flatten(1)

    def expected_macs(self, base: int, table: Tensor) -> Tensor:
        """E[MACs] under the alphas, in closed form and differentiable; (base, table) from Space.costs, on the alphas'
        device."""
        p = self.log_probabilities().exp()
        return base + (p * table).sum()


class SearchBackbone(nn.Module):
    """The largest network of a space, used in part: every choice is a mask on its weights (2203.08130; design ours).

    A kernel is the centre of the largest; inner channels are the first ones, masked where the next convolution takes
    them in, that is after BN and activation; a block that depth leaves out has its last BN at zero. So the masked
    network costs what the largest costs, every option gets a gradient, and what is left out changes nothing: the
    network cut out of the weights gives the same numbers but for the order of sums. Gates with gradients run the
    masked network, whose shapes never change, as a compiler wants it; gates without run the cut, at its own cost, and
    blocks that it leaves out have no gradient, so that no optimiser moves them.
    """

    def __init__(self, space: Space, width: float = 1.0, stem: str = "imagenet"):
        super().__init__()
        self.space, self.width, self.stem = space, width, stem
        self.choices = Choices(space)
        arch = space.arch(self.choices.largest)
        self.largest, self.feature_dim = build_backbone(arch, stem, width)
        kernel = max(space.kernel)
        away = (torch.arange(kernel) - kernel // 2).abs()
        away = torch.maximum(away[:, None], away)
        self._constant("kernel_masks", away <= torch.tensor(space.kernel)[:, None, None] // 2)  # (options, k, k)
        inner = {o: plan(arch | {"inner": self._inner(o)}, width, stem).blocks for o in space.inner}
        for n, (prefix, place) in enumerate(zip(chain(*self.largest.places), inner[space.inner[-1]])):
            if place.stage in space.stages:
                counts = torch.tensor([blocks[n].inner for blocks in inner.values()])
                mask = torch.arange(place.inner) < counts[:, None]
                self._constant(f"inner_masks_{prefix.replace('.', '_')}", mask)  # (options, inner)

    def _inner(self, value: float) -> list[float]:
        fixed = BACKBONES[self.space.handcrafted]["inner"]
        return [value if s in self.space.stages else r for s, r in enumerate(fixed)]

    def _constant(self, name: str, mask: Tensor) -> None:
        self.register_buffer(name, mask.float(), persistent=False)

    def masked_weights(self) -> dict[str, Tensor]:
        """The largest network's parameters under the gates, by name: those that a choice touches."""
        out = {}
        for stage, depth, inner, kernel in zip(self.space.stages, *self.choices.gates):
            kernel = torch.einsum("o,oxy->xy", kernel, self.kernel_masks)
            for j, prefix in enumerate(self.largest.places[stage]):
                block = self.largest.get_submodule(prefix)
                channels = inner @ getattr(self, f"inner_masks_{prefix.replace('.', '_')}")
                on = sum(gate for gate, d in zip(depth, self.space.depth) if d > j)
                masks = {"kernel": kernel, "inner": channels[:, None, None], "depth": on}
                for name, kinds in block.MASKS.items():
                    if kinds == "depth" and j < self.space.depth[0]:
                        continue  # never left out
                    weight = block.get_parameter(name)
                    for kind in kinds.split():
                        weight = weight * masks[kind]
                    out[f"{prefix}.{name}"] = weight
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.choices.gates[0].requires_grad:
            return functional_call(self.largest, self.masked_weights(), x)
        network, _ = self.skeleton(self.choices.choice())
        network.train(self.training)
        return functional_call(network, self.slices(self.choices.choice()), x)

    def skeleton(self, choice: Sequence[int]) -> tuple[nn.Module, dict[str, str]]:
        synced = any(isinstance(m, nn.SyncBatchNorm) for m in self.largest.modules())
        return _skeleton(self.space, tuple(choice), self.stem, self.width, synced)

    def slices(self, choice: Sequence[int]) -> dict[str, Tensor]:
        """Views of the largest network's parameters and buffers that make up a network of the space, by its names."""
        network, names = self.skeleton(choice)
        full = dict(chain(self.largest.named_parameters(), self.largest.named_buffers()))
        out = {}
        for name, small in chain(network.named_parameters(), network.named_buffers()):
            big = full[names[name]]
            for dim, n in enumerate(small.shape):
                if n < big.shape[dim]:
                    big = big.narrow(dim, (big.shape[dim] - n) // 2 if dim > 1 else 0, n)
            out[name] = big
        return out

    def cut(self, choice: Sequence[int]) -> nn.Module:
        """A network of the space with a copy of its part of the weights; its BN statistics want `recalibrate`."""
        network, _ = build_backbone(self.space.arch(choice), self.stem, self.width)
        network.to(self.largest.get_parameter(next(iter(network.state_dict()))))  # device and precision
        network.load_state_dict(self.slices(choice))
        return network


@lru_cache(maxsize=4096)
def _meta_block(block: str, place: Place, n: int) -> nn.Module:
    with torch.device("meta"):
        return BLOCKS[block](*place[1:])


@lru_cache(maxsize=256)
def _skeleton(
    space: Space, choice: tuple[int, ...], stem: str, width: float, synced: bool
) -> tuple[nn.Module, dict[str, str]]:
    """(network without memory, its names -> those of the same things in the largest network); synced: BN over ranks.

    A search visits a new network nearly every step, so blocks, which take long to make, are kept for the next.
    """
    archs = space.arch(choice), space.arch([-1] * len(choice))
    with torch.device("meta"):
        small, big = (NETWORKS[arch["block"]](arch, width, stem, _meta_block) for arch in archs)
    renamed = {a: b for ours, theirs in zip(small.places, big.places) for a, b in zip(ours, theirs)}
    names = {}
    for name, _ in chain(small.named_parameters(), small.named_buffers()):
        head = ".".join(name.split(".")[:2])
        names[name] = renamed.get(head, head) + name[len(head) :]
    return (nn.SyncBatchNorm.convert_sync_batchnorm(small) if synced else small), names


def derive(scores: Tensor, base: int, table: Tensor, target: float) -> list[int]:
    """The choice with the highest total score (S, O) among all whose MACs lie in BAND of the target, by enumeration.

    With scores = log probabilities the likeliest network that meets the target; each stage's own argmax would miss it.
    Raises ValueError where no network does.
    """
    scores, table = scores.detach().double().cpu(), table.cpu()
    score, cost = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for s in range(1, len(table)):  # all choices of all stages but the first
        score = (score[:, None] + scores[s]).flatten()
        cost = (cost[:, None] + table[s]).flatten()
    best, best_choice = -math.inf, None
    for o in range(table.shape[1]):
        total = base + table[0, o] + cost
        good = torch.where((total >= BAND[0] * target) & (total <= BAND[1] * target), score, -math.inf)
        n = int(good.argmax())
        if good[n] + scores[0, o] > best:
            rest = torch.unravel_index(torch.tensor(n), [table.shape[1]] * (len(table) - 1))
            best, best_choice = float(good[n] + scores[0, o]), [o, *map(int, rest)]
    if best_choice is None:
        low, high = base, base + float(table.max(1).values.sum())
        raise ValueError(
            f"no network of the space has {BAND[0]:g} to {BAND[1]:g} of {target / 1e6:.4g} MMACs: they go from "
            f"{low / 1e6:.4g} to {high / 1e6:.4g} MMACs"
        )
    return best_choice


def random_choice(base: int, table: Tensor, target: float, generator: torch.Generator) -> list[int]:
    """A choice drawn evenly from those whose MACs lie in BAND of the target (there must be one: see `derive`)."""
    while True:
        choices = torch.randint(table.shape[1], (4096, len(table)), generator=generator)
        total = base + table.cpu()[torch.arange(len(table)), choices].sum(1)
        good = choices[(total >= BAND[0] * target) & (total <= BAND[1] * target)]
        if len(good):
            return good[0].tolist()


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable, forward: Callable | None = None) -> nn.Module:
    """BN statistics anew: the mean over batches, in place of those that other networks have left.

    forward: what takes a batch, by default the module itself.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta, training, seen = [m.momentum for m in norms], module.training, dict.fromkeys(norms, 0)

    def count(m, _):  # a plain average; with momentum None a BN reads its count of batches back from a GPU each time
        seen[m] += 1
        m.momentum = 1 / seen[m]

    hooks = [m.register_forward_pre_hook(count) for m in norms]
    for m in norms:
        m.reset_running_stats()
    module.train()
    for batch in batches:
        (forward or module)(batch)
    for m, hook, momentum in zip(norms, hooks, momenta):
        hook.remove()
        m.momentum = momentum
    return module.train(training)


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
