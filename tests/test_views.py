"""Views are torchvision's operations image by image, drawn as torchvision draws them."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode, RandomErasing, RandomResizedCrop

import views
from views import RECIPES, MultiCrop, View, adjust, named, render_view

EVERYTHING = View(scale=(0.05, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=0.9, grey=0.2, blur=0.5, solarize=0.3)


def draw(view, n, height, width, seed=0):
    """`named` parameters of one view of n images."""
    rng = np.random.default_rng(seed)
    return named(torch.from_numpy(views.sample_views([view], n, height, width, rng))[0])


def random_pixels(n, height, width, seed=0):
    """Smooth random images: every operation shows, none hides in noise."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, height // 4, width // 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


def reference(image, p, i, size, antialias=True, shift=0.0, mode=InterpolationMode.BILINEAR):
    """torchvision's float operations on one image, with the parameters of row i."""
    top, left, h, w = (int(v) for v in p["box"][i].tolist())
    x = image.double() / 255
    if shift:
        x = x + shift * (x.roll(-1, -1) - x)
    if size >= views.BYTEWISE and not shift:
        part = image[None, :, top : top + h, left : left + w]  # of bytes torchvision's own path depends on the CPU
        x = torch.nn.functional.interpolate(part, (size, size), mode=mode.value, antialias=antialias)[0].double() / 255
    else:
        x = tv.resized_crop(x, top, left, h, w, [size, size], mode, antialias=antialias).clamp(0, 1)
    if p["flip"][i]:
        x = tv.horizontal_flip(x)
    brightness, contrast, saturation = p["factor"][i].tolist()
    steps = [
        lambda x: tv.adjust_brightness(x, brightness),
        lambda x: tv.adjust_contrast(x, contrast),
        lambda x: tv.adjust_saturation(x, saturation),
        lambda x: tv.adjust_hue(x, p["hue"][i].item()),
    ]
    order, after = p["order"][i].int().tolist(), int(p["hue_after"][i])
    for k in [*order[:after], 3, *order[after:]]:
        x = steps[k](x)
    if p["grey"][i]:
        x = tv.rgb_to_grayscale(x, 3)
    if p["sigma"][i] > 0:
        x = tv.gaussian_blur(x, [2 * max(1, size // 20) + 1] * 2, [p["sigma"][i].item()] * 2)
    return tv.solarize(x, 0.5) if p["solarize"][i] else x


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (96, 80, 72), (40, 64, 96)])
def test_a_view_is_torchvisions_image_by_image(height, width, size, bicubic):
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    pixels = random_pixels(48, height, width)
    p = draw(EVERYTHING._replace(size=size), 48, height, width, 1)
    assert all(p[k].any() and not p[k].all() for k in ("flip", "grey", "solarize")) and (p["sigma"] > 0).any()
    out = render_view(pixels, p, size, bicubic)
    want = torch.stack([reference(pixels[i], p, i, size, mode=mode) for i in range(48)])
    tolerance = 3e-5
    assert (out - want).abs().max() < tolerance
    # the tolerance would notice what it is there for
    plain = [i for i in range(48) if not p["solarize"][i]]
    shifted = torch.stack([reference(pixels[i], p, i, size, shift=0.5, mode=mode) for i in plain])
    assert (shifted - want[plain]).abs().amax((1, 2, 3)).median() > 100 * tolerance
    if size < height:
        aliased = torch.stack([reference(pixels[i], p, i, size, False, mode=mode) for i in plain])
        assert (aliased - want[plain]).abs().amax((1, 2, 3)).max() > 100 * tolerance


@pytest.mark.parametrize("bicubic", [False, True])
def test_a_crop_by_bytes_is_the_exact_one_rounded(bicubic):
    pixels = random_pixels(48, 256, 200)
    p = draw(EVERYTHING._replace(scale=(0.05, 1.0)), 48, 256, 200, 1)
    exact = views._crop(pixels, p["box"], p["flip"], 128, bicubic)
    rounded = views.crop_bytes(pixels, p["box"], p["flip"], 128, bicubic)
    error = (rounded - exact).abs() * 255
    assert error.mean() < 0.35 and (error < 1.5).double().mean() > 0.99  # of a grey level; rounding alone has .25, .5
    assert bicubic or error.max() < 1.5  # what overshoots is cut twice, as in PIL


def test_compiled_form_equals_the_eager_one():
    pixels = random_pixels(32, 80, 80)
    p = draw(EVERYTHING._replace(size=72), 32, 80, 80, 2)
    eager = render_view(pixels, p, 72)
    whole = torch.compile(render_view, backend="eager", fullgraph=True, dynamic=False)(pixels, p, 72)
    torch.testing.assert_close(whole, eager, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_cpus_views():
    pixels, recipe = random_pixels(32, 80, 80), views.Recipe((EVERYTHING, EVERYTHING))
    cpu, gpu = MultiCrop(recipe, 72), MultiCrop(recipe, 72, device="cuda")
    p = cpu.sample(32, 80, 80, np.random.default_rng(2))
    for a, b in zip(cpu.render(pixels, p), gpu.render(pixels.cuda(), p.cuda())):
        torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=0)


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, s, n, edges, swav",
    [
        ("dino", 0.14, 6, {224: 96, 64: 28, 32: 12}, False),
        ("dino-vit", 0.25, 10, {224: 96, 64: 28, 32: 12}, False),
        ("swav", 0.14, 6, {224: 96}, True),
        ("sslight-cnn", 0.3, 6, {224: 128, 64: 36, 32: 20}, False),
        ("sslight-vit", 0.3, 10, {224: 128}, False),
        ("sslight-swav", 0.3, 6, {224: 128}, True),
    ],
)
def test_the_published_recipes_and_their_proportions(name, s, n, edges, swav):
    for size, edge in edges.items():
        assert [v.size for v in MultiCrop(name, size).views] == [size] * 2 + [edge] * n
    views = MultiCrop(name, 224).views
    assert [v.scale for v in views] == [(s, 1.0)] * 2 + [(0.05, s)] * n and all(v.bicubic for v in views)
    assert [v.blur for v in views[:3]] == ([0.5] * 3 if swav else [1.0, 0.1, 0.5])
    assert [v.solarize for v in views[:3]] == ([0.0] * 3 if swav else [0.0, 0.2, 0.0])
    assert RECIPES[name].balance == ((0.4, 0.6) if "sslight" in name else None)
    assert not any(v.blur for v in MultiCrop(name, 64).views)


