"""The linear probe beside scikit-learn's logistic regression with its best C: test accuracy and CPU seconds.

    OMP_NUM_THREADS=1 python tests/bench_probe.py --weights runs/*/backbone.pth --data my/cifar10 my/textures my/flowers

Features of at most 5,000 training images a data set, at the size that a network was trained at. Both sides standardise
them alike, and choose among the same five strengths of decay on the same held-out tenth. scikit-learn is installed
below runs/peers at the first call.
"""

import argparse
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoint import load_backbone
from data import load_images
from linear_eval import DECAYS, extract, linear_probe, markdown

PEERS, CPU = Path("runs/peers"), torch.device("cpu")


def theirs(train, train_labels, test, test_labels) -> float:
    from sklearn.linear_model import LogisticRegression

    mean, std = train.mean(0), train.std(0)
    std = std.clamp(min=1e-3 * std.max().item() + 1e-12)
    x, x_test = ((h - mean).div(std).numpy() for h in (train, test))
    y, order = train_labels.numpy(), torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).numpy()
    out, rest = order[: int(0.1 * len(order))], order[int(0.1 * len(order)) :]

    def fit(rows, decay):
        return LogisticRegression(C=1 / (decay * len(rows)), max_iter=1000).fit(x[rows], y[rows])

    scores = [fit(rest, decay).score(x[out], y[out]) for decay in DECAYS]
    return fit(order, DECAYS[scores.index(max(scores))]).score(x_test, test_labels.numpy())


def ours(*sets) -> float:
    return linear_probe(*sets)["linear"]


def main(args: argparse.Namespace) -> None:
    rows = []
    for weights, source in product(args.weights, args.data):
        backbone, facts = load_backbone(weights)
        size = facts.get("resized_to") or 32
        train, test = (load_images(source, split, size, limit=5000) for split in ("train", "test"))
        h, h_test = (extract(backbone, x.pixels, facts["mean"], facts["std"], CPU) for x in (train, test))
        row = {"data": Path(source).name, "features": str(h.shape[1]), "classes": str(len(train.classes))}
        for name, probe in (("ours", ours), ("scikit-learn", theirs)):
            begun = time.process_time()
            row[name] = f"{100 * probe(h, train.labels, h_test, test.labels):.2f}"
            row[f"{name}, CPU s"] = f"{time.process_time() - begun:.2f}"
        rows.append(row)
        print("\n".join(markdown([row])[2:]), flush=True)
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", nargs="+", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    args = parser.parse_args()
    sys.path.append(str(PEERS))
    try:
        import sklearn  # noqa: F401
    except ImportError:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS)]
        subprocess.run(
            [*pip, "scikit-learn", "scipy", "joblib", "cloudpickle", "threadpoolctl", "narwhals"], check=True
        )
    main(args)
