"""Images from every kind of file, and views held to torchvision's operations image by image."""

import json
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torchvision import datasets
from torchvision.transforms import InterpolationMode, RandomErasing, RandomResizedCrop

import data
import views
from data import channel_stats, load_images, make_shapes
from views import (
    BYTEWISE,
    RECIPES,
    MultiCrop,
    Recipe,
    View,
    _crop,
    adjust,
    crop_bytes,
    named,
    render_view,
    sample_views,
)

EVERYTHING = View(scale=(0.05, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=0.9, grey=0.2, blur=0.5, solarize=0.3)


def draw(view, n, height, width, seed=0):
    """`named` parameters of one view of n images."""
    rng = np.random.default_rng(seed)
    return named(torch.from_numpy(sample_views([view], n, height, width, rng))[0])


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
    if size >= BYTEWISE and not shift:
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
    exact = _crop(pixels, p["box"], p["flip"], 128, bicubic)
    rounded = crop_bytes(pixels, p["box"], p["flip"], 128, bicubic)
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
    pixels, recipe = random_pixels(32, 80, 80), Recipe((EVERYTHING, EVERYTHING))
    cpu, gpu = MultiCrop(recipe, 72), MultiCrop(recipe, 72, device="cuda")
    p = cpu.sample(32, 80, 80, np.random.default_rng(2))
    for a, b in zip(cpu.render(pixels, p), gpu.render(pixels.cuda(), p.cuda())):
        torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=0)


def test_a_slice_of_the_parameters_gives_a_slice_of_the_views():
    pixels, crop = random_pixels(16, 32, 32), MultiCrop("simsiam", 32)
    p = crop.sample(16, 32, 32, np.random.default_rng(3))
    whole = crop.render(pixels, p)
    part = crop.render(pixels[4:8], p[:, 4:8])
    for a, b in zip(whole, part):
        torch.testing.assert_close(a[4:8], b, atol=1e-6, rtol=1e-5)
    again = crop(pixels, np.random.default_rng(3))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    assert not torch.equal(whole[0], whole[1])


def test_local_views_come_after_the_globals_in_their_own_size():
    recipe = Recipe((View(), View()), (View(scale=(0.05, 0.3), size=16),) * 3)
    out = MultiCrop(recipe, 32)(random_pixels(4, 32, 32), np.random.default_rng())
    assert [tuple(v.shape) for v in out] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 3
    assert MultiCrop(recipe, 32).n_globals == 2


def test_the_published_recipes_and_their_proportions():
    edges = {224: (96, 128), 64: (28, 36), 32: (12, 20)}
    for size, (baseline, ours) in edges.items():
        for name, edge, n in [("dino", baseline, 6), ("dino-vit", baseline, 10), ("sslight-cnn", ours, 6)]:
            sizes = [v.size for v in MultiCrop(name, size).views]
            assert sizes == [size] * 2 + [edge] * n
    boundary = {
        "dino": 0.14,
        "swav": 0.14,
        "dino-vit": 0.25,
        "sslight-cnn": 0.3,
        "sslight-vit": 0.3,
        "sslight-swav": 0.3,
    }
    for name, s in boundary.items():
        views = MultiCrop(name, 224).views
        assert all(v.scale == ((s, 1.0) if k < 2 else (0.05, s)) and v.bicubic for k, v in enumerate(views))
        swav = name.endswith("swav")
        assert [v.blur for v in views[:3]] == ([0.5] * 3 if swav else [1.0, 0.1, 0.5])
        assert [v.solarize for v in views[:3]] == ([0.0] * 3 if swav else [0.0, 0.2, 0.0])
        assert RECIPES[name].balance == ((0.4, 0.6) if "sslight" in name else None)
        assert not any(v.blur for v in MultiCrop(name, 64).views)


