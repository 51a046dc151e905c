"""Images from every kind of file, resident and streamed, whatever is broken; batches of a run."""

import io
import json
import os
import random
from functools import cache

import numpy as np
import pytest
import torch
from conftest import save_png
from PIL import Image
from torchvision import datasets

import data
from data import ALPHAS, ORDER, Batches, Stream, channel_stats, load_images, make_shapes
from views import MultiCrop


def test_normalisation_centres_the_data():
    images = make_shapes(500)
    mean, std = channel_stats(images.pixels)
    x = (images.pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert x.mean((0, 2, 3)).abs().max() < 1e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_shapes_are_seeded_balanced_and_not_told_by_colour_or_pixel():
    train, test = load_images("shapes"), load_images("shapes", "test")
    assert train.pixels.shape == (3000, 3, 32, 32) and train.pixels.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [300] * 10 and len(train.classes) == 10
    again, other = make_shapes.__wrapped__(50, seed=7), make_shapes(50, seed=8)
    assert torch.equal(make_shapes(50, seed=7).pixels, again.pixels) and not torch.equal(again.pixels, other.pixels)

    def nearest(f):
        a, b = f(train.pixels.float()), f(test.pixels.float())
        return (train.labels[torch.cdist(b, a).argmin(1)] == test.labels).double().mean()

    assert nearest(lambda x: x.mean((2, 3))) < 0.2  # colour
    coarse = torch.nn.AvgPool2d(4)
    assert nearest(lambda x: coarse(x.mean(1)).flatten(1)) < 0.3  # place and size


# ---- files ----------------------------------------------------------------------------------------------------------


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


def encoded(image, kind, **more):
    stored = io.BytesIO()
    image.save(stored, kind, **more)
    return stored.getvalue()


def overwritten(stored):
    rng = random.Random(stored)
    place = rng.randrange(len(stored))
    return stored[:place] + rng.randbytes(rng.randint(0, 64)) + stored[place + 16 :]


@cache
def blank(edge):
    """Kilobytes on the disk, whatever its edge."""
    return encoded(Image.new("1", (edge, edge)), "PNG")


WAYS = {  # what becomes of a JPEG file, from its image and its bytes; whether it can be shown, None as it happens
    "cut": (lambda image, stored: stored[: len(stored) // 2], False),
    "empty": (lambda image, stored: b"", False),
    "text": (lambda image, stored: b"not an image\n" * 20, False),
    "overwritten": (lambda image, stored: overwritten(stored), None),
    "extension": (lambda image, stored: encoded(image, "PNG"), True),
    "CMYK": (lambda image, stored: encoded(image.convert("CMYK"), "JPEG"), True),
    "animated": (lambda image, stored: encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]), True),
    "1x1": (lambda image, stored: encoded(image.resize((1, 1)), "PNG"), False),
    "20000x3": (lambda image, stored: encoded(image.resize((20_000, 3)), "PNG"), False),
    "large": (lambda image, stored: blank(10_000), False),
    "bomb": (lambda image, stored: blank(14_000), False),
}


@pytest.mark.filterwarnings("ignore")  # of PIL
@pytest.mark.parametrize("streamed", [False, True])
def test_of_files_that_are_broken_or_odd_each_is_shown_or_named_once(streamed, tmp_path, capfd):
    pixels = make_shapes(600, 24).pixels.permute(0, 2, 3, 1).numpy()
    files = [tmp_path / f"{i:03}.jpg" for i in range(600)]
    ways = dict(zip(range(0, 600, 6), list(WAYS) * 4 + ["overwritten"] * 56))
    for i, file in enumerate(files):
        image = Image.fromarray(pixels[i])
        stored = encoded(image, "JPEG", quality=95)
        file.write_bytes(WAYS[ways[i]][0](image, stored) if i in ways else stored)
    images = load_images(str(tmp_path), size=24, budget_gb=1e-9 if streamed else 16, workers=3)
    got = images.pixels[:]
    said = capfd.readouterr().err
    named = {line.split()[1][:-1] for line in said.splitlines() if line.startswith("skipped ")}
    assert said.count("skipped /") == len(named) >= 28
    for reason in ("an edge of fewer than 8 pixels", "ValueError: 10000 x 10000 pixels", "DecompressionBombError"):
        assert said.count(reason) >= 4
    assert isinstance(images.pixels, Stream) == streamed and len(got) == 600 - (0 if streamed else len(named))
    if not streamed:
        assert f"skipped {len(named)} of 600 files" in said
        assert images.names == [file.name for file in files if str(file) not in named]
    for name, x in zip(images.names, got.permute(0, 2, 3, 1).numpy()):
        i = int(name[:3])
        shown = WAYS[ways[i]][1] if i in ways else True
        assert shown is None or shown != (str(files[i]) in named)
        if shown:  # it is the image
            assert abs(x - pixels[i].astype(float)).mean() < 15, (name, ways.get(i))


def test_what_does_not_fit_is_streamed_and_reads_the_same(folder, capsys):
    path, _ = folder
    whole, few = (load_images(str(path), size=8, budget_gb=gb) for gb in (16, 1e-9))
    assert isinstance(few.pixels, Stream) and "are decoded as they are needed" in capsys.readouterr().err
    assert few.pixels.shape == whole.pixels.shape and few.labels.equal(whole.labels) and few[2:] == whole[2:]
    rows = torch.tensor([3, 0, 6, 3])
    assert few.pixels[rows].equal(whole.pixels[rows]) and few.pixels[::2].equal(whole.pixels[::2])
    batches = [rows, rows.flip(0), rows[:1]]
    for got, want in zip(data.in_turn(few.pixels, batches), batches, strict=True):
        assert got.equal(whole.pixels[want])
    assert channel_stats(few.pixels) == channel_stats(whole.pixels) and not few.pixels.asked
    for i in range(9):  # what was asked for in vain does not stay
        few.pixels.ahead((rows + i) % 7)
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


def test_resize_is_antialiased_and_keeps_the_centre(tmp_path):
    ramp = np.tile(np.arange(0, 240, dtype=np.uint8)[None, :, None], (120, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    pixels = load_images(str(tmp_path), size=60).pixels[0, 0].double()
    assert pixels.shape == (60, 60)
    np.testing.assert_allclose(pixels.mean(0), 60.5 + 2 * np.arange(60), atol=1)


def test_what_cannot_be_loaded_says_what_to_do(folder, monkeypatch):
    path, rgb = folder
    with pytest.raises(ValueError, match=r"GB in memory.*--image-size"):  # streams need a size
        load_images(str(path), budget_gb=1e-9)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path / "train" / "dog" / "small.png")
    with pytest.raises(ValueError, match=r"differ in size \(12 x 12, 9 x 9.*--image-size"):
        load_images(str(path))
    assert load_images(str(path), size=8).pixels.shape == (8, 3, 8, 8)
    for file in (path / "train").rglob("*.*"):
        file.write_text("nothing")
    with pytest.raises(ValueError, match="none of the 8 files"):
        load_images(str(path))
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


def test_an_item_of_a_data_set_that_cannot_be_decoded_is_skipped_with_its_label(monkeypatch, capsys):
    items = [(Image.new("RGB", (8 if i != 2 else 4, 8), (i, 0, 0)), i) for i in range(5)]
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: items)
    images = load_images("cifar10")
    assert images.labels.tolist() == images.pixels[:, 0, 0, 0].tolist() == [0, 1, 3, 4]
    assert images.names == ["0", "1", "3", "4"] and images.classes == [*"01234"]
    assert "skipped item 2: ValueError: 4 x 8 pixels" in capsys.readouterr().err


def test_an_image_for_which_there_is_no_memory_is_not_called_broken(folder, monkeypatch, capsys):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(data, "to_pixels", no_memory)
    with pytest.raises(MemoryError):
        load_images(str(folder[0]), size=8)
    assert "skipped" not in capsys.readouterr().err


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.fixture
def make():
    """Batches of 8 of 35 of 40 images."""
    pixels, rows = make_shapes(40, 16).pixels, torch.randperm(40, generator=torch.Generator().manual_seed(0))[:35]

    def of(pixels=pixels, rows=rows, **more):
        return Batches(pixels, rows, MultiCrop("simsiam", 16), 8, torch.device("cpu"), **{"seed": 5} | more)

    return of


def same(one, other):
    (views, index), (more_views, more_index) = one, other
    return torch.equal(index, more_index) and all(torch.equal(a, b) for a, b in zip(views, more_views, strict=True))


def test_a_batch_is_a_function_of_seed_and_step_alone(make):
    steps = range(12)
    batches, another = make(), make()
    one = [batches(step) for step in steps]
    other = {step: another(step) for step in [7, 3, 3, 11, *reversed(steps)]}
    assert all(same(one[step], other[step]) for step in steps)
    views, index = one[6]
    assert index.equal(torch.from_numpy(np.random.default_rng((5, ORDER, 0, 1)).permutation(35)[16:24]))
    rows = batches.rows_of(6)
    want = batches.multi_crop(batches.pixels[rows], np.random.default_rng((5, 0, 6)))
    torch.testing.assert_close(views, want, rtol=0, atol=0)
    assert [v.is_contiguous(memory_format=torch.channels_last) for v in views] == [True, True]
    for changed in ({"seed": 6}, {"purpose": ALPHAS}):
        assert not same(make(**changed)(6), one[6])


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_shows_each_image_once_at_most(shuffle, make):
    batches = make(shuffle=shuffle)
    assert batches.steps_per_epoch == 4
    epochs = [torch.cat([batches(step)[1] for step in range(4 * e, 4 * e + 4)]) for e in range(3)]
    for e, index in enumerate(epochs):
        assert len(index.unique()) == 32 and index.max() < 35
        assert index.equal(torch.arange(32)) == (not shuffle)
        shown = torch.cat([batches.rows_of(step) for step in range(4 * e, 4 * e + 4)])
        assert shown.equal(batches._rows[index])
    assert epochs[0].equal(epochs[1]) == (not shuffle)


def test_two_ranks_see_the_halves_of_what_one_would(make, monkeypatch):
    whole = [make()(step) for step in range(6)]
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(data.dist, "get_rank", lambda rank=rank: rank)
        batches, half = make(), slice(4 * rank, 4 * rank + 4)
        for step, (views, index) in enumerate(whole):
            share, places = batches(step)
            assert places.equal(index[half]) and len(batches.rows_of(step)) == 8
            torch.testing.assert_close(share, [v[half] for v in views], rtol=1e-5, atol=1e-6)


def test_a_stream_gives_the_bits_of_resident_images_and_is_a_step_ahead(make, tmp_path):
    for i, image in enumerate(make_shapes(40, 16).pixels):
        save_png(image, tmp_path / f"{i:02}.png")
    resident, stream = make(), make(Stream(sorted(map(str, tmp_path.iterdir())), 16))
    for step in (0, 1, 2, 3, 4, 5, 2):
        assert same(stream(step), resident(step))
        assert resident.rows_of(step + 1).numpy().tobytes() in stream.pixels.asked  # over the end of an epoch too


def test_a_linked_folder_is_read_once(tmp_path):
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "inner" / "a.png")
    (tmp_path / "photos" / "inner" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "photos").symlink_to(tmp_path / "photos")
    assert len(data.image_files(tmp_path / "photos")) == len(data.image_files(tmp_path / "linked")) == 1


