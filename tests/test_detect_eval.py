"""Detectors on our backbones: their parts, their training, and what is left of a run."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import all_refused, call, load, spawn
from PIL import Image
from torchvision.models.detection import maskrcnn_resnet50_fpn

import detect_eval
from annotations import read
from checkpoint import load_backbone, save_backbone
from detect_eval import Pyramid, build_detector, load_example
from models import ARCHS, SPACES, build_backbone

QUICK = "--iterations 6 --image-size 64 --batch-size 2 --rois 16 --fpn-channels 16 --finest-stride 4 --anchor-scale 4"
QUICK = f"{QUICK} --warmup 1 --workers 2 --device cpu --no-amp".split()


def make_rectangles(root, n=(40, 8), size=96):
    """Images of one to three rectangles that do not touch, brighter than the ground, as label PNGs."""
    rng = np.random.default_rng(0)
    for split, number in zip(("train", "test"), n):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for k in range(number):
            pixels, labels = rng.integers(40, 80, (size, size, 3)), np.zeros((size, size), np.uint8)
            for value, cell in enumerate(rng.permutation(4)[: rng.integers(1, 4)], 1):
                y, x = np.array(divmod(cell, 2)) * size // 2 + rng.integers(2, 12, 2)
                h, w = rng.integers(16, 32, 2)
                pixels[y : y + h, x : x + w] += rng.integers(60, 120, 3)
                labels[y : y + h, x : x + w] = value
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / "images" / f"{k}.png")
            Image.fromarray(labels).save(root / split / "masks" / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory):
    return make_rectangles(tmp_path_factory.mktemp("rectangles"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    backbone, _ = build_backbone("resnet18", "imagenet", 0.125)
    facts = {"arch": "resnet18", "width": 0.125, "stem": "imagenet", "mean": [0.3] * 3, "std": [0.2] * 3}
    save_backbone(backbone, facts, folder)
    return folder / "backbone.pth"


def arguments(weights, data, folder, *more):
    flags = ["--weights", weights, "--data", data, "--output-dir", folder, *QUICK, *more]
    return detect_eval.get_parser().parse_args(list(map(str, flags)))


# ---- the detector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_pyramid_has_a_level_for_each_stride(arch, stem):
    body, _ = build_backbone(arch, stem, 0.125)
    if arch.startswith("vit") and stem == "small":
        with pytest.raises(ValueError, match="16 px"):
            Pyramid(body, 8, 4)
        return
    x, body = torch.randn(1, 3, 256, 320), body.eval()
    before = {k: v.clone() for k, v in body.state_dict().items()}
    for finest in (4, 8, 16):
        levels = Pyramid(body, 8, finest)(x)
        shapes = [(1, 8, 256 // stride, 320 // stride) for stride in (4, 8, 16, 32, 64) if stride >= finest]
        assert [tuple(level.shape) for level in levels.values()] == shapes
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


@pytest.mark.parametrize("space", ["resnetk1", "mobilenet"])
def test_the_last_level_is_of_what_the_backbone_gives(space):
    """Of a network that a search might find, to the bit."""
    options = len(SPACES[space].options)
    arch = SPACES[space].arch([(7 * stage + 3) % options for stage in SPACES[space].stages])
    body, _ = build_backbone(arch, "imagenet", 0.25)
    pyramid, seen = Pyramid(body.eval(), 8, 4), []
    pyramid.fpn.register_forward_pre_hook(lambda _, maps: seen.append(list(maps[0].values())[-1]))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pyramid(x)
        assert torch.equal(seen[0].mean((2, 3)), body(x.contiguous(memory_format=torch.channels_last)))


def test_boxes_are_not_rounded_under_bf16(tmp_path):
    body, _ = build_backbone("resnet18", "imagenet", 0.125)
    detector = build_detector(arguments("x", "x", tmp_path), body, {"mean": [0.5] * 3, "std": [0.2] * 3}, 2)
    seen, select = [], detector.roi_heads.select_training_samples

    def selected(proposals, targets):
        chosen = select(proposals, targets)
        seen.extend([*proposals, *chosen[0], *chosen[3]])
        return chosen

    detector.roi_heads.select_training_samples = selected
    detector.rpn.anchor_generator.register_forward_hook(lambda _, x, anchors: seen.extend(anchors))
    box = torch.tensor([[299.0, 11.0, 333.0, 51.0]])  # bf16 has 298 and 300
    for part in (detector.rpn, detector.roi_heads):
        part.fg_bg_sampler.seeds = [0]
    with torch.autocast("cpu", torch.bfloat16):
        detector([torch.rand(3, 64, 384)], [{"boxes": box, "labels": torch.tensor([1])}])
    assert len(seen) == 4 and all(boxes.dtype == torch.float32 for boxes in seen)
    assert (seen[2] == box).all(1).any()  # the object itself is a proposal


def test_torchvisions_own_model_loads_a_detector(tmp_path):
    with torch.device("meta"):
        body, _ = build_backbone("resnet50")
    flags = ["--masks", "--fpn-channels", "256", "--anchor-scale", "8", "--rois", "512"]
    args = arguments("x", "x", tmp_path, *flags)
    body = body.to_empty(device="cpu")
    ours = build_detector(args, body, {"mean": [0.5] * 3, "std": [0.2] * 3}, 90).eval()
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).eval()
    torch.manual_seed(0)
    state = {k: 0.02 * torch.randn(v.shape) if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    state |= {k: v.abs() + 0.5 for k, v in state.items() if k.endswith("running_var")}
    ours.load_state_dict(state)
    theirs.load_state_dict(ours.state_dict())
    for name in ("sizes", "aspect_ratios"):
        assert getattr(ours.rpn.anchor_generator, name) == getattr(theirs.rpn.anchor_generator, name)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours.backbone(x), dict(zip("01234", theirs.backbone(x).values())))


# ---- images ---------------------------------------------------------------------------------------------------------


def test_an_example_is_its_image_resized_and_flipped(rectangles):
    image = read(str(rectangles), True)[0]["train"][0]
    pixels, target = load_example(image, 48, 1000, masks=True)
    assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.uint8 and (target["labels"] == 1).all()
    np.testing.assert_allclose(target["boxes"], image.boxes / 2, rtol=1e-6)
    flipped, other = load_example(image, 48, 1000, True, masks=True)
    assert torch.equal(flipped.flip(2), pixels) and torch.equal(other["masks"].flip(2), target["masks"])
    x0, y0, x1, y1 = other["boxes"].unbind(1)
    torch.testing.assert_close(torch.stack([48 - x1, y0, 48 - x0, y1], 1), target["boxes"])
    for box, mask in zip(other["boxes"], other["masks"]):
        rows, columns = mask.nonzero().unbind(1)
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (edges - box).abs().max() <= 1
    assert load_example(image, 48, 40)[0].shape == (3, 40, 40)  # the long side


def test_nothing_is_learned_from_crowds(rectangles, weights, tmp_path):
    images = read(str(rectangles))[0]["train"][:4]
    crowd = [np.arange(len(i.boxes)) == 0 for i in images]
    args = detect_eval.settle(arguments(weights, rectangles, tmp_path), 4, torch.nn.Identity(), torch.device("cpu"))
    marked = [i._replace(crowd=c) for i, c in zip(images, crowd)]
    batches = detect_eval.DetectionBatches(args, marked, torch.device("cpu"))
    assert [len(i.boxes) for i in batches.images] == [n - 1 for n in map(len, crowd) if n > 1]
    assert all(len(t["boxes"]) for step in range(4) for t in batches(step)[1])


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(rectangles, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    found = detect_eval.main(arguments(weights, rectangles, folder, "--masks", "--seeds", 2))
    return folder, found


def test_a_run_leaves_its_table_pictures_and_detectors(whole, weights):
    folder, found = whole
    assert list(found) == ["pre-trained", "untrained"] and [len(s) for s in found.values()] == [2, 2]
    text = (folder / "detect_eval.md").read_text()
    assert "| pre-trained |" in text and "mask AP50" in text and "40 training images" in text
    assert Image.open(folder / "detections.png").width == 3 * 328 + 8
    assert (folder / "precision.svg").read_text().startswith("<svg")
    for seed in (0, 1):
        a, b = (load(folder / f"{network}-seed{seed}" / "detector.pth") for network in found)
        facts = json.loads((folder / f"pre-trained-seed{seed}" / "detector.json").read_text())
        assert facts["classes"] == ["object"] and facts["scores"] == found["pre-trained"][seed]
        assert a.keys() == b.keys()
        assert torch.equal(a["backbone.body.conv1.weight"], b["backbone.body.conv1.weight"]) == (seed == 0)  # as given
    lines = [json.loads(line) for line in (folder / "pre-trained-seed0" / "log.txt").read_text().splitlines()]
    assert lines[-1]["step"] == 6 and set(detect_eval.PARTS) < lines[-1].keys()


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(whole, weights, rectangles, tmp_path, monkeypatch):
    step_of = detect_eval.lr_of

    def stops(args, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(args, step)

    args = arguments(weights, rectangles, tmp_path, "--masks", "--no-untrained")
    monkeypatch.setattr(detect_eval, "lr_of", stops)
    with pytest.raises(SystemExit) as stop:
        detect_eval.main(args)
    assert stop.value.code == 143
    assert json.loads(torch.load(tmp_path / "pre-trained-seed0" / "checkpoint.pth")["facts"])["step"] == 3
    monkeypatch.setattr(detect_eval, "lr_of", step_of)
    found = detect_eval.main(args)
    a, b = (load(place / "pre-trained-seed0" / "detector.pth") for place in (whole[0], tmp_path))
    assert all(torch.equal(x, b[k]) for k, x in a.items())
    assert found["pre-trained"][0] == whole[1]["pre-trained"][0]


def rank_main(rank, flags):
    call(detect_eval, *flags)


def test_two_ranks_are_one(weights, rectangles, tmp_path):
    """Weights but for rounding, where BN is frozen (it is not shared on a CPU), and the AP of given weights bit for
    bit."""
    flags = ["--weights", weights, "--data", rectangles, "--masks", "--no-untrained", *QUICK, "--freeze-bn"]
    flags += ["--lr", 0.02, "--output-dir"]
    call(detect_eval, *flags, tmp_path / "one")
    spawn(rank_main, [*flags, tmp_path / "two"])
    a, b = (load(tmp_path / name / "pre-trained-seed0" / "detector.pth") for name in ("one", "two"))
    for k, x in a.items():
        torch.testing.assert_close(b[k], x, rtol=1e-4, atol=1e-5)
    again = tmp_path / "again" / "pre-trained-seed0"
    again.mkdir(parents=True)
    (tmp_path / "two" / "pre-trained-seed0" / "checkpoint.pth").rename(again / "checkpoint.pth")
    alone = call(detect_eval, *flags, again.parent)
    told = json.loads((tmp_path / "two" / "pre-trained-seed0" / "detector.json").read_text())["scores"]
    assert json.dumps(told) == json.dumps(alone["pre-trained"][0])


def test_frozen_bn_stays_as_it_is_and_the_rest_learns(weights, rectangles, tmp_path):
    detect_eval.main(arguments(weights, rectangles, tmp_path, "--freeze-bn", "--no-untrained"))
    before = load_backbone(str(weights))[0].state_dict()
    after = load(tmp_path / "pre-trained-seed0" / "detector.pth")
    for k, x in before.items():
        same = torch.equal(after[f"backbone.body.{k}"], x)
        assert same == ("bn" in k or "downsample.1" in k), k


def test_rectangles_are_found(weights, rectangles, tmp_path):
    """It learns: the AP50 of 60 steps was 87, of boxes and masks."""
    more = ["--iterations", 60, "--masks", "--no-untrained", "--batch-size", 4, "--lr", 0.08]
    found = detect_eval.main(arguments(weights, rectangles, tmp_path, *more))["pre-trained"][0]
    assert found["box"]["AP50"] > 60 and found["mask"]["AP50"] > 60, found


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_cannot_be_decoded_is_named(split, weights, tmp_path):
    """Its header is as it should be, so that nobody notices before."""
    data = make_rectangles(tmp_path / "data", (4, 2))
    file = data / split / "images" / "1.png"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(SystemExit, match=r"1\.png' cannot be decoded"):
        detect_eval.main(arguments(weights, data, tmp_path / "out", "--no-untrained"))


def test_bench_leaves_nothing(weights, rectangles, tmp_path, capsys):
    seconds = detect_eval.main(arguments(weights, rectangles, tmp_path / "new", "--bench"))
    assert set(seconds) == {"images", "forward", "backward", "optimiser"} and not (tmp_path / "new").exists()
    assert "peak memory" in capsys.readouterr().out


def test_a_wrong_command_is_one_line(weights, rectangles, tmp_path, capsys):
    base = ["--weights", weights, "--data", rectangles, "--output-dir", tmp_path / "out", *QUICK]
    table = [
        (["--iterations", 0], "--iterations 0: must be 1 or above"),
        (["--lr", 0], "must be above 0"),
        (["--image-size", 8], "32 pixels or more"),
        (["--image-size", 640, "--longest", 320], "none above --longest"),
        (["--batch-size", 64], "do not fill a batch of 64"),
        (["--data", "nowhere"], "'nowhere' is no folder"),
        (["--weights", "nothing.pth"], "no weights at"),
        (["--max-detections", 0], "must be 1 or above"),
    ]
    all_refused(capsys, detect_eval, base, table)
    assert not list(tmp_path.glob("out/*/*"))
