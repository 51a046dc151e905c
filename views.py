"""Augmented views of batches of images.

    crop = MultiCrop("simsiam", 32)                     # a recipe, and the edge of a global view
    views = crop(pixels, np.random.default_rng(0))      # uint8 (n, 3, H, W) -> [(n, 3, S, S), ...], globals first

Parameters are sampled in numpy (`sample`), and views are computed from them (`render`). The parameters of all views are
one tensor, which is copied to a GPU at once, and of which each rank takes its slice. They determine the views, on a CPU
or GPU, eager or compiled. The order is crop, flip, colour jitter, grey, blur, solarize, normalise, each the same as
torchvision's functional operation on a float image.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import permutations
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale_image, solarize_image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class View(NamedTuple):
    """How one view is made; probabilities are per image."""

    scale: tuple[float, float] = (0.2, 1.0)  # of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width : height
    size: int | None = None  # edge in pixels; None: `share` of MultiCrop's size, rounded to a multiple of 4
    share: float = 1.0
    bicubic: bool = False  # else bilinear; both antialiased
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    reach: int | None = None  # pixels on either side that the blur covers; None: a twentieth of the edge
    solarize: float = 0.0
    erase: float = 0.0  # a box of .02 to .33 of the view becomes the mean colour


class Recipe(NamedTuple):
    globals: tuple[View, ...]
    locals: tuple[View, ...] = ()
    balance: tuple[float, float] | None = None  # lambda_gg, lambda_gl; None: the mean over all pairs of views
    blur_above: int = 64  # blur only if globals have more pixels: published recipes for small images have none


Pair = tuple[float, float] | None
Triple = tuple[float, float, float] | None  # of the first global view, the second, the locals


def multi_crop_recipe(
    boundary: float,
    share: float,  # of a local view's edge in a global one's
    n: int,
    balance: Pair = None,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    blur: Triple = (1.0, 0.1, 0.5),
    solarize: Triple = (0.0, 0.2, 0.0),
) -> Recipe:
    """Two global views of [boundary, 1] of the area and n local ones of [.05, boundary], 2210.02808."""
    view = View((boundary, 1.0), bicubic=True, jitter=jitter)
    first, second, local = (view._replace(blur=b, solarize=s) for b, s in zip(blur, solarize))
    return Recipe((first, second), (local._replace(scale=(0.05, boundary), share=share),) * n, balance)


_simclr = View(scale=(0.08, 1.0))
_diet = View((0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=0.3, blur=0.2, sigma=(1, 2), reach=1, erase=0.25)
_diet_2 = _diet._replace(blur=0.0, erase=0.0)
_diet_1 = _diet_2._replace(jitter_p=0.0, grey=0.0)
_diet_0 = _diet_1._replace(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
_never = (0.0, 0.0, 0.0)
_swav = {"jitter": (0.8, 0.8, 0.8, 0.2), "blur": (0.5, 0.5, 0.5), "solarize": _never}
RECIPES = {
    "simsiam": Recipe((View(), View())),  # 2011.10566 section 3; 2302.00059 uses the same three on CIFAR
    "simclr": Recipe((_simclr, _simclr)),  # 2002.05709 appendix B.9
    "moco": Recipe((_simclr, _simclr)),  # 2003.04297
    # 2210.02808: baselines for CNNs and ViTs with 96 px to 224, then SSLight's with 128; other sizes in proportion
    "dino": multi_crop_recipe(0.14, 96 / 224, 6),
    "dino-vit": multi_crop_recipe(0.25, 96 / 224, 10),
    "swav": multi_crop_recipe(0.14, 96 / 224, 6, **_swav),
    "sslight-cnn": multi_crop_recipe(0.3, 128 / 224, 6, (0.4, 0.6)),
    "sslight-vit": multi_crop_recipe(0.3, 128 / 224, 10, (0.4, 0.6)),
    "sslight-swav": multi_crop_recipe(0.3, 128 / 224, 6, (0.4, 0.6), **_swav),
    # as in published CIFAR benchmarks: no locals, which would have 12 px, and half of SwAV's colour jitter
    "dino-small": multi_crop_recipe(0.14, 1, 0, blur=_never),
    "swav-small": multi_crop_recipe(0.14, 1, 0, jitter=(0.4, 0.4, 0.4, 0.1), blur=_never, solarize=_never),
    # 2406.10743: one view; strengths 0 (none), 1 (crop and flip), 2 (and colours), 3 (and blur and erasing)
    "diet": Recipe((_diet,), blur_above=0),
    "diet-2": Recipe((_diet_2,)),
    "diet-1": Recipe((_diet_1,)),
    "diet-0": Recipe((_diet_0,)),
}
CROP_AND_FLIP = Recipe((View((0.08, 1.0), jitter_p=0.0, grey=0.0, blur=0.0),))  # one view, to train a probe on


def adjust(
    recipe: Recipe,
    *,
    boundary: Annotated[float | None, "s: globals show [s, 1] of the area, locals [.05, s]; higher is easier"] = None,
    global_scale: Annotated[Pair, "shares of the area; raise the first where views miss the object"] = None,
    local_scale: Annotated[Pair, "shares of the area"] = None,
    views_per_image: Annotated[int | None, "global views, 1 or 2; 1 is for diet, other methods compare two"] = None,
    locals: Annotated[int | None, "number of local views; more learn more from an epoch, each makes it longer"] = None,
    global_size: Annotated[int | None, "edge of a global view in pixels; lower is faster"] = None,
    local_size: Annotated[int | None, "edge of a local view in pixels; lower is faster"] = None,
    local_share: Annotated[float | None, "or the share of a global view's edge"] = None,
    colour: Annotated[float | None, "times the recipe's colour jitter; lower where colours matter"] = None,
    blur: Annotated[Triple, "probability in the first global, the second, the locals, at any image size"] = None,
    solarize: Annotated[Triple, "probability in the first global, the second, the locals"] = None,
    balance: Annotated[Pair, "loss weights of pairs of globals and of pairs with a local, the harder task"] = None,
) -> Recipe:
    """The recipe with some settings changed; None keeps a setting.

    If a recipe has no locals, they are made from its first global view, with smaller areas and 3/7 of its edge. If it
    has a single global view, a second one is the same.
    """
    if boundary is not None:
        if global_scale or local_scale:
            raise ValueError("a boundary sets both scales: give it or them, not both")
        global_scale = (boundary, 1.0)
        local_scale = (0.05, boundary)
    for name, scale in ("global", global_scale), ("local", local_scale):
        low, high = scale or (1, 1)
        if not 0 < low <= high <= 1:
            raise ValueError(f"the {name} scale {low:g} to {high:g} must be shares of the area, small to large")
    for name, chances in ("blur", blur), ("solarize", solarize):
        if chances and not all(0 <= p <= 1 for p in chances):
            raise ValueError(f"{name}: {' '.join(f'{p:g}' for p in chances)} must be probabilities")
    if views_per_image not in (None, 1, 2):
        raise ValueError(f"{views_per_image} views an image: there are 1 or 2 global ones, and any number of locals")
    small = any(size is not None and size < 8 for size in (global_size, local_size))
    if (locals or 0) < 0 or small or min(balance or [0]) < 0:
        raise ValueError("views need 0 or more locals, edges of 8 pixels or more and weights of 0 or more")
    if local_share is not None and (local_size is not None or not 0 < local_share <= 1):
        raise ValueError(f"a local share of {local_share:g}: must be above 0, up to 1, and without a local size")
    if colour is not None and not 0 <= colour <= 2.5:
        raise ValueError(f"{colour:g} times the colour jitter: must be 0 to 2.5")

    first, second = recipe.globals[0], recipe.globals[-1]
    local = recipe.locals[0] if recipe.locals else first._replace(scale=(0.05, first.scale[0]), share=96 / 224)
    if local_share is not None:
        local = local._replace(size=None, share=local_share)
    views = []
    for k, view in enumerate((first, second, local)):
        scale, size = (global_scale, global_size) if k < 2 else (local_scale, local_size)
        view = view._replace(scale=tuple(scale or view.scale), size=size or view.size)
        if colour is not None:
            *strengths, hue = (colour * x for x in view.jitter)
            view = view._replace(jitter=(*strengths, min(0.5, hue)))
        view = view._replace(blur=blur[k]) if blur else view
        views.append(view._replace(solarize=solarize[k]) if solarize else view)
    n_globals = len(recipe.globals) if views_per_image is None else views_per_image
    n_locals = len(recipe.locals) if locals is None else locals
    return Recipe(
        globals=tuple(views[:n_globals]),
        locals=(views[2],) * n_locals,
        balance=tuple(balance) if balance else recipe.balance,
        blur_above=0 if blur else recipe.blur_above,
    )


VIEW_SPACE = {  # keywords of `adjust`, and what search.py --space views chooses from
    "boundary": (0.08, 0.14, 0.2, 0.3, 0.4),
    "locals": (0, 2, 4, 6),
    "local_share": (3 / 7, 4 / 7),
    "colour": (0.5, 0.75, 1.0, 1.5),
}

# The parameters of a view of an image, and how many numbers each one has
PARAMETERS = {
    "box": 4,  # top, left, height, width of the crop
    "flip": 1,  # 0 or 1, as are grey and solarize
    "factor": 3,  # of brightness, contrast, saturation; 1 for none
    "order": 3,  # in which brightness (0), contrast (1) and saturation (2) are applied
    "hue": 1,  # a shift in turns; 0 for none
    "hue_after": 1,  # how many of those three are applied before the hue shift
    "grey": 1,
    "sigma": 1,  # of the blur, in pixels; 0 for none
    "solarize": 1,
    "erased": 4,  # a box like the crop's, but in pixels of the view; empty for none
}
_ORDERS = np.array(list(permutations(range(3))), np.float32)


def named(parameters: Tensor | np.ndarray) -> dict[str, Tensor | np.ndarray]:
    """(..., P) -> {name: (...) or (..., k)}: slices for the names in PARAMETERS, sharing memory."""
    parts, start = {}, 0
    for name, k in PARAMETERS.items():
        parts[name] = parameters[..., start] if k == 1 else parameters[..., start : start + k]
        start += k
    return parts


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
        self.balance = recipe.balance
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> list[Tensor]:
        parameters = self.sample(len(pixels), *pixels.shape[2:], rng)
        return self.render(pixels, parameters.to(pixels.device))

    def sample(self, n: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
        """Parameters (V, n, P) of all views of n images, on the CPU."""
        return torch.from_numpy(sample_views(self.views, n, height, width, rng))

    def render(self, pixels: Tensor, parameters: Tensor) -> list[Tensor]:
        """Pure: the same pixels (n, 3, H, W) and parameters (V, n, P) give the same views. Runs in fp32 even under
        autocast, as bf16 would round colours."""
        with torch.autocast(pixels.device.type, enabled=False), torch.no_grad():
            return self._render(pixels, parameters)

    def compile(self) -> None:
        self._render = torch.compile(self._render, dynamic=False)

    def _render(self, pixels: Tensor, parameters: Tensor) -> list[Tensor]:
        out = []
        for view, p in zip(self.views, map(named, parameters.unbind()), strict=True):
            x = render_view(pixels, p, view.size, view.bicubic, view.reach).sub_(self.mean).div_(self.std)
            out.append(erase(x, p["erased"]) if view.erase else x)
        return out


def sample_views(views: Sequence[View], n: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Parameters (V, n, P) of views of n images, distributed as in torchvision's transforms."""
    limits = _limits(tuple(views), height * width)
    u = rng.random((16, len(views), n), np.float32)  # in one call, as a call costs more than its numbers
    u_box, u_chance, u_jitter, (u_order, u_sigma, u_erase) = np.split(u, [4, 9, 13])
    out = np.zeros((len(views), n, sum(PARAMETERS.values())), np.float32)
    p = named(out)  # writes to p go to out

    p["box"][:] = sample_boxes(views, u_box, height, width, rng)
    p["flip"][:], p["grey"][:], p["solarize"][:], jittered, blurred = u_chance < limits["chance"]
    change = (2 * u_jitter - 1) * (limits["jitter"] * jittered)  # (4, V, n)
    strength = (limits["jitter"] * jittered)[:3]
    factor = np.where(strength > 1, u_jitter[:3] * (1 + strength), 1 + change[:3])  # from max(0, 1 - s) to 1 + s
    p["factor"][:] = factor.transpose(1, 2, 0)
    p["hue"][:] = change[3]
    order = (u_order * 24).astype(np.int64)  # of four operations: one of 6 of the first three, hue in one of 4 places
    p["order"][:] = _ORDERS[order >> 2]
    p["hue_after"][:] = order & 3
    low, high = limits["sigma"]
    p["sigma"][:] = (low + u_sigma * (high - low)) * blurred
    for view, boxes, u in zip(views, p["erased"], u_erase):
        if view.erase:
            boxes[:] = sample_erased(view.size, n, rng) * (u < view.erase)[:, None]
    return out


