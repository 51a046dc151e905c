"""kNN, probe, few-shot and fine-tuning against references, and the table that linear_eval.py makes of them."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import all_refused, call, save_png
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import linear_eval
from checkpoint import load_backbone, save_backbone
from data import decoded, load_images, make_shapes
from linear_eval import balanced_rows, extract, few_shot, fit_logistic, knn_accuracy, linear_probe, listed_rows, measure
from models import SPACES, build_backbone

CPU = torch.device("cpu")
FACTS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
seeds = st.integers(0, 2**31 - 1)


@st.composite
def labelled(draw, least=1):
    """(features (N, F), labels (N,) of C classes, each of `least` images or more)"""
    counts = draw(st.lists(st.integers(least, 6), min_size=2, max_size=5))
    g = torch.Generator().manual_seed(draw(seeds))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=g)]
    return torch.randn(len(labels), draw(st.integers(2, 6)), generator=g, dtype=torch.double), labels


# ---- measures of given features -------------------------------------------------------------------------------------


@given(labelled(), st.integers(1, 40), st.floats(0.05, 1), st.integers(1, 7), seeds)
def test_knn_is_what_numpy_says_and_takes_no_notice_of_order_or_length(bank, k, temperature, chunk, seed):
    h, labels = bank
    g = torch.Generator().manual_seed(seed)
    query, answers = torch.randn(9, h.shape[1], generator=g).double(), torch.randint(0, 5, (9,), generator=g)
    a, b = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (query, h))
    right = 0
    for similarity, answer in zip(a @ b.T, answers.tolist()):
        votes = np.zeros(5)
        for i in np.argsort(-similarity)[:k]:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        second, first = np.sort(votes)[-2:]
        assume(first - second > 1e-4 * first)  # no tie
        right += votes.argmax() == answer
    got = knn_accuracy(h.float(), labels, query.float(), answers, k, temperature, chunk)
    assert got == pytest.approx(right / 9)
    nearest = labels[torch.from_numpy((a @ b.T).argmax(1))]
    assert knn_accuracy(h, labels, query, answers, k, 1e-4) == (nearest == answers).sum().item() / 9  # no overflow
    order = torch.randperm(len(h), generator=g)
    assert got == knn_accuracy(3 * h[order], labels[order], query / 7, answers, k, temperature)


@given(labelled(least=2), st.sampled_from(linear_eval.DECAYS[:3]), seeds)
def test_a_probe_is_where_the_gradient_of_the_penalised_loss_vanishes_in_numpy(data, decay, seed):
    h, labels = data
    classes, scale = int(labels.max()) + 1, 1 + torch.rand(h.shape[1], 1, dtype=torch.double)
    start = torch.randn(h.shape[1], classes, dtype=torch.double), torch.randn(classes, dtype=torch.double)
    weight, bias = fit_logistic(h, labels, *start, decay, scale)
    x, y = h.numpy(), np.eye(classes)[labels]
    p = np.exp(x @ weight.numpy() + bias.numpy())
    error = (p / p.sum(1, keepdims=True) - y) / len(x)
    np.testing.assert_allclose(x.T @ error + decay * weight.numpy(), 0, atol=3e-3)
    np.testing.assert_allclose(error.sum(0), 0, atol=3e-3)


def test_probe_separates_what_is_separable_and_chooses_by_held_out_training_images():
    g = torch.Generator().manual_seed(0)
    y, y_test = torch.arange(600) % 3, torch.arange(300) % 3
    centres = torch.randn(3, 8, generator=g) * 4
    x, x_test = (centres[t] + torch.randn(len(t), 8, generator=g) for t in (y, y_test))
    good = linear_probe(x, y, x_test, y_test)
    assert good["linear"] > 0.98 and good["held_out"] > 0.95
    x[:, 7], x_test[:, 7] = 2.0, 2.0  # one is dead
    rescaled = linear_probe(x * 100 + 7, y, x_test * 100 + 7, y_test)
    assert rescaled["linear"] > 0.98
    noise, noise_test = torch.randn(600, 8, generator=g), torch.randn(300, 8, generator=g)
    bad, other = (linear_probe(noise, y, noise_test, t) for t in (y_test, y_test.roll(1)))
    assert 0.2 < bad.pop("linear") < 0.47
    other.pop("linear")
    assert bad == other  # whatever the test images say


@given(labelled(least=2), st.floats(0.01, 1), seeds)
def test_labels_are_drawn_evenly_and_the_same_way_again(data, fraction, seed):
    _, labels = data
    classes = int(labels.max()) + 1
    rows = balanced_rows(labels, fraction, seed)
    assert torch.equal(rows, balanced_rows(labels, fraction, seed)) and len(rows.unique()) == len(rows)
    counts, most = labels[rows].bincount(minlength=classes), labels.bincount()
    short = counts == most  # has no more to give
    assert (counts >= 1).all() and (counts <= most).all()
    assert short.all() or counts[~short].max() - counts[~short].min() <= 1
    assert short.any() or len(rows) == max(classes, round(fraction * len(labels)))
    many = torch.arange(1000) % 10
    assert not torch.equal(balanced_rows(many, 0.1, seed), balanced_rows(many, 0.1, seed + 1))


@given(labelled(least=3), st.integers(1, 3), st.integers(1, 5), seeds)
def test_few_shot_is_the_nearest_class_mean_in_numpy(data, shots, draws, seed):
    h, labels = data
    g = torch.Generator().manual_seed(seed)
    query, answers = torch.randn(20, h.shape[1], generator=g, dtype=torch.double), torch.randint(0, 5, (20,))
    mean, half = few_shot(h, labels, query, answers, shots, draws, seed)
    g.manual_seed(seed)
    right = []
    for _ in range(draws):
        classes = [h[labels == c] for c in range(int(labels.max()) + 1)]
        support = np.stack([of[torch.randperm(len(of), generator=g)[:shots]].numpy() for of in classes])
        centre = support.mean((0, 1))
        unit = [[(v - centre) / np.linalg.norm(v - centre) for v in of] for of in support]
        means = [np.mean(u, 0) / np.linalg.norm(np.mean(u, 0)) for u in unit]
        guess = [np.argmax([m @ (q - centre) for m in means]) for q in query.numpy()]
        right.append(np.mean(guess == answers.numpy()))
    assert mean == pytest.approx(np.mean(right))
    assert math.isnan(half) if draws == 1 else half == pytest.approx(1.96 * np.std(right, ddof=1) / draws**0.5)
    with pytest.raises(ValueError, match="7 shots: the smallest class has"):
        few_shot(h, labels, query, answers, 7, draws, seed)


# ---- measures of a network ------------------------------------------------------------------------------------------


def test_features_are_those_of_normalised_images_in_eval_mode_and_ranks_share_the_work(monkeypatch):
    backbone, images = build_backbone("resnet18", "small", 0.0625)[0].train(), make_shapes(10)
    rows = torch.tensor([7, 2, 2, 9, 0])
    h = extract(backbone, images.pixels, **FACTS, device=CPU, batch_size=2, rows=rows)
    x = torchvision.transforms.functional.normalize(images.pixels[rows] / 255, **FACTS)
    torch.testing.assert_close(h, backbone.eval()(x).detach())
    mirrored = extract(backbone, images.pixels, **FACTS, device=CPU, crop=lambda batch: [batch.flip(3) / 255])
    torch.testing.assert_close(mirrored, backbone(images.pixels.flip(3) / 255).detach())
    shares = []
    monkeypatch.setattr(linear_eval, "gather", lambda part: shares.append(part) or part[None])
    for rank in range(3):
        monkeypatch.setattr(linear_eval, "ranks", lambda rank=rank: (rank, 3))
        extract(backbone, images.pixels, **FACTS, device=CPU, rows=rows)
    assert [len(part) for part in shares] == [2, 2, 2]
    torch.testing.assert_close(torch.cat(shares)[:5], h)


def test_a_vits_probe_sees_its_last_blocks_and_its_neighbours_the_last_alone(monkeypatch):
    seen = {}
    monkeypatch.setattr(linear_eval, "knn_accuracy", lambda bank, *_: seen.update(knn=bank))
    monkeypatch.setattr(linear_eval, "linear_probe", lambda h, *_: seen.update(h=h) or {})
    vit, images = build_backbone("vit_tiny", "small", 1 / 12)[0].eval(), make_shapes(8)
    images = images._replace(pixels=images.pixels[:, :, :1, :1].repeat(1, 1, 32, 32))  # one colour: so is any crop
    rows = torch.tensor([6, 1, 3])
    measure(vit, FACTS, images, images, CPU, labelled=[rows], vit_blocks=3)
    x = torchvision.transforms.functional.normalize(images.pixels[rows] / 255, **FACTS)
    assert seen["h"].shape == (3, 3 * vit.feature_dim)
    torch.testing.assert_close(seen["knn"], vit(x).detach())
    whole = seen["h"]
    measure(vit, FACTS, images, images, CPU, labelled=[rows], vit_blocks=3, augment=2)
    torch.testing.assert_close(seen["h"], whole.expand(2, -1, -1), atol=1e-4, rtol=1e-4)


def test_no_measure_changes_the_backbone_and_each_uses_its_own_labels(monkeypatch):
    backbone = build_backbone("resnet18", "small", 0.0625)[0].train()
    before = copy.deepcopy(backbone.state_dict())
    train, test = make_shapes(200, 16), make_shapes(100, 16, seed=1)
    few = balanced_rows(train.labels, 0.4)
    how = {"augment": 2, "shots": [1, 3], "draws": 2, "finetune_lr": [0.03, 0.1], "finetune_epochs": 2}
    rows = measure(backbone, FACTS, train, test, CPU, labelled=[None, few, few[::9]], **how)
    assert [(r["labels"], r["images"]) for r in rows] == [(200, 200), (80, 200), (9, 200)]
    assert [r["3-shot"] is None for r in rows] == [False, False, True] and all("finetuned" in r for r in rows)
    assert backbone.training and all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())

    used = []
    network = nn.Sequential(backbone, nn.Identity())
    monkeypatch.setattr(linear_eval, "classifier", lambda *a, **_: used.append(a[3]) or network)
    linear_eval.finetune(backbone, FACTS, train, few, test, CPU, [0.1, 0.2], 1)
    assert sorted(map(len, used)) == [64, 64, 80] and all(set(u.tolist()) <= set(few.tolist()) for u in used)


def test_a_classifier_fits_its_images_and_starts_from_the_backbone():
    torch.manual_seed(0)
    backbone, images, rows = build_backbone("resnet18", "small", 0.125)[0], make_shapes(20, 16), torch.arange(20)
    started = linear_eval.classifier(backbone, FACTS, images, rows, 0.0, 1, CPU)
    assert all(torch.equal(a, b) for a, b in zip(started[0].parameters(), backbone.parameters()))
    assert not started[1].weight.any() and not started[1].bias.any()
    network = linear_eval.classifier(backbone, FACTS, images, rows, 0.1, 60, CPU)
    assert linear_eval.network_accuracy(network, FACTS, images, rows, CPU) > 0.9  # by chance .1


def test_files_that_a_stream_could_not_decode_are_not_measured(tmp_path):
    for i, image in enumerate(make_shapes(120, 16).pixels):
        save_png(image, tmp_path / ("train" if i < 80 else "test") / str(i % 2) / f"{i}.png")
    train, test = (load_images(str(tmp_path), split, 16, budget_gb=1e-9) for split in ("train", "test"))
    for file in (*train.pixels.files[10:20], *test.pixels.files[:4]):
        Path(file).write_text("no image")
    assert decoded(train.pixels, torch.arange(80)).all()  # nobody has looked yet
    backbone, _ = build_backbone("resnet18", "small", 1 / 32)
    row = measure(backbone, FACTS, train, test, CPU, knn_k=5, shots=[35])[0]
    assert row["labels"] == 70 and row["35-shot"] is None  # one class has 30 left
    assert (36 * row["linear"]).is_integer() and (36 * row["knn"]).is_integer()
    assert (~decoded(train.pixels, torch.arange(80))).nonzero()[:, 0].tolist() == list(range(10, 20))
    assert decoded(test.pixels, torch.tensor([3, 4])).tolist() == [False, True]


def test_a_plain_torchvision_file_is_measured_too(tmp_path):
    theirs = torchvision.models.mobilenet_v2()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, facts = load_backbone(str(tmp_path / "theirs.pth"), "mobilenet_v2")
    assert facts["stem"] == "imagenet" and facts["mean"] == (0.485, 0.456, 0.406)
    assert all(v.equal(theirs.state_dict()[k]) for k, v in ours.state_dict().items())


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_list_of_labelled_images_names_them(tmp_path):
    for name in ("a/1", "a/2", "b/1", "b/3"):
        save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "data" / "train" / f"{name}.png")
    images, file = load_images(str(tmp_path / "data")), tmp_path / "list.txt"
    assert images.names == ["train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/3.png"]
    file.write_text("3.png\ntrain/a/1.png\n\n")
    assert listed_rows(str(file), images).tolist() == [3, 0]
    for text, message in [("3.png\n4.png", "line 2: '4.png' .* is none"), ("1.png", "is 2 of them"), ("", "no image")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            listed_rows(str(file), images)


def test_several_data_sets_and_shares_of_labels_come_in_one_table(pretrained, tmp_path, capsys):
    for split, n in ("train", 12), ("test", 6):
        for i, image in enumerate(make_shapes(n, 32, seed=n).pixels):
            save_png(image, tmp_path / "mine" / split / f"class{i % 3}" / f"{i}.png")
    weights = pretrained / "backbone.pth"
    before = weights.read_bytes()
    flags = f"--weights {weights} --data shapes {tmp_path}/mine --max-images 100 --output-dir {tmp_path}"
    flags += " --shots 2 3 --draws 3 --label-fraction 1 0.5 --finetune --finetune-lr 0.1 --finetune-epochs 1"
    rows = call(linear_eval, *flags.split())
    assert [(r["data"], r["network"], r["labels"]) for r in rows] == [
        (data, network, n)
        for data, counts in (("shapes", (100, 50)), ("mine", (12, 6)))
        for network in ("pre-trained", "untrained")
        for n in counts
    ]
    table = (tmp_path / "linear_eval-shapes-mine.md").read_text()
    assert table in capsys.readouterr().out and len(table.splitlines()) == 4 + 8
    assert weights.read_bytes() == before
    header, _, *_, last = ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:])
    cells, row = dict(zip(header, last, strict=True)), rows[-1]
    assert [cells[c] for c in ("data", "network", "labels")] == ["mine", "untrained", "6 (50 %)"]
    assert [cells[c] for c in ("kNN", "linear")] == [f"{100 * row[key]:.2f}" for key in ("knn", "linear")]
    assert cells["2-shot"] == "{:.2f} ± {:.2f}".format(*(100 * v for v in row["2-shot"]))
    assert cells["3-shot"] == "too few labels" and cells["fine-tuned"] == f"{100 * row['finetuned']:.2f} (lr 0.1)"
    assert cells["chosen"].startswith(f"decay {row['weight_decay']:g}: {100 * row['held_out']:.2f}")


def test_wrong_measurements_are_told_in_one_line(pretrained, tmp_path, capsys):
    base = ["--weights", pretrained / "backbone.pth", "--output-dir", tmp_path / "out", "--max-images", 100]
    (tmp_path / "list.txt").write_text("nothing.png")
    table = [
        (["--label-fraction", 2], "--label-fraction: shares"),
        (["--label-list", tmp_path / "list.txt", "--label-fraction", 0.1], "leave one out"),
        (["--label-list", tmp_path / "no.txt"], "No such file"),
        (["--shots", 0], "--shots must be above 0"),
    ]
    all_refused(capsys, linear_eval, base, table)
    assert not list((tmp_path / "out").glob("*"))


# ---- features, programs and pictures --------------------------------------------------------------------------------


@pytest.fixture
def searched(tmp_path):
    """The weights of a network that a search might find, and a folder of images with one broken file."""
    space = SPACES["resnetk1"]
    arch = space.arch([5 * stage % len(space.options) for stage in space.stages])
    torch.manual_seed(0)
    backbone, _ = build_backbone(arch, "small", 0.125)
    facts = {"arch": arch, "width": 0.125, "stem": "small", "mean": [0.5] * 3, "std": [0.25] * 3}
    save_backbone(backbone, facts, tmp_path)
    pixels = make_shapes(12, 16).pixels
    for n, image in enumerate(pixels):
        save_png(image, tmp_path / "photos" / "abc"[n % 3] / f"{n}.png")
    (tmp_path / "photos" / "b" / "broken.png").write_bytes(b"no image")
    return tmp_path, backbone.eval(), pixels


def test_features_of_a_folder_are_the_backbones_by_path(searched, capsys):
    folder, backbone, pixels = searched
    flags = ["--weights", folder / "backbone.pth", "--embed", folder / "photos", "--device", "cpu"]
    assert call(linear_eval, *flags) == []
    found = np.load(folder / "embed-photos.npz")
    rows = [int(Path(path).stem) for path in found["paths"]]
    assert sorted(rows) == list(range(12)) and found["paths"][0].startswith("a/")
    with torch.no_grad():
        expected = backbone((pixels[rows].float() / 255 - 0.5) / 0.25)
    np.testing.assert_allclose(found["features"], expected, rtol=1e-4, atol=1e-5)
    lines = (folder / "embed-photos.csv").read_text().splitlines()
    assert len(lines) == 13 and lines[0].startswith("path,f0,f1,")
    values = np.array([line.split(",")[1:] for line in lines[1:]], float)
    np.testing.assert_allclose(values, found["features"], rtol=1e-6)
    assert "12 images of 13" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_a_program_gives_what_the_backbone_gives(searched, ending):
    folder, backbone, pixels = searched
    if ending == "onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    path = folder / f"program.{ending}"
    call(linear_eval, "--weights", folder / "backbone.pth", "--export", path, "--image-size", 16, "--device", "cpu")
    for images in (pixels[:1].float() / 255, pixels[:7].float() / 255):
        with torch.no_grad():
            expected = backbone((images - 0.5) / 0.25)
            if ending == "pt2":
                got = torch.export.load(path).module()(images)
            else:
                got = torch.tensor(runtime.InferenceSession(path).run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_neighbours_and_maps_are_drawn_without_labels_too(searched, capsys):
    folder, _, _ = searched
    flags = ["--weights", folder / "backbone.pth", "--data", folder / "photos", "--device", "cpu"]
    assert call(linear_eval, *flags) == []
    assert "no labels to measure with: pictures alone" in capsys.readouterr().out
    assert Image.open(folder / "map-photos.png").width == 2 * 580
    assert Image.open(folder / "neighbours-photos.png").width > 600
    assert not list(folder.glob("*.md"))


def test_two_images_are_enough_for_pictures(tmp_path):
    images = make_shapes(2, 16)._replace(classes=[])
    networks = {"a": build_backbone("resnet18", "small", 0.0625)[0]}
    linear_eval.save_pictures(networks, FACTS, images, None, tmp_path, "two", CPU)
    assert (tmp_path / "map-two.png").exists() and (tmp_path / "neighbours-two.png").exists()


def test_the_nearest_image_is_shown_first(tmp_path):
    pixels = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8) * 60
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    queries = torch.tensor([[0.1, 3.0]])
    linear_eval.save_neighbours(pixels, pixels[:1], {"a": (bank, queries)}, tmp_path / "n.png")
    drawn = np.asarray(Image.open(tmp_path / "n.png"))[58]
    left = 56 + 2 * 18
    assert [int(drawn[left + k * 58 + 20, 0]) for k in range(4)] == [60, 180, 0, 120]
