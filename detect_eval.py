"""Measures a backbone by object detection: Faster or Mask R-CNN on it, beside the same network untrained.

    torchrun detect_eval.py --weights runs/pretrain/backbone.pth --data my/bccd                   # boxes, small images
    torchrun detect_eval.py --weights runs/pretrain/backbone.pth --data my/nuclei --masks --image-size 256
    torchrun --nproc-per-node 8 detect_eval.py --weights resnet50.pth --arch resnet50 --data coco --masks --schedule 1x
    torchrun detect_eval.py --weights runs/pretrain/backbone.pth --data my/bccd --bench           # what a step costs

The detectors are torchvision's parts on a feature pyramid (1612.03144) over the stages of any backbone, or on ViTDet's
simple pyramid (2203.16527) over a ViT. --data is a folder as of COCO, VOC or label PNGs (annotations.py).
The whole detector is trained for --iterations steps and measured by COCO's AP on the test images; the table has means
and deviations over --seeds. For a given seed, both networks have the same heads, batches and flips.

The output is in detect-<data>/ beside the weights: detect_eval.md, detections.png, precision.svg, and for each network
and seed a folder with log.txt, checkpoint.pth (the same command resumes from it), detector.json, and detector.pth, a
plain state dict that torchvision's own model loads.
"""

import launch  # ahead of torch: it says how threads wait

# isort: split

import argparse
import copy
import math
import statistics
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from annotations import RECALLS, Annotated, Precision, read
from checkpoint import Checkpoint, load_backbone, save_atomic, versions, write_atomic, write_json
from data import ORDER, cores, to_device, to_pixels
from launch import Meter, Parser, barrier, is_main, memory_format, say, user_errors
from linear_eval import markdown, page
from losses import ranks
from models import ARCHS, ViT, build_backbone, describe
from optim import kind_of
from pictures import draw_curves
from pretrain import clock, peak_memory

# ---- the detector ---------------------------------------------------------------------------------------------------

COARSEST = 64  # stride of every pyramid's last level, which only the RPN uses


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> {"0": (B, channels, H / finest, W / finest), ...}, a level for each stride up to 64.

    A level is made from the backbone's last feature map of its stride, as in SSLight and Detectron2 (torchvision's
    MobileNets take the first). Coarser levels than the backbone has are subsampled from its last one (1612.03144). A
    ViT has a single map, from which each level is made (2203.16527, figure 2).
    """

    def __init__(self, body: nn.Module, channels: int, finest: int):
        super().__init__()
        self.body, self.finest, self.out_channels = body, finest, channels
        shapes_only = copy.deepcopy(body).eval().to("meta")
        maps = shapes_only.stages(torch.zeros(1, 3, COARSEST, COARSEST, device="meta"))
        if isinstance(body, ViT):
            if body.patch != 16:
                raise ValueError("a ViT's detector needs patches of 16 px, the imagenet stem: these are of 4")
            self.taps, self.strides = [0] * 4, [4, 8, 16, 32]
            self.fpn = SimplePyramid(maps[0].shape[1], channels)
        else:
            last = {COARSEST // x.shape[-1]: k for k, x in enumerate(maps)}  # stride: index of the last map
            self.strides = sorted(stride for stride in last if stride >= finest) or [max(last)]
            self.taps = [last[stride] for stride in self.strides]
            self.fpn = FeaturePyramidNetwork([maps[k].shape[1] for k in self.taps], channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body.stages(x.contiguous(memory_format=memory_format(x.device)))
        levels = list(self.fpn({str(n): maps[k] for n, k in enumerate(self.taps)}).values())
        strides = list(self.strides)
        while strides[-1] < COARSEST:
            levels.append(F.max_pool2d(levels[-1], 1, 2))
            strides.append(2 * strides[-1])
        kept = [level for level, stride in zip(levels, strides) if stride >= self.finest]
        return {str(n): level.float() for n, level in enumerate(kept)}  # anchors take this type; bf16 has 8 bits


class SimplePyramid(nn.Module):
    """ViTDet's: one map of stride 16 is resampled to strides 4, 8, 16 and 32; a 1x1 and a 3x3 convolution follow."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        half, quarter = dim // 2, dim // 4
        double = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        scales = [
            nn.Sequential(double(dim, half), LayerNorm2d(half), nn.GELU(), double(half, quarter)),
            double(dim, half),
            nn.Identity(),
            nn.MaxPool2d(2, 2),
        ]
        self.levels = nn.ModuleList()
        for scale, c_in in zip(scales, (quarter, half, dim, dim)):
            lateral = nn.Conv2d(c_in, channels, 1, bias=False)
            out = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.levels.append(nn.Sequential(scale, lateral, LayerNorm2d(channels), out, LayerNorm2d(channels)))

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: level(x) for level, (name, x) in zip(self.levels, maps.items())}


