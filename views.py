"""Batches of augmented views.

MultiCrop(recipe, size)      uint8 batch -> list of float views; each image has its own parameters, from a generator

Drawing (`sample`, in numpy) and computing (`render`) are apart: all parameters of all views are one tensor, so one copy
to a GPU; the same ones give the same views on a CPU, on a GPU, eager or compiled, and a slice of them is one rank's
share. The order is crop, flip, colour jitter, grey, blur, solarize, normalise, each as torchvision's functional
operation on a float image does it.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class View(NamedTuple):
    """How one view is made; probabilities are per image."""

    scale: tuple[float, float] = (0.2, 1.0)  # of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width : height
    size: int | None = None  # edge in pixels; None is `share` of MultiCrop's, to the nearest multiple of 4
    share: float = 1.0
    bicubic: bool = False  # else bilinear; both antialiased
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    reach: int | None = None  # pixels to either side that the blur takes in; None is a twentieth of the edge
    solarize: float = 0.0
    erase: float = 0.0  # a box of .02 to .33 of the view becomes the mean colour


class Recipe(NamedTuple):
    globals: tuple[View, ...]
    locals: tuple[View, ...] = ()
    balance: tuple[float, float] | None = None  # lambda_gg, lambda_gl; None is the mean over all pairs of views
    blur_above: int = 64  # px of the globals: the published recipes for small images have no blur


def multi_crop(
    boundary: float,
    share: float,
    n: int,
    balance: tuple[float, float] | None = None,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0),
) -> Recipe:
    """Two global views of [boundary, 1] of the area and n local ones of [.05, boundary], 2210.02808.

    share: of a local view's edge in a global one's; blur and solarize: of the first global, the second, the locals.
    """
    first, second, local = (
        View(bicubic=True, jitter=jitter, blur=b, solarize=s) for b, s in zip(blur, solarize, strict=True)
    )
    local = local._replace(scale=(0.05, boundary), share=share)
    return Recipe(tuple(v._replace(scale=(boundary, 1.0)) for v in (first, second)), (local,) * n, balance)


_simclr = View(scale=(0.08, 1.0))
_diet = View(
    (0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=0.3, grey=0.2, blur=0.2, sigma=(1, 2), reach=1, erase=0.25
)
_diet_2 = _diet._replace(blur=0.0, erase=0.0)
_diet_1 = _diet_2._replace(jitter_p=0.0, grey=0.0)
_diet_0 = _diet_1._replace(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
RECIPES = {
    "simsiam": Recipe((View(), View())),  # 2011.10566 section 3; 2302.00059 uses the same three on CIFAR
    "simclr": Recipe((_simclr, _simclr)),  # 2002.05709 appendix B.9
    "moco": Recipe((_simclr, _simclr)),  # 2003.04297
    # 2210.02808: baselines for CNNs and ViTs with 96 px to 224, then SSLight's with 128; other sizes in proportion
    "dino": multi_crop(0.14, 96 / 224, 6),
    "dino-vit": multi_crop(0.25, 96 / 224, 10),
    "swav": multi_crop(0.14, 96 / 224, 6, None, (0.8, 0.8, 0.8, 0.2), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    "sslight-cnn": multi_crop(0.3, 128 / 224, 6, (0.4, 0.6)),
    "sslight-vit": multi_crop(0.3, 128 / 224, 10, (0.4, 0.6)),
    "sslight-swav": multi_crop(0.3, 128 / 224, 6, (0.4, 0.6), (0.8, 0.8, 0.8, 0.2), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    # as published CIFAR benchmarks have them: no locals, which would be of 12 px, and SwAV's colours half as strong
    "dino-small": multi_crop(0.14, 1, 0, blur=(0.0, 0.0, 0.0)),
    "swav-small": multi_crop(0.14, 1, 0, None, (0.4, 0.4, 0.4, 0.1), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    # 2406.10743: one view; strengths 0 (none), 1 (crop and flip), 2 (and colours), 3 (and blur and erasing)
    "diet": Recipe((_diet,), blur_above=0),
    "diet-2": Recipe((_diet_2,)),
    "diet-1": Recipe((_diet_1,)),
    "diet-0": Recipe((_diet_0,)),
}
CROP_AND_FLIP = Recipe((View((0.08, 1.0), jitter_p=0.0, grey=0.0, blur=0.0),))  # one view, to train a probe on


def adjust(
    recipe: Recipe,
    boundary: float | None = None,
    global_scale: Sequence[float] | None = None,
    local_scale: Sequence[float] | None = None,
    n_locals: int | None = None,
    global_size: int | None = None,
    local_size: int | None = None,
    blur: Sequence[float] | None = None,
    solarize: Sequence[float] | None = None,
    balance: Sequence[float] | None = None,
    n_globals: int | None = None,
) -> Recipe:
    """The recipe with some knobs turned; None leaves one as it is. boundary s sets both scales, [s, 1] and [.05, s].

    blur and solarize have three probabilities: of the first global view, the second, and the locals. A recipe without
    locals gets them, if n_locals asks for some, from its first global view: areas below that one's, 3/7 of its edge.
    Raises ValueError for what cannot be.
    """
    if boundary is not None:
        if global_scale or local_scale:
            raise ValueError("a boundary sets both scales: give it or them, not both")
        global_scale, local_scale = (boundary, 1.0), (0.05, boundary)
    for name, scale in ("global", global_scale), ("local", local_scale):
        if scale and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"the {name} scale {scale[0]:g} to {scale[1]:g} must be shares of the area, small to large"
            )
    for name, p in ("blur", blur), ("solarize", solarize):
        if p and not all(0 <= x <= 1 for x in p):
            raise ValueError(f"{name}: {' '.join(f'{x:g}' for x in p)} must be probabilities")
    small = any(size is not None and size < 8 for size in (global_size, local_size))
    if (n_locals or 0) < 0 or small or min(balance or [0]) < 0:
        raise ValueError("views need 0 or more locals, edges of 8 pixels or more and weights of 0 or more")
    views, first = list(recipe.globals), recipe.globals[0]
    views = (views * 2)[: n_globals or len(views)]
    local = recipe.locals[0] if recipe.locals else first._replace(scale=(0.05, first.scale[0]), share=96 / 224)
    if global_scale:
        views = [v._replace(scale=tuple(global_scale)) for v in views]
    if local_scale:
        local = local._replace(scale=tuple(local_scale))
    for name, p in ("blur", blur), ("solarize", solarize):
        if p:
            views = [v._replace(**{name: x}) for v, x in zip(views, p)]
            local = local._replace(**{name: p[2]})
    views = [v._replace(size=global_size or v.size) for v in views]
    local = local._replace(size=local_size or local.size)
    n = len(recipe.locals) if n_locals is None else n_locals
    balance = tuple(balance) if balance else recipe.balance
    return Recipe(tuple(views), (local,) * n, balance, 0 if blur else recipe.blur_above)


# What is drawn for a view of an image, and how many numbers each is
PARAMETERS = {
    "box": 4,  # top, left, height, width of the crop
    "flip": 1,  # 0 or 1, as are grey and solarize
    "factor": 3,  # of brightness, contrast, saturation; 1 for none
    "order": 3,  # of the three
    "hue": 1,  # a shift in turns; 0 for none
    "hue_after": 1,  # that many of the three
    "grey": 1,
    "sigma": 1,  # of the blur, in pixels; 0 for none
    "solarize": 1,
    "erased": 4,  # a box like the crop's, but in pixels of the view; empty for none
}
_FIRST = dict(zip(PARAMETERS, itertools.accumulate([0, *PARAMETERS.values()])))
_ORDERS = np.array(list(itertools.permutations(range(3))), np.float32)


def named(parameters: Tensor) -> dict[str, Tensor]:
    """(n, P) -> {name: (n,) or (n, k)}, as PARAMETERS has them; what is 0 or 1 as bool."""
    p = {name: parameters[:, _FIRST[name] : _FIRST[name] + k] for name, k in PARAMETERS.items()}
    p |= {name: p[name][:, 0] for name, k in PARAMETERS.items() if k == 1}
    return p | {name: p[name] > 0.5 for name in ("flip", "grey", "solarize")}


class MultiCrop:
    """uint8 (n, 3, H, W) on `device` -> a list of float32 (n, 3, S, S), globals first, normalised by mean and std."""

    def __init__(self, recipe: str | Recipe, size: int, mean=IMAGENET_MEAN, std=IMAGENET_STD, device="cpu"):
        recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
        size = recipe.globals[0].size or size
        self.views = [
            v._replace(
                size=v.size or (size if v.share == 1 else max(8, 4 * round(v.share * size / 4))),
                blur=v.blur if size > recipe.blur_above else 0.0,
            )
            for v in (*recipe.globals, *recipe.locals)
        ]
        self.n_globals, self.balance = len(recipe.globals), recipe.balance
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
        self._render = self._render_all

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> list[Tensor]:
        parameters = self.sample(len(pixels), *pixels.shape[2:], rng)
        return self.render(pixels, parameters.to(pixels.device))

    def sample(self, n: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
        """(V, n, P) on the CPU: what PARAMETERS lists, for every view of n images."""
        return torch.from_numpy(sample_views(self.views, n, height, width, rng))

    def render(self, pixels: Tensor, parameters: Tensor) -> list[Tensor]:
        """Pure: the same pixels (n, 3, H, W) and parameters (V, n, P) give the same views; in fp32 whatever autocast is
        on, which would round their colours to bf16."""
        with torch.autocast(pixels.device.type, enabled=False), torch.no_grad():
            return self._render(pixels, parameters)

    def compile(self) -> None:
        self._render = torch.compile(self._render_all, dynamic=False)

    def _render_all(self, pixels: Tensor, parameters: Tensor) -> list[Tensor]:
        out = []
        for view, p in zip(self.views, map(named, parameters.unbind()), strict=True):
            x = render_view(pixels, p, view.size, view.bicubic, view.reach).sub_(self.mean).div_(self.std)
            out.append(erase(x, p["erased"]) if view.erase else x)
        return out


def sample_views(views: Sequence[View], n: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Parameters (V, n, P) of views of n images, distributed as in torchvision's transforms."""
    limits = _limits(tuple(views), height * width)
    u = rng.random((16, len(views), n), np.float32)
    out = np.zeros((len(views), n, sum(PARAMETERS.values())), np.float32)
    p = {name: out[..., _FIRST[name] : _FIRST[name] + k] for name, k in PARAMETERS.items()}

    sample_boxes(views, limits, u[:4], height, width, rng, p["box"])
    on = u[4:9] < limits["chance"]
    for name, row in zip(("flip", "grey", "solarize"), on):
        p[name][..., 0] = row
    change = (2 * u[9:13] - 1) * (limits["jitter"] * on[3])  # (4, V, n)
    p["factor"][:] = np.maximum(1 + change[:3], 0).transpose(1, 2, 0)
    p["hue"][..., 0] = change[3]
    place = (u[13] * 24).astype(np.int64)  # one of the 24 orders of four operations
    p["order"][:] = _ORDERS[place >> 2]
    p["hue_after"][..., 0] = place & 3
    low, high = limits["sigma"]
    p["sigma"][..., 0] = (low + u[14] * (high - low)) * on[4]
    for view, boxes, due in zip(views, p["erased"], u[15]):
        if view.erase:
            boxes[:] = sample_erased(view.size, n, rng) * (due < view.erase)[:, None]
    return out