def test_every_knob_of_a_recipe_can_be_turned():
    base = RECIPES["sslight-cnn"]
    assert adjust(base) == base
    r = adjust(base, boundary=0.2, locals=3, global_size=160, local_size=64, blur=(0, 0.3, 1), balance=(1, 2))
    views = MultiCrop(r, 224).views
    assert [v.size for v in views] == [160, 160, 64, 64, 64] and [v.blur for v in views[:3]] == [0, 0.3, 1]
    assert views[0].scale == (0.2, 1.0) and views[2].scale == (0.05, 0.2) and r.balance == (1, 2)
    assert MultiCrop(adjust(base, blur=(1, 1, 1)), 32).views[0].blur == 1  # asked for by name, at any size
    r = adjust(base, global_scale=[0.4, 0.9], local_scale=[0.1, 0.2], solarize=[0.5, 0, 0.25], views_per_image=1)
    assert [v.scale for v in (*r.globals, r.locals[0])] == [(0.4, 0.9), (0.1, 0.2)]
    assert [v.solarize for v in (*r.globals, r.locals[0])] == [0.5, 0.25]
    r = adjust(base, local_share=4 / 7, colour=0.5)
    assert r.locals[0].share == 4 / 7 and MultiCrop(r, 70).views[-1].size == 40
    for new, old in ((r.globals[0], base.globals[0]), (r.locals[0], base.locals[0])):
        assert new.jitter == pytest.approx([0.5 * strength for strength in old.jitter])
    r = adjust(RECIPES["diet"], locals=2, views_per_image=2)
    assert [v.size for v in MultiCrop(r, 224).views] == [224, 224, 96, 96] and r.locals[0].scale == (0.05, 0.08)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"boundary": 0.2, "global_scale": (0.2, 1)}, "a boundary sets both scales"),
        ({"boundary": 0.0}, "shares of the area"),
        ({"local_scale": (0.3, 0.2)}, "the local scale 0.3 to 0.2"),
        ({"global_scale": (0.5, 1.1)}, "the global scale"),
        ({"blur": (0, 0, 2)}, "must be probabilities"),
        ({"solarize": (-0.1, 0, 0)}, "must be probabilities"),
        ({"locals": -1}, "0 or more locals"),
        ({"views_per_image": 3}, "1 or 2"),
        ({"local_size": 4}, "8 pixels or more"),
        ({"local_share": 1.5}, "local share"),
        ({"local_share": 0.5, "local_size": 8}, "local share"),
        ({"colour": 3.0}, "colour jitter"),
        ({"balance": (-1.0, 1.0)}, "weights of 0 or more"),
    ],
)
def test_any_other_knob_is_refused_in_one_line(wrong, message):
    for recipe in RECIPES.values():
        with pytest.raises(ValueError, match=message) as refusal:
            adjust(recipe, **wrong)
        assert "\n" not in str(refusal.value)