class AsGiven(GeneralizedRCNNTransform):
    """Does not resize: load_example does, with antialiasing, which torchvision's resize lacks. Detections are scaled to
    the size of the images on disk, `shown`: [(height, width), ...]."""

    shown: list[tuple[int, int]] | None = None

    def resize(self, image, target=None):
        return image, target

    def postprocess(self, result, image_shapes, original_image_sizes):
        return super().postprocess(result, image_shapes, self.shown or original_image_sizes)


class Fp32Coder(BoxCoder):
    """Decodes boxes in fp32 under autocast too: bf16 would round the proposals, and targets take their type."""

    def decode_single(self, rel_codes, boxes):
        return super().decode_single(rel_codes.float(), boxes)


class SeededSampler(BalancedPositiveNegativeSampler):
    """Samples anchors or proposals for the losses with one seed per image, so that ranks do not change the sample."""

    seeds: Sequence[int] = ()

    def __call__(self, matched_idxs):
        sampled = []
        for matched, seed in zip(matched_idxs, self.seeds, strict=True):
            torch.manual_seed(seed)
            sampled.append(super().__call__([matched]))
        positive, negative = zip(*sampled)
        return [p for (p,) in positive], [n for (n,) in negative]


def build_detector(args: argparse.Namespace, body: nn.Module, facts: dict, classes: int) -> FasterRCNN:
    """torchvision's Faster R-CNN, or Mask R-CNN with --masks, on a backbone. facts: "mean" and "std" of channels."""
    c = args.fpn_channels
    pyramid = Pyramid(body, c, args.finest_stride)
    levels = [str(n) for n in range(int(math.log2(COARSEST // args.finest_stride)) + 1)]
    sizes = tuple((args.anchor_scale * args.finest_stride * 2**n,) for n in range(len(levels)))
    parts = {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(levels)),
        "box_roi_pool": MultiScaleRoIAlign(levels[:-1], 7, 2),
        "box_head": TwoMLPHead(49 * c, 4 * c),
        "box_predictor": FastRCNNPredictor(4 * c, classes + 1),
    }
    if args.masks:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(levels[:-1], 14, 2)
        parts["mask_head"] = MaskRCNNHeads(c, (c,) * 4, 1)
        parts["mask_predictor"] = MaskRCNNPredictor(c, c, classes + 1)
    how = {"box_batch_size_per_image": args.rois, "box_detections_per_img": args.max_detections}
    detector = (MaskRCNN if args.masks else FasterRCNN)(pyramid, **parts, **how)
    detector.transform = AsGiven(0, 0, facts["mean"], facts["std"])
    for part in (detector.rpn, detector.roi_heads):
        sampler = part.fg_bg_sampler
        part.box_coder = Fp32Coder(part.box_coder.weights)
        part.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
    return detector


# ---- images ---------------------------------------------------------------------------------------------------------


def load_example(image: Annotated, size: int, longest: int, flip: bool = False, masks: bool = False) -> tuple:
    """(uint8 (3, h, w), {"boxes" (n, 4), "labels" (n,), "masks" (n, h, w)}). The short side is resized to `size`, or
    less if the long side would exceed `longest`. Labels start at 1. Raises ValueError if the file cannot be decoded."""
    try:
        with Image.open(image.file) as file:
            pixels = Image.fromarray(to_pixels(file, None))
    except Exception as error:  # decoders raise anything on a broken file
        raise ValueError(f"'{image.file}' cannot be decoded ({type(error).__name__}: {error})") from error
    scale = min(size / min(pixels.size), longest / max(pixels.size))
    w, h = (max(1, round(side * scale)) for side in pixels.size)
    pixels = np.asarray(pixels.resize((w, h), Image.Resampling.BILINEAR))
    boxes = image.boxes * np.array([w / image.width, h / image.height] * 2)
    drawn = [np.asarray(Image.fromarray(draw()).resize((w, h), 0)) for draw in image.masks] if masks else []
    drawn = np.array(drawn, np.uint8).reshape(-1, h, w)
    if flip:
        pixels, drawn = pixels[:, ::-1], drawn[..., ::-1]
        boxes = np.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], 1)
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.from_numpy(image.labels + 1)}
    if masks:
        target["masks"] = torch.from_numpy(drawn.copy())
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1), target


