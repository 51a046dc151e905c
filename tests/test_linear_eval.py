"""kNN, probe, few-shot and fine-tuning against references, and the table that linear_eval.py makes of them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import refused
from PIL import Image
from torch import nn

import launch
import linear_eval
from checkpoint import load_backbone
from data import decoded, load_images, make_shapes
from linear_eval import balanced_rows, extract, few_shot, get_parser, knn_accuracy, linear_probe, listed_rows, measure
from losses import METHODS
from models import build_backbone


def test_knn_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    bank, query = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 40)
    right = 0
    for q, y in zip(query, truth):
        cosine = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
        votes = np.zeros(4)
        for i in np.argsort(-cosine)[:7]:
            votes[labels[i]] += np.exp(cosine[i] / 0.1)
        right += votes.argmax() == y
    t = [torch.tensor(a) for a in (bank, labels, query, truth)]
    assert knn_accuracy(*t, k=7, temperature=0.1, chunk=16) == pytest.approx(right / 40)
    assert knn_accuracy(*t, k=200) == knn_accuracy(*t, k=60)


def test_probe_separates_what_is_separable_and_is_blind_to_noise():
    g = torch.Generator().manual_seed(0)
    y, y_test = torch.arange(600) % 3, torch.arange(300) % 3
    centres = torch.randn(3, 8, generator=g) * 4
    x, x_test = (centres[t] + torch.randn(len(t), 8, generator=g) for t in (y, y_test))
    good = linear_probe(x * 100 + 7, y, x_test * 100 + 7, y_test, epochs=20)
    assert good["linear"] > 0.98 and good["held_out"] > 0.95
    noise = linear_probe(torch.randn(600, 8, generator=g), y, torch.randn(300, 8, generator=g), y_test, epochs=20)
    assert 0.2 < noise["linear"] < 0.47


def test_probe_gradient_is_that_of_cross_entropy():
    x, y = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    weight, bias = linear_eval.fit_probes(x, y, 3, [(0.5, 0.0), (0.1, 0.01)], epochs=1, seed=0)
    layer = nn.Linear(5, 3)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    nn.functional.cross_entropy(layer(x), y).backward()
    for g, lr in enumerate((0.5, 0.1)):
        torch.testing.assert_close(weight[:, g].T, -lr * layer.weight.grad)
        torch.testing.assert_close(bias[g], -lr * layer.bias.grad)


@pytest.mark.parametrize("augment", ["--augment", "--no-augment"])
def test_evaluation_prints_and_writes_one_table_and_leaves_the_file_alone(augment, pretrained, capsys):
    before = (pretrained / "backbone.pth").read_bytes()
    flags = ["--weights", str(pretrained / "backbone.pth"), "--max-images", "200", "--epochs", "2", augment]
    rows = linear_eval.main(linear_eval.get_parser().parse_args(flags))
    assert [r["network"] for r in rows] == ["pre-trained", "untrained"] and all(0 <= r["linear"] <= 1 for r in rows)
    table = (pretrained / "linear_eval-shapes.md").read_text()
    assert table in capsys.readouterr().out and f"{100 * rows[0]['knn']:.2f}" in table
    assert (pretrained / "backbone.pth").read_bytes() == before


def test_features_leave_the_batch_norm_statistics_alone():
    backbone = build_backbone("resnet18", "small", 0.0625)[0].train()
    before = copy.deepcopy(backbone.state_dict())
    h = extract(backbone, make_shapes(10).pixels, (0.5,) * 3, (0.2,) * 3, torch.device("cpu"), batch_size=4)
    assert h.shape == (10, 32) and backbone.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_plain_torchvision_file_is_measured_too(tmp_path):
    theirs = torchvision.models.mobilenet_v2()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, facts = load_backbone(str(tmp_path / "theirs.pth"), "mobilenet_v2")
    assert facts["stem"] == "imagenet" and facts["mean"] == (0.485, 0.456, 0.406)
    theirs.classifier = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranks, device, synced", [(2, "cuda", True), (1, "cuda", False), (2, "cpu", False)])
def test_bn_is_over_all_ranks_on_several_gpus(ranks, device, synced, monkeypatch):
    monkeypatch.setattr(linear_eval.dist, "is_initialized", lambda: ranks > 1)
    monkeypatch.setattr(linear_eval.dist, "get_world_size", lambda: ranks)
    before = METHODS["moco"](build_backbone("resnet18", "small", 0.0625)[0])
    state, norms = before.state_dict(), [m for m in before.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    after = launch.synced(before, torch.device(device))
    found = [m for m in after.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(found) == len(norms) * synced and len(norms) == 2 * 20  # of the encoder and of its momentum twin
    assert all(torch.equal(v, state[k]) for k, v in after.state_dict().items())


# ---- few labels -----------------------------------------------------------------------------------------------------


def test_labels_are_shared_out_evenly_and_the_same_for_a_seed():
    labels = torch.arange(1_281_167) % 1000  # ImageNet-1k: published lists of 1 % have 12 or 13 a class
    rows = balanced_rows(labels, 0.01)
    assert len(rows) == 12_812 and set(labels[rows].bincount().tolist()) == {12, 13} and len(rows.unique()) == len(rows)
    assert torch.equal(rows, balanced_rows(labels, 0.01)) and not torch.equal(rows, balanced_rows(labels, 0.01, seed=1))
    skewed = torch.tensor([0] * 90 + [1] * 8 + [2] * 2)
    assert skewed[balanced_rows(skewed, 0.12)].bincount().tolist() == [4, 4, 2]
    assert skewed[balanced_rows(skewed, 0.001)].bincount().tolist() == [1, 1, 1]


def test_a_list_of_labelled_images_names_them(tmp_path):
    for name in ("a/1", "a/2", "b/1", "b/3"):
        path = tmp_path / "data" / "train" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    images, file = load_images(str(tmp_path / "data")), tmp_path / "list.txt"
    assert images.names == ["train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/3.png"]
    file.write_text("3.png\ntrain/a/1.png\n\n")
    assert listed_rows(str(file), images).tolist() == [3, 0]
    for text, message in [("3.png\n4.png", "line 2: '4.png' .* is none"), ("1.png", "is 2 of them"), ("", "no image")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            listed_rows(str(file), images)
    assert load_images("shapes", limit=3).names == ["0", "1", "2"]


def test_few_shot_is_the_nearest_class_mean():
    rng = np.random.default_rng(0)
    y, y_test = np.arange(60) % 3, np.arange(90) % 3
    centres = rng.normal(size=(3, 6))
    x, x_test = (centres[t] + 0.8 * rng.normal(size=(len(t), 6)) for t in (y, y_test))
    right, g = [], torch.Generator().manual_seed(4)
    for _ in range(20):
        support = np.stack([x[y == c][torch.randperm(20, generator=g)[:2].numpy()] for c in range(3)])
        centre = support.mean((0, 1))
        unit = [[(v - centre) / np.linalg.norm(v - centre) for v in of_class] for of_class in support]
        means = [np.mean(u, 0) / np.linalg.norm(np.mean(u, 0)) for u in unit]
        guess = [np.argmax([np.dot(m, q - centre) / np.linalg.norm(q - centre) for m in means]) for q in x_test]
        right.append(np.mean(guess == y_test))
    t = [torch.tensor(a) for a in (x, y, x_test, y_test)]
    mean, half = few_shot(*t, shots=2, draws=20, seed=4)
    assert mean == pytest.approx(np.mean(right)) and half == pytest.approx(1.96 * np.std(right, ddof=1) / 20**0.5)
    assert 0.5 < mean < 1 and half > 0
    with pytest.raises(ValueError, match="21 shots: the smallest class has 20"):
        few_shot(*t, shots=21)


def test_a_vits_probe_sees_its_last_blocks_and_its_neighbours_the_last_alone(monkeypatch):
    args = linear_eval.get_parser().parse_args(["--weights", "", "--epochs", "1", "--vit-blocks", "3"])
    seen = {}
    monkeypatch.setattr(linear_eval, "knn_accuracy", lambda bank, *_: seen.update(knn=bank))
    monkeypatch.setattr(linear_eval, "linear_probe", lambda known, *_, **__: seen.update(probe=known) or {})
    vit, images = build_backbone("vit_tiny", "small", 1 / 12)[0].eval(), make_shapes(8)
    facts = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    measure(vit, facts, images, images, torch.device("cpu"), args)
    x = (images.pixels / 255 - 0.5) / 0.2
    assert seen["probe"].shape == (8, 3 * vit.feature_dim)
    torch.testing.assert_close(seen["knn"], vit(x).detach())


def test_no_measure_changes_the_backbone_and_fine_tuning_learns(monkeypatch):
    backbone = build_backbone("resnet18", "small", 0.0625)[0].train()
    before = copy.deepcopy(backbone.state_dict())
    train, test = make_shapes(200, 16), make_shapes(100, 16, seed=1)
    flags = (
        "--weights . --epochs 1 --augment --shots 1 3 --draws 2 --finetune --finetune-lr 0.03 0.1 --finetune-epochs 2"
    )
    args, facts = linear_eval.get_parser().parse_args(flags.split()), {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    few, line = balanced_rows(train.labels, 0.4), {"data": "shapes", "network": "pre-trained"}
    assert measure(backbone, facts, train, test, torch.device("cpu"), args, [few[::9]])[0]["3-shot"] is None
    rows = measure(backbone, facts, train, test, torch.device("cpu"), args, [None, few])
    assert [r["labels"] for r in rows] == [200, 80] and all({"finetuned", "1-shot", "3-shot"} <= r.keys() for r in rows)
    assert rows[1]["3-shot"] and "too few labels" in linear_eval.line_of(args, line | rows[1] | {"3-shot": None}, 200)
    assert backbone.training and all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())

    used = []  # the images that a row may learn from are its own
    monkeypatch.setattr(
        linear_eval, "classifier", lambda *a, **_: used.append(a[3]) or nn.Sequential(backbone, nn.Identity())
    )
    linear_eval.finetune(backbone, facts, train, few, test, torch.device("cpu"), [0.1, 0.2], 1)
    assert sorted(map(len, used)) == [64, 64, 80] and all(set(u.tolist()) <= set(few.tolist()) for u in used)


def test_a_classifier_fits_its_images_and_starts_from_the_backbone():
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", "small", 0.125)[0]
    images = make_shapes(60, 16)
    facts, rows, cpu = {"mean": (0.5,) * 3, "std": (0.2,) * 3}, torch.arange(40), torch.device("cpu")
    started = linear_eval.classifier(backbone, facts, images, rows, 0.0, 1, cpu)
    for a, b in zip(started[0].parameters(), backbone.parameters()):
        assert torch.equal(a, b)
    network = linear_eval.classifier(backbone, facts, images, rows, 0.1, 120, cpu)
    h = extract(network[0], images.pixels, facts["mean"], facts["std"], cpu, forward=network)
    right = h.argmax(1) == images.labels
    assert right[:40].double().mean() > 0.8  # by chance .1


def test_several_data_sets_and_shares_of_labels_come_in_one_table(pretrained, tmp_path, capsys):
    for split, n in ("train", 12), ("test", 6):
        images = make_shapes(n, 32, seed=n)
        for i, (pixels, label) in enumerate(zip(images.pixels, torch.arange(n) % 3)):
            path = tmp_path / "mine" / split / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    flags = f"--weights {pretrained}/backbone.pth --data shapes {tmp_path}/mine --max-images 100 --epochs 2"
    flags += f" --shots 2 --draws 3 --label-fraction 1 0.5 --output-dir {tmp_path}"
    rows = linear_eval.main(linear_eval.get_parser().parse_args(flags.split()))
    assert [(r["data"], r["network"], r["labels"]) for r in rows] == [
        (data, network, n)
        for data, counts in (("shapes", (100, 50)), ("mine", (12, 6)))
        for network in ("pre-trained", "untrained")
        for n in counts
    ]
    table = (tmp_path / "linear_eval-shapes-mine.md").read_text()
    assert table in capsys.readouterr().out and len(table.splitlines()) == 4 + 8
    cells = [c.strip() for c in table.splitlines()[-1].split("|")[1:-1]]
    assert cells[:3] == ["mine", "untrained", "6 (50 %)"] and cells[3] == f"{100 * rows[-1]['knn']:.2f}"
    assert cells[5] == "{:.2f} ± {:.2f}".format(*(100 * v for v in rows[-1]["2-shot"]))


def test_wrong_measurements_are_told_in_one_line(pretrained, tmp_path, capsys):
    weights = ["--weights", pretrained / "backbone.pth", "--output-dir", tmp_path / "out", "--max-images", 100]
    (tmp_path / "list.txt").write_text("nothing.png")
    for flags, message in [
        (["--label-fraction", 2], "--label-fraction: shares"),
        (["--label-list", tmp_path / "list.txt", "--label-fraction", 0.1], "leave one out"),
        (["--label-list", tmp_path / "list.txt"], "'nothing.png' should be one of the training images"),
        (["--label-list", tmp_path / "no.txt"], "No such file"),
        (["--shots", 0], "--shots must be above 0"),
        (["--finetune-epochs", 0], "--finetune-epochs must be above 0"),
    ]:
        said, status = refused(capsys, linear_eval, *weights, *flags)
        assert message in said and status == 1, said
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(ValueError, match="3 shots: the smallest class has 2"):
        linear_eval.few_shot(torch.randn(5, 4), torch.tensor([0, 0, 0, 1, 1]), torch.randn(2, 4), torch.arange(2), 3)


def test_files_that_a_stream_could_not_decode_are_not_measured(tmp_path):
    for i, image in enumerate(make_shapes(120, 16).pixels):
        place = tmp_path / ("train" if i < 80 else "test") / str(i % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    train, test = (load_images(str(tmp_path), split, 16, budget_gb=1e-9) for split in ("train", "test"))
    for file in (*train.pixels.files[10:20], *test.pixels.files[:4]):
        Path(file).write_text("no image")
    assert decoded(train.pixels, torch.arange(80)).all()  # nobody has looked yet
    backbone, _ = build_backbone("resnet18", "small", 1 / 32)
    flags = ["--weights", "", "--epochs", "1", "--knn-k", "5", "--no-compile", "--shots", "35"]
    facts = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    row = measure(backbone, facts, train, test, torch.device("cpu"), get_parser().parse_args(flags))[0]
    assert row["labels"] == 70 and row["35-shot"] is None  # one class has 30 left
    assert (36 * row["linear"]).is_integer() and (36 * row["knn"]).is_integer()
    assert (~decoded(train.pixels, torch.arange(80))).nonzero()[:, 0].tolist() == list(range(10, 20))
    assert decoded(test.pixels, torch.tensor([3, 4])).tolist() == [False, True]