@st.composite
def knobs(draw):
    share = st.floats(0.01, 1)
    triple = st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3)
    values = {
        "views_per_image": st.integers(1, 2),
        "locals": st.integers(0, 3),
        "global_scale": st.tuples(share, share).map(sorted),
        "local_scale": st.tuples(share, share).map(sorted),
        "global_size": st.integers(8, 40),
        "local_size": st.integers(8, 40),
        "blur": triple,
        "solarize": triple,
    }
    return {name: draw(st.none() | value) for name, value in values.items()}


edges, seeds = st.integers(8, 48), st.integers(0, 2**31)


@given(st.sampled_from(list(RECIPES)), knobs(), edges, edges, st.integers(2, 6), seeds)
def test_any_views_are_in_range_and_shared_out_by_rows(name, knobs, height, width, n, seed):
    crop = MultiCrop(adjust(RECIPES[name], **knobs), min(height, width))
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, height, width), generator=g, dtype=torch.uint8)
    parameters = crop.sample(n, height, width, np.random.default_rng(seed))
    whole = crop.render(pixels, parameters)
    assert all(torch.equal(a, b) for a, b in zip(whole, crop(pixels, np.random.default_rng(seed)), strict=True))
    low, high = ((v - crop.mean) / crop.std for v in (0, 1))
    for view, p, x in zip(crop.views, map(named, parameters), whole, strict=True):
        assert x.shape == (n, 3, view.size, view.size) and x.dtype == torch.float32
        assert (x >= low - 1e-3).all() and (x <= high + 1e-3).all()
        top, left, h, w = p["box"].unbind(1)
        assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all() and view.size >= 8
    cut = n // 2
    for rows in slice(cut), slice(cut, n):
        for x, y in zip(whole, crop.render(pixels[rows], parameters[:, rows]), strict=True):
            torch.testing.assert_close(y, x[rows], rtol=1e-4, atol=1e-4)


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_crops_are_distributed_as_torchvisions():
    n, height, width, scale = 4000, 60, 90, (0.2, 1.0)
    box = draw(View(scale=scale, size=32), n, height, width, 0)["box"]
    torch.manual_seed(0)
    crop = RandomResizedCrop(32, scale)
    image = torch.empty(3, height, width)
    want = torch.tensor([crop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]).float()
    for f in (lambda b: b, lambda b: b[:, 2:].prod(1), lambda b: (b[:, 2] / b[:, 3]).log()):
        a, b = f(box), f(want)
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * b.std(0) * math.sqrt(2 / n)).all()
        assert ((a.std(0) / b.std(0) - 1).abs() < 0.1).all()