def test_every_knob_of_a_recipe_can_be_turned():
    base = RECIPES["sslight-cnn"]
    assert adjust(base) == base
    r = adjust(base, boundary=0.2, n_locals=3, global_size=160, local_size=64, blur=(0, 0.3, 1), balance=(1, 2))
    views = MultiCrop(r, 224).views
    assert [v.size for v in views] == [160, 160, 64, 64, 64] and [v.blur for v in views[:3]] == [0, 0.3, 1]
    assert views[0].scale == (0.2, 1.0) and views[2].scale == (0.05, 0.2) and r.balance == (1, 2)
    assert MultiCrop(adjust(base, blur=(1, 1, 1)), 32).views[0].blur == 1  # asked for by name, at any size
    assert adjust(base, n_locals=0).locals == ()
    r = adjust(base, global_scale=(0.4, 0.9), local_scale=(0.1, 0.2), solarize=(0.5, 0, 0.25))
    assert [v.scale for v in (r.globals[1], r.locals[0])] == [(0.4, 0.9), (0.1, 0.2)]
    assert [v.solarize for v in (*r.globals, r.locals[0])] == [0.5, 0, 0.25]
    r = adjust(RECIPES["simsiam"], n_locals=2)
    assert [v.size for v in MultiCrop(r, 224).views] == [224, 224, 96, 96] and r.locals[0].scale == (0.05, 0.2)
    for wrong, message in [
        ({"boundary": 0.2, "global_scale": (0.2, 1)}, "a boundary sets both scales"),
        ({"boundary": 0.0}, "shares of the area"),
        ({"local_scale": (0.3, 0.2)}, "the local scale 0.3 to 0.2"),
        ({"blur": (0, 0, 2)}, "must be probabilities"),
        ({"n_locals": -1}, "0 or more locals"),
        ({"local_size": 4}, "8 pixels or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            adjust(base, **wrong)


def test_crops_are_distributed_as_torchvisions():
    n, height, width, scale = 4000, 60, 90, (0.2, 1.0)
    box = draw(View(scale=scale, size=32), n, height, width, 0)["box"]
    torch.manual_seed(0)
    crop = RandomResizedCrop(32, scale)
    want = torch.tensor(
        [crop.get_params(torch.empty(3, height, width), scale, (3 / 4, 4 / 3)) for _ in range(n)]
    ).float()
    for f in (lambda b: b, lambda b: b[:, 2:].prod(1), lambda b: (b[:, 2] / b[:, 3]).log()):
        a, b = f(box), f(want)
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * b.std(0) * math.sqrt(2 / n)).all()
        assert ((a.std(0) / b.std(0) - 1).abs() < 0.1).all()


def test_the_other_parameters_are_distributed_as_the_recipe_says():
    n, view = 20_000, View(size=96, jitter=(0.4, 0.3, 0.2, 0.1), solarize=0.3)
    p = draw(view, n, 96, 96, 0)
    jittered = p["hue"] != 0
    for share, chance in [
        (p["flip"], 0.5),
        (p["grey"], 0.2),
        (p["solarize"], 0.3),
        (p["sigma"] > 0, 0.5),
        (jittered, 0.8),
    ]:
        assert share.double().mean().item() == pytest.approx(chance, abs=0.02)
    orders = p["order"] @ torch.tensor([9.0, 3.0, 1.0])
    assert (orders.unique(return_counts=True)[1] / n - 1 / 6).abs().max() < 0.02 and len(orders.unique()) == 6
    assert (p["hue_after"].long().bincount() / n - 1 / 4).abs().max() < 0.02
    assert (p["factor"][~jittered] == 1).all()
    for values, low, high in [(p["factor"][jittered, k], 1 - s, 1 + s) for k, s in enumerate(view.jitter[:3])] + [
        (p["hue"][jittered], -0.1, 0.1),
        (p["sigma"][p["sigma"] > 0], 0.1, 2.0),
    ]:
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_erased_boxes_are_distributed_as_torchvisions_and_nothing_else_changes():
    view = RECIPES["diet"].globals[0]._replace(size=32, erase=0.5)
    box = draw(view, 4000, 32, 32)["erased"]
    some = box[box[:, 2] > 0]
    assert abs(len(some) / 4000 - 0.5) < 0.03
    image, theirs = torch.zeros(3, 32, 32), []
    torch.manual_seed(0)
    for _ in range(2000):
        theirs.append(RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4])
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
    on = [
        [
            bool(p["erased"].any()),
            bool((p["sigma"] > 0).any()),
            bool(p["grey"].any()),
            bool((p["hue"] != 0).any()),
            bool(p["flip"].any()),
        ]
        for p in parameters
    ]
    assert on == [[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3, [True] * 5]
    assert abs((parameters[3]["sigma"] > 0).double().mean() - 0.2) < 0.03
    assert abs((parameters[3]["hue"] != 0).double().mean() - 0.3) < 0.03
    kernel = views.blur_matrix(torch.tensor([1.5]), 224, 1)[0, 100]
    assert kernel.count_nonzero() == 3  # of 3 pixels at any size


def test_a_crop_is_legal_where_no_try_is():
    box = draw(View(scale=(0.9, 1.0), size=32), 50, 8, 64)["box"]
    assert (box == torch.tensor([0.0, 26.0, 8.0, 11.0])).all()  # round(8 * 4 / 3) = 11 columns in the middle


def test_normalisation_centres_the_data():
    images = make_shapes(500)
    mean, std = channel_stats(images.pixels)
    x = (images.pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert x.mean((0, 2, 3)).abs().max() < 1e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


# ---- images ---------------------------------------------------------------------------------------------------------


def test_shapes_are_seeded_balanced_and_not_told_by_colour_or_pixel():
    train, test = load_images("shapes"), load_images("shapes", "test")
    assert train.pixels.shape == (4000, 3, 32, 32) and train.pixels.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [400] * 10 and len(train.classes) == 10
    again, other = make_shapes.__wrapped__(50, seed=7), make_shapes(50, seed=8)
    assert torch.equal(make_shapes(50, seed=7).pixels, again.pixels) and not torch.equal(again.pixels, other.pixels)

    def nearest(f):
        a, b = f(train.pixels.float()), f(test.pixels.float())
        return (train.labels[torch.cdist(b, a).argmin(1)] == test.labels).double().mean()

    assert nearest(lambda x: x.mean((2, 3))) < 0.2  # colour
    assert (
        nearest(lambda x: torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1)) < 0.3
    )  # place and size


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two classes of 12 px images, named by how they are stored."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(rgb).save(tmp_path / split / name / "rgb.png")
    train = tmp_path / "train" / "cat"
    Image.fromarray(rgb[..., 0]).save(train / "grey.png")
    Image.fromarray(np.dstack([rgb, rgb[..., 0]]), "RGBA").save(train / "rgba.png")
    Image.fromarray(rgb).quantize(256).save(train / "palette.png")
    Image.fromarray(rgb).convert("CMYK").save(train / "cmyk.jpg", quality=100)
    Image.fromarray(rgb[..., 1].astype(np.uint16) * 257).save(train / "sixteen.png")
    return tmp_path, rgb


def test_every_kind_of_file_becomes_rgb(folder):
    path, rgb = folder
    images = load_images(str(path))
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [0] * 6 + [1]
    pixels = dict(zip(["cmyk", "grey", "palette", "rgb", "rgba", "sixteen"], images.pixels.permute(0, 2, 3, 1).numpy()))
    assert (pixels["rgb"] == rgb).all() and (pixels["rgba"] == rgb).all() and (pixels["palette"] == rgb).all()
    assert (pixels["grey"] == rgb[..., :1]).all() and (pixels["sixteen"] == rgb[..., 1:2]).all()
    assert pixels["cmyk"].shape == (12, 12, 3)
    assert len(load_images(str(path), "test").pixels) == 2  # val/ serves where test/ is missing


def test_a_broken_file_is_named_and_skipped(folder, capsys):
    path, _ = folder
    (path / "train" / "dog" / "broken.jpg").write_text("not an image")
    (path / "train" / "dog" / "cut.png").write_bytes((path / "train" / "dog" / "rgb.png").read_bytes()[:60])
    assert len(load_images(str(path)).pixels) == 7
    said = capsys.readouterr().err
    assert "broken.jpg" in said and "cut.png" in said and "skipped 2 of 9" in said
    for file in (path / "train").rglob("*.*"):
        file.write_text("nothing")
    with pytest.raises(ValueError, match="none of the 9 files"):
        load_images(str(path))


def test_what_does_not_fit_is_streamed_and_reads_the_same(folder, capsys):
    path, _ = folder
    whole, few = (load_images(str(path), size=8, budget_gb=gb) for gb in (16, 1e-9))
    assert isinstance(few.pixels, data.Stream) and "are decoded as they are needed" in capsys.readouterr().err
    assert few.pixels.shape == whole.pixels.shape and few.labels.equal(whole.labels) and few[2:] == whole[2:]
    rows = torch.tensor([3, 0, 6, 3])
    assert few.pixels[rows].equal(whole.pixels[rows]) and few.pixels[::2].equal(whole.pixels[::2])
    batches = [rows, rows.flip(0), rows[:1]]
    for got, want in zip(data.in_turn(few.pixels, batches), batches, strict=True):
        assert got.equal(whole.pixels[want])
    assert channel_stats(few.pixels) == channel_stats(whole.pixels) and not few.pixels.asked
    for i in range(9):  # what was asked for in vain does not stay
        few.pixels.ahead(rows + i % 2)
        few.pixels.ahead(rows[: 1 + i % 3])
    assert len(few.pixels.asked) <= 4


def test_a_broken_file_of_a_stream_is_named_once_and_another_stands_in(folder, capsys):
    path, _ = folder
    stream = load_images(str(path), size=8, budget_gb=1e-9).pixels
    open(stream.files[1], "w").close()
    for _ in range(2):
        got = stream[torch.tensor([1, 2, 1])]
        assert got[0].equal(got[1]) and got[2].equal(got[1]) and got[1].equal(stream[torch.tensor([2])][0])
    assert capsys.readouterr().err.count(f"skipped {stream.files[1]}") == 1
    assert stream[torch.tensor([1])].unique().tolist() == [128] and stream.broken == {1}


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for ranks, each in (("1", 16), ("8", 2), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert data.cores() == each


def test_images_in_any_nesting_are_a_training_split_without_labels(folder):
    path, _ = folder
    images = load_images(str(path / "train"))
    assert len(images.pixels) == 7 and not images.labelled and (images.labels == -1).all()
    with pytest.raises(FileNotFoundError, match="test split"):
        load_images(str(path / "train"), "test")


def test_resize_is_antialiased_and_keeps_the_centre(tmp_path):
    ramp = np.tile(np.arange(0, 240, dtype=np.uint8)[None, :, None], (120, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    pixels = load_images(str(tmp_path), size=60).pixels[0, 0].double()
    assert pixels.shape == (60, 60)
    np.testing.assert_allclose(pixels.mean(0), 60.5 + 2 * np.arange(60), atol=1)


def test_what_cannot_be_loaded_says_what_to_do(folder, tmp_path, monkeypatch):
    path, rgb = folder
    with pytest.raises(FileNotFoundError, match="neither a folder nor a data set"):
        load_images("cifar11")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image below"):
        load_images(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"GB in memory.*--image-size"):  # streams need a size
        load_images(str(path), budget_gb=1e-9)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path / "train" / "dog" / "small.png")
    with pytest.raises(ValueError, match=r"differ in size \(12 x 12, 9 x 9.*--image-size"):
        load_images(str(path))
    assert load_images(str(path), size=8).pixels.shape == (8, 3, 8, 8)
    (path / "val" / "cow").mkdir()
    Image.fromarray(rgb).save(path / "val" / "cow" / "rgb.png")
    with pytest.raises(ValueError, match="in no class"):
        load_images(str(path), "test")

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(ConnectionError, match="could not download cifar10"):
        load_images("cifar10")


@pytest.mark.parametrize("name", data.BY_HAND)
def test_what_torchvision_does_not_download_is_to_be_put_in_place(name, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=r"put its files into|needs another package"):
        load_images(name, root=str(tmp_path))


@pytest.mark.parametrize("name", list(data.DATASETS))
def test_a_torchvision_name_asks_for_the_right_split(name, monkeypatch):
    asked = []

    class Fake(list):
        classes = ("a", "b")

        def __init__(self, root, download=False, **arguments):
            super().__init__((Image.new("L", (8, 8), v), v % 2) for v in range(6))
            asked.append(json.dumps(arguments))
            assert download == (name not in data.BY_HAND)

    monkeypatch.setattr(datasets, data.DATASETS[name][0], Fake)
    train, test = load_images(name), load_images(name, "test", limit=4)
    assert train.labels.tolist() == [0, 1] * 3 and len(test.pixels) == 4
    assert (test.pixels[:, 0, 0, 0] % 2 == test.labels).all()  # a subset keeps its labels
    assert asked[0] != asked[1]