# ---- decoded pixels that are kept -----------------------------------------------------------------------------------


def test_kept_pixels_are_those_of_the_files_whatever_happens_to_either(tmp_path, monkeypatch, capfd):
    """Mapped where nothing has changed; decoded anew for a changed, an added or a removed image, a cut or missing file
    of pixels and nonsense beside it; and without them on a full disk."""
    monkeypatch.setattr(data, "CACHED", 1)
    rng, photos, cache = np.random.default_rng(0), tmp_path / "photos", str(tmp_path / "kept")
    photos.mkdir()

    def write(name):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(photos / name)

    for k in range(6):
        write(f"{k}.png")
    (photos / "broken.png").write_bytes(b"nothing")
    (photos / "nowhere.png").symlink_to(tmp_path / "gone.png")
    reads = []
    read_all = data.Stream.read_all
    monkeypatch.setattr(data.Stream, "read_all", lambda stream: reads.append(1) or read_all(stream))

    def load(size=8):
        images = load_images(str(photos), size=size, cache=cache)
        expected = load_images(str(photos), size=size)
        assert torch.equal(images.pixels, expected.pixels) and images.names == expected.names
        decoded = len(reads) - 1  # but for the one to compare with
        reads.clear()
        return decoded

    assert [load(), load(), load(9), load(9)] == [1, 0, 1, 0]
    (pixels,), (facts,) = (list((tmp_path / "kept").glob(f"*-8-*.{ending}")) for ending in ("pixels", "json"))
    changes = [
        lambda: write("2.png"),
        lambda: write("7.png"),
        lambda: (photos / "1.png").unlink(),
        lambda: pixels.write_bytes(pixels.read_bytes()[:-1]),
        lambda: pixels.unlink(),
        lambda: facts.write_text("{"),
        lambda: facts.write_text("[]"),
    ]
    for change in changes:
        change()
        assert [load(), load()] == [1, 0]
    mapped = load_images(str(photos), size=8, cache=cache).pixels
    mapped.zero_()  # stays with us
    assert load() == 0
    write("2.png")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert [load(), load()] == [1, 1]
    assert "not kept" in capfd.readouterr().err and not list((tmp_path / "kept").glob("*.tmp"))