def test_the_other_parameters_are_distributed_as_the_recipe_says():
    n, view = 20_000, View(size=96, jitter=(0.4, 1.3, 0.2, 0.1), solarize=0.3)
    p = draw(view, n, 96, 96, 0)
    jittered, blurred = p["hue"] != 0, p["sigma"] > 0
    due = [p["flip"], p["grey"], p["solarize"], blurred, jittered]
    torch.testing.assert_close(
        torch.stack(due).float().mean(1), torch.tensor([0.5, 0.2, 0.3, 0.5, 0.8]), atol=0.02, rtol=0
    )
    orders = p["order"] @ torch.tensor([36.0, 12.0, 4.0]) + p["hue_after"]
    assert (orders.unique(return_counts=True)[1] / n - 1 / 24).abs().max() < 0.01 and len(orders.unique()) == 24
    assert (p["factor"][~jittered] == 1).all()
    ranges = [(p["factor"][jittered, k], max(0, 1 - s), 1 + s) for k, s in enumerate(view.jitter[:3])]
    for values, low, high in [*ranges, (p["hue"][jittered], -0.1, 0.1), (p["sigma"][blurred], 0.1, 2.0)]:
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_erased_boxes_are_distributed_as_torchvisions_and_nothing_else_changes():
    view = RECIPES["diet"].globals[0]._replace(size=32, erase=0.5)
    box = draw(view, 4000, 32, 32)["erased"]
    some = box[box[:, 2] > 0]
    assert abs(len(some) / 4000 - 0.5) < 0.03
    image = torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    theirs = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(2000)]
    theirs = torch.tensor(theirs).float()
    for k in range(4):  # top, left, height, width: medians and spreads
        assert abs(some[:, k].mean() - theirs[:, k].mean()) < 0.8 and abs(some[:, k].std() - theirs[:, k].std()) < 0.5
    x = torch.rand(4000, 3, 32, 32) + 1
    y = views.erase(x, box)
    for i in range(20):
        top, left, h, w = box[i].int().tolist()
        want = x[i].clone()
        want[:, top : top + h, left : left + w] = 0
        assert torch.equal(y[i], want)


def test_diets_strengths_are_cumulative():
    crop = [MultiCrop(f"diet{k}", 32) for k in ("-0", "-1", "-2", "")]
    assert all(len(c.views) == 1 for c in crop)
    pixels, g = random_pixels(64, 32, 32), np.random.default_rng(0)
    plain = (pixels / 255 - crop[0].mean) / crop[0].std
    torch.testing.assert_close(crop[0](pixels, g)[0], plain)
    parameters = [named(c.sample(4000, 32, 32, g)[0]) for c in crop]
    names = ("erased", "sigma", "grey", "hue", "flip")
    on = [[bool((p[name] != 0).any()) for name in names] for p in parameters]
    assert on == [[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3, [True] * 5]
    assert abs((parameters[3]["sigma"] > 0).double().mean() - 0.2) < 0.03
    assert abs((parameters[3]["hue"] != 0).double().mean() - 0.3) < 0.03
    kernel = views.blur_matrix(torch.tensor([1.5]), 224, 1)[0, 100]
    assert kernel.count_nonzero() == 3  # of 3 pixels at any size


def test_a_crop_is_legal_where_no_try_is():
    box = draw(View(scale=(0.9, 1.0), size=32), 50, 8, 64)["box"]
    assert (box == torch.tensor([0.0, 26.0, 8.0, 11.0])).all()  # round(8 * 4 / 3) = 11 columns in the middle