class DetectionBatches:
    """batches(step) -> (images, targets, seeds) of this rank: a function of (seed, step). Threads decode two steps
    ahead. Crowds are left out, and so are images without other objects."""

    def __init__(self, args: argparse.Namespace, images: list[Annotated], device: torch.device):
        images = [image.keep(~image.crowd) for image in images]
        self.images = [image for image in images if len(image.boxes)]
        self.args, self.device, self.batch_size, self.seed = args, device, args.batch_size, args.seed
        self.steps_per_epoch = len(self.images) // self.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"{len(self.images)} images with objects do not fill a batch of {self.batch_size}")
        self.names = [str(image.file) for image in self.images]
        self.pool = ThreadPoolExecutor(args.workers or cores())
        self.ahead: dict[int, list[Future]] = {}

    def rows_of(self, step: int) -> Tensor:
        """(batch_size,): indices of the images in the batch of all ranks."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.images))
        return torch.from_numpy(order[step * self.batch_size : (step + 1) * self.batch_size])

    def draw(self, step: int) -> list[tuple]:
        """(index, size, flip, seed) of each image of this rank."""
        rng = np.random.default_rng((self.seed, step))
        sizes, flips = rng.choice(self.args.image_size, self.batch_size), rng.random(self.batch_size) < 0.5
        seeds = rng.integers(2**31, size=self.batch_size)
        drawn = list(zip(self.rows_of(step).tolist(), sizes.tolist(), flips.tolist(), seeds.tolist()))
        rank, world = ranks()
        share = self.batch_size // world
        return drawn[rank * share : (rank + 1) * share]

    def __call__(self, step: int) -> tuple[list[Tensor], list[dict[str, Tensor]], list[int]]:
        for later in (step, step + 1, step + 2):
            if later not in self.ahead:
                self.ahead[later] = [
                    self.pool.submit(load_example, self.images[row], size, self.args.longest, flip, self.args.masks)
                    for row, size, flip, _ in self.draw(later)
                ]
        examples = [task.result() for task in self.ahead.pop(step)]
        images = [to_device(x, self.device).float().div_(255) for x, _ in examples]
        targets = [{name: to_device(x, self.device) for name, x in target.items()} for _, target in examples]
        return images, targets, [seed for *_, seed in self.draw(step)]


# ---- training -------------------------------------------------------------------------------------------------------

PARTS = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")


def optimizer_of(args: argparse.Namespace, detector: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum .9 and weight decay 1e-4, or for a ViT AdamW with ViTDet's .1; none on norms and biases."""
    params = [p for p in detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if kind_of(p) != "vector"]},
        {"params": [p for p in params if kind_of(p) == "vector"], "weight_decay": 0.0},
    ]
    lr = args.lr * args.batch_size / 16
    if isinstance(detector.backbone.body, ViT):
        return torch.optim.AdamW(groups, lr, weight_decay=0.1)
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=1e-4)