@lru_cache
def _limits(views: tuple[View, ...], area: int) -> dict[str, np.ndarray]:
    """Probabilities and ranges of the views, (k, V, 1) each. area: of the images, in pixels."""
    limits = {
        "chance": [(v.flip, v.grey, v.solarize, v.jitter_p, v.blur) for v in views],
        "jitter": [v.jitter for v in views],
        "sigma": [v.sigma for v in views],
        "area": [(v.scale[0] * area, v.scale[1] * area) for v in views],
        "log_ratio": np.log([v.ratio for v in views]),
    }
    return {name: np.array(rows, np.float32).T[..., None] for name, rows in limits.items()}


def sample_boxes(views: Sequence[View], u: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Crops (V, n, 4), distributed as in RandomResizedCrop: ten tries, of which the first legal one counts. u (4, V, n)
    gives the first try's area and ratio, and the position. More tries are drawn where needed."""
    limits = _limits(tuple(views), height * width)
    u_area, u_ratio, u_top, u_left = u
    h, w, legal = _shapes(limits["area"], limits["log_ratio"], u_area, u_ratio, height, width)  # (V, n) each
    if not legal.all():
        view, image = (~legal).nonzero()
        area, log_ratio = limits["area"][:, view], limits["log_ratio"][:, view]
        more_h, more_w, fits = _shapes(area, log_ratio, *rng.random((2, len(view), 9), np.float32), height, width)
        chosen = np.arange(len(view)), fits.argmax(1)
        h[view, image] = more_h[chosen]
        w[view, image] = more_w[chosen]
        legal[view, image] = fits.any(1)
    box = np.stack([np.floor(u_top * (height - h + 1)), np.floor(u_left * (width - w + 1)), h, w], -1)
    for k in (~legal).any(1).nonzero()[0]:  # none legal: the largest central crop of a legal shape
        narrowest, widest = views[k].ratio
        h = min(height, round(width / narrowest))
        w = min(width, round(height * widest))
        box[k, ~legal[k]] = (height - h) // 2, (width - w) // 2, h, w
    return box


def _shapes(area: np.ndarray, log_ratio: np.ndarray, u_area: np.ndarray, u_ratio: np.ndarray, height: int, width: int):
    """Returns heights, widths and whether they fit, (k, n) each, for crops within area and log_ratio (2, k, 1)."""
    small, large = area
    low, high = log_ratio
    root = np.exp((low + u_ratio * (high - low)) / 2)  # of width : height
    edge = np.sqrt(small + u_area * (large - small))
    h, w = np.rint(edge / root), np.rint(edge * root)
    return h, w, (h > 0) & (h <= height) & (w > 0) & (w <= width)


def sample_erased(side: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes (n, 4) in a view, distributed as in RandomErasing: ten tries, of which the first that fits counts."""
    u = rng.random((22, n), np.float32)
    area = side**2 * (0.02 + u[:10] * 0.31)
    aspect = np.exp(math.log(0.3) + u[10:20] * math.log(3.3 / 0.3))
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (h < side) & (w < side)
    chosen = fits.argmax(0), np.arange(n)
    h, w = h[chosen], w[chosen]
    box = np.stack([np.floor(u[20] * (side - h + 1)), np.floor(u[21] * (side - w + 1)), h, w], 1)
    return box * fits.any(0)[:, None]


def resize_matrix(
    start: Tensor, length: Tensor, size: int, extent: int, flip: Tensor | None = None, bicubic: bool = False
) -> Tensor:
    """Weights (n, size, extent) that resize pixels [start_i, start_i + length_i) of image i, a row per output pixel.
    The kernel is a triangle or Keys' cubic, as wide as the reduction, cut at the crop's edge and normalised. This is
    exactly torchvision's antialiased bilinear or bicubic resize."""
    scale = (length / size)[:, None]
    out = torch.arange(size, device=start.device, dtype=torch.float32).expand(len(start), size)
    if flip is not None:
        out = torch.where(flip[:, None] > 0, size - 1 - out, out)
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
    """(n, size, size): a Gaussian blur over `reach` pixels on either side, reflected at the border. None: a twentieth
    of the edge (2002.05709)."""
    reach = reach or max(1, size // 20)
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel * (kernel > 1e-12)  # products with denormals take 10 times as long on a CPU
    kernel = kernel / kernel.sum(1, keepdim=True)  # (n, K)
    source = torch.arange(size, device=sigma.device)[:, None] + offset  # (size, K)
    source = (size - 1) - ((size - 1) - source.abs()).abs()
    shape = (len(sigma), size, len(offset))
    return sigma.new_zeros(len(sigma), size, size).scatter_add_(2, source.expand(shape), kernel[:, None].expand(shape))


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """(n, 3, S, S) in 0..1 -> the same with the hue of HSV moved by (n,) turns."""
    r, g, b = x.unbind(1)
    # The hue in sixths of a turn. Channels are sorted, as torch.where on the largest one is slow on a CPU.
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
    crop = crop_bytes if size >= BYTEWISE and not _everywhere(pixels) else _crop
    x = crop(pixels, p["box"], p["flip"], size, bicubic)
    for step in range(4):  # the hue is shifted before, between or after the other three
        x = _where((p["hue"] != 0) & (p["hue_after"] == step), shift_hue, x, p["hue"])
        if step < 3:
            blend_(x, p["order"][:, step], p["factor"])
    x = _where(p["grey"] > 0, rgb_to_grayscale_image, x)
    x = _where(p["sigma"] > 0, partial(blur, reach=reach), x, p["sigma"])
    return _where(p["solarize"] > 0, partial(solarize_image, threshold=0.5), x)


def _everywhere(x: Tensor) -> bool:
    """Whether to apply an operation to all images and then select. On a GPU, and when compiled, looking up which images
    need it would be a synchronisation."""
    return x.is_cuda or torch.compiler.is_compiling()


def _where(mask, function, x, *arguments):
    """Applies function(x, *arguments) to the images in mask (n,). May write to x."""
    if _everywhere(x):
        return torch.where(mask.view(-1, 1, 1, 1), function(x, *arguments), x)
    rows = mask.nonzero()[:, 0]
    if len(rows):
        x[rows] = function(x[rows], *(a[rows] for a in arguments))
    return x


BYTEWISE = 96  # views of at least as many pixels are cropped by crop_bytes on a CPU


def _crop(pixels: Tensor, box: Tensor, flip: Tensor, size: int, bicubic: bool) -> Tensor:
    """Crops, resizes and flips all images by two batched products with `resize_matrix`."""
    n, _, height, width = pixels.shape
    top, left, h, w = box.unbind(1)
    y_weights = resize_matrix(top, h, size, height, bicubic=bicubic).div_(255)
    x_weights = resize_matrix(left, w, size, width, flip, bicubic)
    x = pixels.permute(0, 2, 1, 3).float().reshape(n, height, 3 * width)  # rows first: two plain batched products
    x = (y_weights @ x).view(n, size * 3, width) @ x_weights.transpose(1, 2)
    x = x.view(n, size, 3, size).transpose(1, 2).contiguous()
    return x.clamp_(0, 1) if bicubic else x  # bicubic overshoots at edges


def crop_bytes(pixels: Tensor, box: Tensor, flip: Tensor, size: int, bicubic: bool) -> Tensor:
    """The same as `_crop`, an image at a time by torch's uint8 resize, 4 times as fast for views of 224 px and 14 times
    for 96 px. Like PIL it rounds after each direction, an error of about half a grey level."""
    mode, out = "bicubic" if bicubic else "bilinear", []
    for image, (top, left, h, w), flipped in zip(pixels, box.int().tolist(), flip.tolist()):
        part = image[None, :, top : top + h, left : left + w]
        part = F.interpolate(part, (size, size), mode=mode, antialias=True)
        out.append(part.flip(3) if flipped else part)
    return torch.cat(out).float().div_(255)


def blend_(x: Tensor, step: Tensor, factor: Tensor) -> None:
    """Adjusts brightness (0), contrast (1) or saturation (2) in place: step (n,) is which one for each image, factor
    (n, 3) by how much. All are clamp(f x + (1 - f) reference) with black, the mean luma or the luma as reference."""
    f = factor.gather(1, step[:, None].long()).view(-1, 1, 1, 1)
    to_mean, to_luma = ((1 - f) * (step == k).view(-1, 1, 1, 1) for k in (1, 2))
    luma = rgb_to_grayscale_image(x)  # (n, 1, S, S)
    mean = luma.mean((2, 3), keepdim=True)
    x.mul_(f).add_(luma.mul_(to_luma).add_(to_mean * mean)).clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor, reach: int | None) -> Tensor:
    """Blurs (n, 3, S, S) by a Gaussian of sigma (n,) pixels."""
    matrix = blur_matrix(sigma, x.shape[-1], reach)[:, None]
    return matrix @ x @ matrix.transpose(2, 3)


def erase(x: Tensor, box: Tensor) -> Tensor:
    """Fills the box of each image (n, 3, S, S) with zero, the mean colour of a normalised image."""
    top, left, h, w = box[:, :, None].unbind(1)
    place = torch.arange(x.shape[-1], device=x.device)
    rows, columns = (place >= top) & (place < top + h), (place >= left) & (place < left + w)
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.0)
