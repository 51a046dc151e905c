"""A training step of our detector beside torchvision's reference with the same backbone, size and heads, in turns.

    python tests/bench_detect.py --data my/bccd --arch resnet18 --width 0.5

The reference is torchvision's FasterRCNN with BackboneWithFPN on torchvision's own ResNet or MobileNetV2, which resizes
the images itself. Both take the same images and boxes; ours get theirs shrunk beforehand, which a thread does during
the step before. Medians of ratios within a round; memory is that of a process that runs one of them alone.
"""

import argparse
import copy
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from torchvision.models import mobilenet_v2, resnet
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

sys.path.insert(0, str(Path(__file__).parent.parent))
import detect_eval
from annotations import read
from models import build_backbone
from pretrain import clock

MEAN, STD = [0.5] * 3, [0.25] * 3


def reference(args, classes):
    """At --finest-stride 4, which is the only one that it has without changes, and width 1."""
    if args.arch == "mobilenet_v2":
        body = mobilenet_v2().features
        taps, channels = {"3": "0", "6": "1", "13": "2", "18": "3"}, [24, 32, 96, 1280]
    else:
        body = getattr(resnet, args.arch)(zero_init_residual=True)
        scale = 4 if args.arch == "resnet50" else 1
        taps = {f"layer{k}": str(k - 1) for k in (1, 2, 3, 4)}
        channels = [64 * scale * 2**k for k in range(4)]
    c = args.fpn_channels
    backbone = BackboneWithFPN(body, taps, channels, c, LastLevelMaxPool())
    sizes = tuple((args.anchor_scale * stride,) for stride in (4, 8, 16, 32, 64))
    parts = {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        "box_head": TwoMLPHead(49 * c, 4 * c),
        "box_predictor": FastRCNNPredictor(4 * c, classes + 1),
        "box_batch_size_per_image": args.rois,
    }
    if args.masks:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
        parts["mask_head"] = MaskRCNNHeads(c, (c,) * 4, 1)
        parts["mask_predictor"] = MaskRCNNPredictor(c, c, classes + 1)
    how = {"min_size": args.image_size[-1], "max_size": args.longest, "image_mean": MEAN, "image_std": STD}
    return (MaskRCNN if args.masks else FasterRCNN)(backbone, **parts, **how)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--arch", default="resnet18", choices=["resnet18", "resnet34", "resnet50", "mobilenet_v2"])
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--alone", choices=["ours", "torchvision"], help="time nothing: the peak of its memory")
    parser.add_argument("--image-size", type=int, default=160)
    own = parser.parse_args()
    torch.manual_seed(0)
    flags = ["--weights", "", "--data", own.data, "--finest-stride", "4", "--image-size", str(own.image_size)]
    args = detect_eval.get_parser().parse_args([*flags, *(["--masks"] if own.masks else [])])
    splits, classes = read(own.data, own.masks)
    body, _ = build_backbone(own.arch, "imagenet", 1.0)
    device = torch.device("cpu")
    args = detect_eval.settle(args, 0, body, device)
    args.arch = own.arch
    detectors = {"ours": detect_eval.build_detector(args, body, {"mean": MEAN, "std": STD}, len(classes))}
    detectors["ours"].backbone.to(memory_format=torch.channels_last)
    detectors["torchvision"] = reference(args, len(classes))
    if own.alone:
        detectors = {own.alone: detectors[own.alone]}
        del body
    parameters = {name: sum(p.numel() for p in d.parameters()) for name, d in detectors.items()}
    batches = detect_eval.DetectionBatches(args, splits["train"], device)
    large = copy.copy(batches)  # at the size on disk, for the reference, which resizes
    large.args, large.ahead = copy.copy(args), {}
    large.args.image_size, large.args.longest = [max(i.width for i in splits["train"])], 10**6
    large.args.image_size = [min(splits["train"][0].width, splits["train"][0].height)]
    rounds = {name: [] for name in detectors}
    optimizers = {
        name: detect_eval.optimizer_of(args, d) if name == "ours" else sgd(args, d) for name, d in detectors.items()
    }
    for step in range(3 + own.steps):
        for name, detector in detectors.items():
            images, targets, seeds = (batches if name == "ours" else large)(step)
            begun = clock(device)
            if name == "ours":
                losses = detect_eval.losses_of(detector, detector, (images, targets, seeds))
            else:
                losses = detector(images, targets)
            sum(losses.values()).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            rounds[name].append(clock(device) - begun)
    if own.alone:
        print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
        return
    ratio = median(a / b for a, b in zip(*(times[3:] for times in rounds.values())))
    print(f"{own.arch}, {own.data}, {own.image_size} px, batch {args.batch_size}: parameters {parameters}")
    for name, times in rounds.items():
        print(f"{name}: {1e3 * median(times[3:]):.0f} ms a step")
    print(f"ours / torchvision's: {ratio:.3f}")
    for name in detectors:
        command = [sys.executable, *sys.argv, "--alone", name]
        print(f"{name}: {float(subprocess.run(command, capture_output=True, text=True).stdout.split()[-1]):,.0f} MiB")


def sgd(args, detector):
    return torch.optim.SGD(detector.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)


if __name__ == "__main__":
    main()