def lr_of(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up; a tenth of the rate after two thirds of the steps, a hundredth after eight ninths."""
    rate = args.lr * args.batch_size / 16
    tenths = sum(step >= share * args.iterations for share in (2 / 3, 8 / 9))
    return rate * min(1.0, (step + 1) / max(1, args.warmup)) * 0.1**tenths


def losses_of(model: nn.Module, detector: FasterRCNN, batch: tuple) -> dict[str, Tensor]:
    images, targets, seeds = batch
    for part in (detector.rpn, detector.roi_heads):
        part.fg_bg_sampler.seeds = seeds
    return model(images, targets)


def train(
    args: argparse.Namespace,
    detector: FasterRCNN,
    batches: DetectionBatches,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    checkpoint: Checkpoint,
    device: torch.device,
) -> None:
    """The training loop, from the checkpoint's step on."""
    detector.train()
    if args.freeze_bn:  # of the backbone: statistics, scales and shifts stay as loaded
        for module in detector.backbone.body.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval().requires_grad_(False)
    model = DistributedDataParallel(detector) if dist.is_initialized() else detector
    with checkpoint:
        for step in range(checkpoint.step, checkpoint.total):
            lr = lr_of(args, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with user_errors():
                batch = batches(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                losses = losses_of(model, detector, batch)
            loss = sum(losses.values())
            loss.backward()
            if args.clip_grad:
                nn.utils.clip_grad_norm_(detector.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            meter.add(step, lr, loss=loss, **losses)
            meter.print(step)
            done = step + 1
            if done % batches.steps_per_epoch == 0 or done == checkpoint.total:
                means = meter.end_epoch()
                say(f"step {done}/{checkpoint.total}  loss {means['loss']:.4f}{meter.speed(step)}")
                checkpoint.log({"step": done, "lr": lr, **means})
                if is_main():
                    save_curves(checkpoint.history, checkpoint.folder)
                meter.restart()
            checkpoint.after_step(done)


def save_curves(history: list[dict], folder: Path) -> None:
    """curves.svg of the losses so far, the total and its parts."""
    names = [name for name in ("loss", *PARTS, "lr") if name in history[-1]]
    panels = {name: {"training": [(line["step"], line[name]) for line in history]} for name in names}
    with user_errors():
        write_atomic(draw_curves(panels, f"Step {history[-1]['step']}", "step"), folder / "curves.svg", sync=False)


# ---- testing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    args: argparse.Namespace, detector: FasterRCNN, images: list[Annotated], classes: int, device: torch.device
) -> tuple[dict[str, Precision], dict[int, dict]]:
    """({"box": Precision, with masks "mask": Precision}, detections in the first PICTURED images by index), the same on
    all ranks, which share the images. One image at a time: in a batch it would be padded, which changes detections."""
    detector.eval()
    rank, world = ranks()
    kinds = ("box", "mask") if args.masks else ("box",)
    precisions = {kind: Precision(classes, args.max_detections) for kind in kinds}
    own, tasks, pictured = range(rank, len(images), world), {}, {}
    pool = ThreadPoolExecutor(args.workers or cores())
    for k, n in enumerate(own):
        for later in own[k : k + 8]:
            if later not in tasks:
                tasks[later] = pool.submit(load_example, images[later], args.image_size[-1], args.longest)
        with user_errors():
            pixels, _ = tasks.pop(n).result()
        detector.transform.shown = [(images[n].height, images[n].width)]
        (found,) = detector([to_device(pixels, device).float().div_(255)])  # in fp32: bf16 would round boxes and scores
        found = {name: x.cpu().numpy() for name, x in found.items()}
        boxes, labels, scores = found["boxes"].astype(float), found["labels"] - 1, found["scores"]
        masks = found["masks"][:, 0] > 0.5 if args.masks else None
        for kind, precision in precisions.items():
            precision.add(n, images[n], boxes, labels, scores, masks if kind == "mask" else None)
        if n < PICTURED:
            pictured[n] = {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}
    if dist.is_initialized():
        gathered = [None] * world
        dist.all_gather_object(gathered, ({kind: p.matches for kind, p in precisions.items()}, pictured))
        for matches, pictures in gathered:
            pictured.update(pictures)
            for kind, precision in precisions.items():
                precision.matches.update(matches[kind])
    return precisions, pictured


# ---- pictures -------------------------------------------------------------------------------------------------------

PICTURED, TILE = 4, 320  # number of images; long edge of a tile in pixels
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999"]


def tile(image: Annotated, boxes: np.ndarray, labels: np.ndarray, masks: np.ndarray | None) -> Image.Image:
    """The image with its masks, or boxes without any, coloured by class, or masks one by one if there is one class."""
    pixels, _ = load_example(image, TILE, TILE)
    h, w = pixels.shape[1:]
    one = len({*labels.tolist()}) < 2
    colours = [COLOURS[(n if one and masks is not None else k) % len(COLOURS)] for n, k in enumerate(labels)]
    if masks is not None and len(masks):
        for mask, colour in zip(masks, colours):  # one by one: torchvision blanks overlaps
            shape = torch.tensor(np.asarray(Image.fromarray(mask).resize((w, h), 0)))
            pixels = draw_segmentation_masks(pixels, shape, alpha=0.5, colors=colour)
    elif len(boxes):
        scaled = torch.tensor(boxes * np.array([w / image.width, h / image.height] * 2), dtype=torch.float32)
        pixels = draw_bounding_boxes(pixels, scaled, colors=colours, width=2)
    return to_pil_image(pixels)


def save_detections(images: list[Annotated], rows: dict[str, dict[int, dict]], classes: list[str], path: Path) -> None:
    """A row for each of the first test images: the truth, then each network's detections with a score of .5 or more.
    rows: {network: detections from `evaluate`}."""
    lines = []
    for n, truth in enumerate(images[:PICTURED]):
        masks = np.array([draw() for draw in truth.masks], bool) if truth.masks else None
        lines.append([tile(truth, truth.boxes, truth.labels, masks)])
        for pictured in rows.values():
            found = pictured[n]
            sure = found["scores"] >= 0.5
            shown = found["masks"][sure] if found["masks"] is not None else None
            lines[-1].append(tile(truth, found["boxes"][sure], found["labels"][sure], shown))
    heights = [max(cell.height for cell in line) + 8 for line in lines]
    columns = {name: 8 + k * (TILE + 8) for k, name in enumerate(("truth", *rows))}
    image = page((TILE + 8) * len(columns) + 8, sum(heights) + 22, columns)
    draw, x = ImageDraw.Draw(image), 8
    for name, colour in zip(classes, COLOURS):
        draw.text((x, 30), name, colour, font_size=14)
        x += 16 + draw.textlength(name, font_size=14)
    y = 52
    for line, height in zip(lines, heights):
        for k, cell in enumerate(line):
            image.paste(cell, (8 + k * (TILE + 8), y))
        y += height
    image.save(path)


# ---- the table ------------------------------------------------------------------------------------------------------

COLUMNS = ("AP", "AP50", "AP75", "small", "medium", "large")


def cell(values: list[float | None]) -> str:
    """Mean and deviation over seeds; empty if there are no such objects."""
    if None in values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table_of(results: dict[str, list[dict[str, dict]]], classes: list[str], voc: bool) -> list[str]:
    """results: {network: [{"box" or "mask": Precision.summary()} of each seed]}."""
    columns = [*COLUMNS, *(("VOC07 AP", "VOC07 AP50") if voc else ())]
    rows = []
    for network, seeds in results.items():
        row = {"network": network}
        for kind in seeds[0]:
            for name in columns if kind == "box" else COLUMNS:
                row[f"{kind} {name}"] = cell([seed[kind][name] for seed in seeds])
        if 1 < len(classes) <= 20:
            for k, name in enumerate(classes):
                row[f"{name} AP"] = cell([seed["box"]["classes"][k] for seed in seeds])
        rows.append(row)
    return markdown(rows)


# ---- flags ----------------------------------------------------------------------------------------------------------

# Learning rates are for a batch of 16 and scale with it, as in Detectron2
SCHEDULES = {
    "small": {
        "iterations": 150,
        "batch_size": 4,
        "lr": 0.08,
        "warmup": 30,
        "clip_grad": 5.0,
        "image_size": [160],
        "fpn_channels": 64,
        "finest_stride": 8,
        "anchor_scale": 2.0,
        "rois": 64,
    },
    "1x": {
        "iterations": 90_000,
        "batch_size": 16,
        "lr": 0.02,
        "warmup": 1000,
        "clip_grad": 0.0,
        "image_size": [640, 672, 704, 736, 768, 800],
        "fpn_channels": 256,
        "finest_stride": 4,
        "anchor_scale": 8.0,
        "rois": 512,
    },
}
SCHEDULES["2x"] = SCHEDULES["1x"] | {"iterations": 180_000}
SCHEDULES["voc"] = SCHEDULES["1x"] | {
    "iterations": 24_000,
    "warmup": 100,
    "image_size": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
}
FEW = 2000  # with fewer training images, the small schedule is the default


def get_parser() -> Parser:
    on_off = argparse.BooleanOptionalAction
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--weights", required=True, help="backbone.pth, its backbone.json beside it; or torchvision's and --arch")
    add("--data", required=True, help="a folder as of COCO, VOC, or of images with label PNGs")
    add("--masks", action="store_true", help="Mask R-CNN: instance segmentation too")
    add("--untrained", action=on_off, default=True, help="the same network untrained too: what training has added")
    add("--seeds", type=int, default=3, help="runs of each network, from --seed on: mean and deviation")
    add("--output-dir", help="left out, detect-<data> beside the weights")
    add("--arch", choices=ARCHS, help="of the network, only where backbone.json is missing")
    add("--width", type=float, help="multiplies the channels; only where backbone.json is missing")
    add("--stem", choices=["imagenet", "small"], help="the first layers; only where backbone.json is missing")
    group = parser.add_argument_group("training (left out: as the schedule has it)")
    add = group.add_argument
    add("--schedule", choices=SCHEDULES, help=f"1x and 2x are COCO's, voc is MoCo's; small below {FEW:,} images")
    add("--iterations", type=int, help="steps; the rate falls to a tenth after 2/3 and 8/9 of them")
    add("--batch-size", type=int, help="images a step, over all ranks together")
    add("--lr", type=float, help="at batch size 16, scaled with it; a ViT's, by AdamW, 1e-4")
    add("--warmup", type=int, help="steps of linear warm-up")
    add("--clip-grad", type=float, help="largest norm of all gradients; 0: any")
    add("--freeze-bn", action="store_true", help="keep the pre-trained backbone's BN fixed (not the untrained one's)")
    add("--image-size", type=int, nargs="+", help="of the short side; of several one is drawn, the last is tested with")
    add("--longest", type=int, default=1333, help="that the long side may be")
    add("--fpn-channels", type=int, help="of the pyramid, and of the heads")
    add("--finest-stride", type=int, choices=[4, 8, 16], help="of the pyramid's first level")
    add("--anchor-scale", type=float, help="an anchor's edge, in strides of its level")
    add("--rois", type=int, help="proposals of an image that the box head learns from")
    add("--max-detections", type=int, default=100, help="of an image; more where images have more objects")
    add("--amp", action=on_off, help="bf16 autocast; left out: on CUDA, and on a CPU with AMX")
    add("--print-every", type=int, default=50, help="steps between lines on the console")
    add("--tensorboard", action="store_true", help="the log's numbers go there too")
    add("--resume", action=on_off, default=True, help="go on from a checkpoint of this command")
    add("--checkpoint-minutes", type=float, default=5.0, help="between checkpoints; 0: at the end alone")
    add("--bench", action="store_true", help="time the parts of a step and stop; leaves no run behind")
    launch.machine_flags(parser.add_argument_group("machine"))
    return parser


FREE_FLAGS = {"output_dir", "workers", "print_every", "resume", "checkpoint_minutes", "device", "bench", "seeds"}
FREE_FLAGS |= {"untrained", "weights", "tensorboard", "rank_timeout"}  # the weights themselves are among the facts


def settle(args: argparse.Namespace, images: int, body: nn.Module, device: torch.device) -> argparse.Namespace:
    """A copy of args, completed from the schedule for so many training images. Raises ValueError if invalid."""
    args = copy.copy(args)
    args.schedule = args.schedule or ("small" if images < FEW else "1x")
    schedule = SCHEDULES[args.schedule] | ({"lr": 1e-4} if isinstance(body, ViT) else {})
    for name, value in schedule.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.amp = launch.bf16_pays(device) if args.amp is None else args.amp
    least = dict.fromkeys(("iterations", "batch_size", "fpn_channels", "rois", "max_detections", "seeds", "longest"), 1)
    least |= {"seed": 0, "warmup": 0, "clip_grad": 0, "checkpoint_minutes": 0, "print_every": 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"{launch.dashed(name)} {getattr(args, name)}: must be {low} or above")
    if args.lr <= 0 or args.anchor_scale <= 0:
        raise ValueError(f"--lr {args.lr:g} and --anchor-scale {args.anchor_scale:g} must be above 0")
    if min(args.image_size) < 32 or args.longest < max(args.image_size):
        raise ValueError("--image-size: 32 pixels or more, and none above --longest")
    if args.batch_size % ranks()[1]:
        raise ValueError(f"--batch-size {args.batch_size} does not divide by {ranks()[1]} ranks")
    return args


# ---- the script -----------------------------------------------------------------------------------------------------


def bench(args, detector, batches, optimizer, device, steps: int = 12, warm_up: int = 3) -> dict[str, float]:
    """Prints and returns the median seconds of each part of a step."""
    detector.train()
    seconds: dict[str, list[float]] = {"images": [], "forward": [], "backward": [], "optimiser": []}
    for step in range(warm_up + steps):
        times = [clock(device)]
        batch = batches(step)
        times.append(clock(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            loss = sum(losses_of(detector, detector, batch).values())
        times.append(clock(device))
        loss.backward()
        times.append(clock(device))
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock(device))
        if step >= warm_up:
            for part, begun, ended in zip(seconds.values(), times, times[1:]):
                part.append(ended - begun)
    median = {part: statistics.median(times) for part, times in seconds.items()}
    total = sum(median.values())
    parts = "  ".join(f"{part} {1e3 * t:.0f} ms ({100 * t / total:.0f} %)" for part, t in median.items())
    say(f"{args.batch_size / total:.1f} images/s: {parts}")
    say(f"peak memory {peak_memory(device) / 2**20:,.0f} MiB")
    return median


def run(
    args: argparse.Namespace,
    body: nn.Module,
    facts: dict,
    splits: dict[str, list[Annotated]],
    classes: list[str],
    folder: Path,
    command: str,
    device: torch.device,
) -> tuple[dict[str, Precision], dict[int, dict]]:
    """Trains a detector with args.seed and tests it. Returns what `evaluate` does."""
    with user_errors():
        torch.manual_seed(args.seed)
        detector = build_detector(args, launch.synced(body, device), facts, len(classes)).to(device)
        detector.backbone.to(memory_format=memory_format(device))  # but not the heads, whose crops are contiguous
        batches = DetectionBatches(args, splits["train"], device)
        optimizer = optimizer_of(args, detector)
        if args.bench:
            return bench(args, detector, batches, optimizer, device)
        folder.mkdir(parents=True, exist_ok=True)
        meter = Meter(
            args.iterations, dict.fromkeys(("loss", *PARTS), batches), batches.names, folder, args.print_every
        )
        known = {launch.dashed(name): value for name, value in vars(args).items() if name not in FREE_FLAGS}
        weights = b"".join(x.cpu().numpy().tobytes() for x in body.state_dict().values())
        objects = b"".join(x.tobytes() for of in splits.values() for i in of for x in (i.boxes, i.labels))
        known["set of weights (--weights)"] = [zlib.crc32(weights)]
        known["set of images (--data)"] = [zlib.crc32(objects)]
        things = {"detector": detector, "optimizer": optimizer, "meter": meter}
        how = args.iterations, args.checkpoint_minutes, args.resume, None, args.tensorboard
        checkpoint = Checkpoint(folder, things, known, command, device, *how)
    train(args, detector, batches, optimizer, meter, checkpoint, device)
    kinds, pictured = evaluate(args, detector, splits["test"], len(classes), device)
    if is_main():
        with user_errors():
            save_atomic(
                {k: x.detach().cpu().contiguous() for k, x in detector.state_dict().items()}, folder / "detector.pth"
            )
    what = {"classes": classes, "arch": facts["arch"], "mean": facts["mean"], "std": facts["std"], "command": command}
    what |= {"scores": {kind: p.summary() for kind, p in kinds.items()}, "versions": versions()}
    write_json(what, folder / "detector.json")
    return kinds, pictured


def curves_of(kinds: dict[str, Precision]) -> dict[str, list[float]]:
    """{"box, IoU 0.5": precision at the 101 RECALLS, mean over classes, ...}, for boxes and masks, IoU .5 and .75."""
    curves = {}
    for kind, precision in kinds.items():
        for iou, row in ((0.5, 0), (0.75, 5)):
            of = precision.curves()[0][row, 0]  # (C, 101)
            curves[f"{kind}, IoU {iou:g}"] = of[~np.isnan(of[:, 0])].mean(0)
    return curves


def conditions(args: argparse.Namespace, facts: dict, splits: dict[str, list[Annotated]], classes: list[str]) -> str:
    """The caption of the table: what is measured, and how."""
    images = len(splits["train"])
    epochs = args.iterations * args.batch_size / images
    text = (
        f"{describe(facts['arch'])} x{facts['width']:g} ({args.weights}), {Path(args.data).name}: "
        f"{images:,} training images, {len(splits['test']):,} test images, {len(classes)} classes. "
        f"Schedule {args.schedule}: {args.iterations:,} steps of {args.batch_size} ({epochs:.1f} epochs), "
        f"lr {args.lr * args.batch_size / 16:g} (--lr {args.lr:g} is for a batch of 16), "
        f"{args.image_size[-1]} px, {args.seeds} seeds; AP by COCO's rules on the test images, in %."
    )
    return text + " BN is frozen, but for the untrained network's." * args.freeze_bn


def main(args: argparse.Namespace) -> dict[str, list[dict[str, dict]]]:
    """{network: [{"box" or "mask": Precision.summary()} of each seed]}"""
    command = launch.command_line(Path(__file__).name, get_parser(), args)
    with user_errors():
        device = launch.setup(args.device, args.deterministic, args.rank_timeout)
        backbone, facts = load_backbone(args.weights, args.arch, args.width, args.stem)
        splits, classes = read(args.data, args.masks)
        args = settle(args, len(splits["train"]), backbone, device)
        data = Path(args.data).name
        folder = Path(args.output_dir or Path(args.weights).parent / f"detect-{data}")
        text = conditions(args, facts, splits, classes)
        say(text)
        more = sum(len(image.boxes) > args.max_detections for image in splits["test"])
        if more:
            say(f"{more} test images have more than {args.max_detections} objects: --max-detections")
        if not args.bench:
            folder.mkdir(parents=True, exist_ok=True)
    results, pictured, curves = {}, {}, {}
    for network in ("pre-trained", "untrained") if args.untrained else ("pre-trained",):
        drawn = {}
        for seed in range(args.seed, args.seed + args.seeds):
            own, body = copy.copy(args), copy.deepcopy(backbone)
            own.seed = seed
            if network == "untrained":
                own.freeze_bn = False
                torch.manual_seed(seed)
                body, _ = build_backbone(facts["arch"], facts["stem"], facts["width"])
            found = run(own, body, facts, splits, classes, folder / f"{network}-seed{seed}", command, device)
            if args.bench:
                return found
            kinds, pictures = found
            results.setdefault(network, []).append({kind: p.summary() for kind, p in kinds.items()})
            pictured.setdefault(network, pictures)
            for name, curve in curves_of(kinds).items():
                drawn.setdefault(name, []).append(curve)
            said = results[network][-1]
            say(f"{network}, seed {seed}: " + ", ".join(f"{kind} AP {cell([s['AP']])}" for kind, s in said.items()))
        for name, of in drawn.items():
            curves.setdefault(name, {})[network] = list(zip(RECALLS.tolist(), np.mean(of, 0).tolist()))
    voc = any((place / "ImageSets").is_dir() for place in (Path(args.data), *Path(args.data).glob("VOC20*")))
    lines = table_of(results, classes, voc)
    say("\n".join(lines))
    if is_main():
        with user_errors():
            write_atomic("\n".join([text, "", *lines, ""]), folder / "detect_eval.md")
            save_detections(splits["test"], pictured, classes, folder / "detections.png")
            title = f"Precision over recall on {data}, means over classes and seeds"
            write_atomic(draw_curves(curves, title, "recall", (0, 1)), folder / "precision.svg")
    barrier()
    say(f"wrote {folder / 'detect_eval.md'}, detections.png, precision.svg")
    return results


if __name__ == "__main__":
    launch.run(main, get_parser())
