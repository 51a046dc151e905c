"""How many views a CPU-second: MultiCrop against torchvision's PIL transforms, an image at a time, in one run.

    python tests/bench_views.py

Both make the two SimSiam views of 32 px images that are in memory already. The two take turns, on one thread, and the
figure is the median over rounds of the ratio within a round, so that a busy machine slows both alike.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from views import MultiCrop, make_shapes


def main(batch: int = 256, rounds: int = 15) -> float:
    torch.set_num_threads(1)
    images = make_shapes(batch)
    crop, generator = MultiCrop("simsiam", 32), torch.Generator().manual_seed(0)
    pil = [to_pil_image(p) for p in images.pixels]
    per_image = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(crop.mean.flatten().tolist(), crop.std.flatten().tolist()),
        ]
    )

    def batched():
        crop(images.pixels, generator)

    def one_by_one():
        for _ in range(2):
            torch.stack([per_image(image) for image in pil])

    rates: dict[str, list[float]] = {"MultiCrop": [], "torchvision": []}
    for i in range(rounds + 2):
        for name, make in (("MultiCrop", batched), ("torchvision", one_by_one)):
            start = time.process_time()
            make()
            if i >= 2:  # the first rounds warm up
                rates[name].append(2 * batch / (time.process_time() - start))
    ratio = statistics.median(a / b for a, b in zip(*rates.values()))
    for name, values in rates.items():
        print(
            f"{name:12} {statistics.median(values):8,.0f} views a CPU-second ({min(values):,.0f} to {max(values):,.0f})"
        )
    print(f"ratio {ratio:.1f}")
    return ratio


if __name__ == "__main__":
    main()