@lru_cache
def _limits(views: tuple[View, ...], area: int) -> dict[str, np.ndarray]:
    """What the views' numbers are drawn between, (k, V, 1) each; area of the images, in pixels."""
    limits = {
        "chance": [(v.flip, v.grey, v.solarize, v.jitter_p, v.blur) for v in views],
        "jitter": [v.jitter for v in views],
        "sigma": [v.sigma for v in views],
        "area": [(v.scale[0] * area, v.scale[1] * area) for v in views],
        "log_ratio": np.log([v.ratio for v in views]),
    }
    return {name: np.array(rows, np.float32).T[..., None] for name, rows in limits.items()}


def sample_boxes(
    views: Sequence[View],
    limits: dict[str, np.ndarray],
    u: np.ndarray,
    height: int,
    width: int,
    rng: np.random.Generator,
    out: np.ndarray,
) -> None:
    """Fills out (V, n, 4) with crops as RandomResizedCrop draws them: ten tries, the first legal one counts. u (4, V,
    n) is for the first try's area and shape, and for the place; the other tries are drawn where they are needed.
    """
    small, large = limits["area"]
    low, high = limits["log_ratio"]

    def shapes(area: np.ndarray, ratio: np.ndarray, rows=slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        root = np.exp((low[rows] + ratio * (high - low)[rows]) / 2)  # of width : height
        edge = np.sqrt(small[rows] + area * (large - small)[rows])
        h, w = np.rint(edge / root), np.rint(edge * root)
        return h, w, (h > 0) & (h <= height) & (w > 0) & (w <= width)

    h, w, legal = shapes(u[0], u[1])
    if not legal.all():
        view, image = (~legal).nonzero()
        more_h, more_w, fits = shapes(*rng.random((2, len(view), 9), np.float32), rows=view)
        chosen = np.arange(len(view)), fits.argmax(1)
        h[view, image], w[view, image], legal[view, image] = more_h[chosen], more_w[chosen], fits.any(1)
    out[..., 0], out[..., 1] = np.floor(u[2] * (height - h + 1)), np.floor(u[3] * (width - w + 1))
    out[..., 2], out[..., 3] = h, w
    for k in (~legal).any(1).nonzero()[0]:  # none legal: the largest central crop of a legal shape
        ratio = views[k].ratio
        whole_h, whole_w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
        out[k, ~legal[k]] = (height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w


def sample_erased(side: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 4) boxes in a view of that edge as RandomErasing draws them: ten tries, the first that fits counts."""
    u = rng.random((22, n), np.float32)
    area, aspect = side**2 * (0.02 + u[:10] * 0.31), np.exp(math.log(0.3) + u[10:20] * math.log(3.3 / 0.3))
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (h < side) & (w < side)
    chosen = fits.argmax(0), np.arange(n)
    h, w = h[chosen], w[chosen]
    box = np.stack([np.floor(u[20] * (side - h + 1)), np.floor(u[21] * (side - w + 1)), h, w], 1)
    return box * fits.any(0)[:, None]


def erase(x: Tensor, box: Tensor) -> Tensor:
    """(n, 3, S, S), normalised, with the box of each image at zero, the mean colour."""
    top, left, h, w = box[:, :, None].unbind(1)
    place = torch.arange(x.shape[-1], device=x.device)
    rows, columns = (place >= top) & (place < top + h), (place >= left) & (place < left + w)
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.0)


def resize_matrix(
    start: Tensor, length: Tensor, size: int, extent: int, flip: Tensor | None = None, bicubic: bool = False
) -> Tensor:
    """(n, size, extent): row o of image i holds the weights with which the pixels of [start_i, start_i + length_i)
    make pixel o.

    A triangle, or Keys' cubic, as wide as the reduction, cut at the crop's edge and normalised: torchvision's
    antialiased bilinear and bicubic resize, exactly.
    """
    scale = (length / size)[:, None]
    out = torch.arange(size, device=start.device, dtype=torch.float32).expand(len(start), size)
    if flip is not None:
        out = torch.where(flip[:, None], size - 1 - out, out)
    centre = start[:, None] + (out + 0.5) * scale
    x = torch.arange(extent, device=start.device) + 0.5
    away = (x - centre[..., None]).abs() / scale[..., None].clamp(min=1)
    if bicubic:
        near, far = (1.5 * away - 2.5) * away**2 + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2
        weight = torch.where(away < 1, near, torch.where(away < 2, far, 0.0))
    else:
        weight = (1 - away).clamp(min=0)
    inside = (x > start[:, None]) & (x < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(-1, keepdim=True)


def blur_matrix(sigma: Tensor, size: int, reach: int | None = None) -> Tensor:
    """(n, size, size): a Gaussian over `reach` pixels to either side, mirrored at the border; None is a twentieth of
    the edge (2002.05709)."""
    reach = reach or max(1, size // 20)
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel * (kernel > 1e-12)  # products with denormals take 10 times as long on a CPU
    kernel = kernel / kernel.sum(1, keepdim=True)  # (n, K)
    source = torch.arange(size, device=sigma.device)[:, None] + offset  # (size, K)
    source = (size - 1) - ((size - 1) - source.abs()).abs()
    shape = (len(sigma), size, len(offset))
    return sigma.new_zeros(len(sigma), size, size).scatter_add_(2, source.expand(shape), kernel[:, None].expand(shape))


def grey(x: Tensor) -> Tensor:
    """(n, 3, S, S) -> luma (n, 1, S, S)"""
    return (0.2989 * x[:, 0]).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)[:, None]


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """(n, 3, S, S) in 0..1 -> the same with the hue of HSV moved by (n,) turns."""
    r, g, b = x.unbind(1)
    # Hue in sixths of a turn, by ordering the channels, not by asking which is largest: torch.where is slow on a CPU.
    high, low = torch.maximum(g, b), torch.minimum(g, b)
    value, middle = torch.maximum(r, high), torch.minimum(r, high)
    chroma = value - torch.minimum(low, middle)
    hue = (g < b) * -6.0
    hue += (r < high) * (-2 - 2 * hue)
    hue = hue.add_((middle - low).div_(chroma.clamp(min=1e-12))).abs_().add_(6 * turns[:, None, None])
    hue -= (hue / 6).floor_().mul_(6)
    weights = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1)
    return weights.clamp_(0, 1).sub_(1).mul_(chroma[:, None]).add_(value[:, None])


def render_view(
    pixels: Tensor, p: dict[str, Tensor], size: int, bicubic: bool = False, reach: int | None = None
) -> Tensor:
    """uint8 (n, 3, H, W) and `named` parameters -> float32 (n, 3, size, size) in 0..1; reach is the blur's."""
    bytewise = size >= BYTEWISE and not _everywhere(pixels)
    x = (crop_bytes if bytewise else _crop)(pixels, p["box"], p["flip"], size, bicubic)
    for step in range(4):
        x = _where(x, (p["hue"] != 0) & (p["hue_after"] == step), shift_hue, p["hue"])
        if step < 3:
            blend_(x, p["order"][:, step], p["factor"])
    x = _where(x, p["grey"], lambda x: grey(x).expand_as(x))
    x = _where(x, p["sigma"] > 0, partial(_blur, reach=reach), p["sigma"])
    return _where(x, p["solarize"], lambda x: torch.where(x >= 0.5, 1 - x, x))


BYTEWISE = 96  # px of a view; from here on a CPU crops image by image, see crop_bytes


def _crop(pixels: Tensor, box: Tensor, flip: Tensor, size: int, bicubic: bool) -> Tensor:
    """Crop, resize and flip as two products with a matrix of weights an image: exact, and one call for all of them."""
    n, _, height, width = pixels.shape
    top, left, h, w = box.unbind(1)
    y_weights = resize_matrix(top, h, size, height, bicubic=bicubic).div_(255)
    x_weights = resize_matrix(left, w, size, width, flip, bicubic)
    x = pixels.permute(0, 2, 1, 3).float().reshape(n, height, 3 * width)  # rows first: two plain batched products
    x = (y_weights @ x).view(n, size * 3, width) @ x_weights.transpose(1, 2)
    x = x.view(n, size, 3, size).transpose(1, 2).contiguous()
    return x.clamp_(0, 1) if bicubic else x  # which overshoots at edges


def crop_bytes(pixels: Tensor, box: Tensor, flip: Tensor, size: int, bicubic: bool) -> Tensor:
    """The same, an image at a time, by torch's resize of bytes: rounded after each direction, as PIL does, so about
    half a grey level off; 4 times faster than `_crop` for a view of 224 px and 14 times for one of 96."""
    out = torch.empty(len(pixels), 3, size, size, dtype=torch.uint8)
    for image, view, (top, left, h, w), flipped in zip(pixels, out, box.int().tolist(), flip.tolist()):
        part = image[None, :, top : top + h, left : left + w]
        part = F.interpolate(part, (size, size), mode="bicubic" if bicubic else "bilinear", antialias=True)[0]
        view.copy_(part.flip(2) if flipped else part)
    return out.float().div_(255)


BRIGHTNESS, CONTRAST, SATURATION = range(3)


def blend_(x: Tensor, step: Tensor, factor: Tensor) -> None:
    """One of brightness, contrast and saturation, in place; step (n,) says which for each image, factor (n, 3) how
    much.

    All are clamp(f x + (1 - f) reference), the reference being black, the mean luma and the luma: one expression
    serves them all.
    """
    f = factor.gather(1, step[:, None].long()).view(-1, 1, 1, 1)
    to_mean, to_luma = ((1 - f) * (step == k).view(-1, 1, 1, 1) for k in (CONTRAST, SATURATION))
    luma = grey(x)
    mean = luma.mean((2, 3), keepdim=True)
    x.mul_(f).add_(luma.mul_(to_luma).add_(to_mean * mean)).clamp_(0, 1)


def _blur(x, sigma, reach):
    matrix = blur_matrix(sigma, x.shape[-1], reach)[:, None]
    return matrix @ x @ matrix.transpose(2, 3)


def _everywhere(x):
    """Whether to compute on all images and select: on a GPU, or compiled, asking which are due stops the stream."""
    return x.is_cuda or torch.compiler.is_compiling()


def _where(x, mask, function, *arguments):
    """function on the images of the mask."""
    if _everywhere(x):
        return torch.where(mask.view(-1, 1, 1, 1), function(x, *arguments), x)
    rows = mask.nonzero()[:, 0]
    if len(rows):
        x[rows] = function(x[rows], *(a[rows] for a in arguments))
    return x
