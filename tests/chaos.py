"""Kills runs at random moments and compares what they end with to an uninterrupted run, bit for bit.

    python tests/chaos.py                   # 40 kills, minutes
    python tests/chaos.py --kills 200 --seed 1

A kill is SIGKILL or SIGTERM, of the process or of all that belong to the run (as a cluster does it), or of one rank
alone, after which torchrun restarts both.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TINY = "--max-images 160 --width 0.0625 --batch-size 16 --epochs 4 --held-out 0.2 --knn-every 2 --device cpu"
BOTH = "--space heads resnet --image-size 16 --target-macs 0.5xresnet18 --strategy gradient"
SUPERNET = "--space resnetk1 --image-size 16 --target-macs 0.25xresnet18 --method simclr --candidates 20 --finalists 3"
RUNS = {  # name: (script, ranks, flags)
    "pretrain-moco-1": ("pretrain.py", 1, "--method moco"),
    "pretrain-diet-1": ("pretrain.py", 1, "--method diet --optimizer adamw"),
    "search-heads-1": ("search.py", 1, ""),
    "search-both-1": ("search.py", 1, BOTH),
    "search-supernet-1": ("search.py", 1, SUPERNET),
    "pretrain-moco-2": ("pretrain.py", 2, "--method moco"),
    "pretrain-diet-2": ("pretrain.py", 2, "--method diet"),
    "search-heads-2": ("search.py", 2, ""),
}


def start(name: str, folder: Path) -> subprocess.Popen:
    script, ranks, flags = RUNS[name]
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", "2", "--standalone"]
    command = [*launch, str(ROOT / script), *TINY.split(), *flags.split(), "--checkpoint-minutes", "0.005"]
    command += ["--output-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def family(pid: int) -> list[int]:
    """A process and all below it; torchrun gives each rank a session of its own."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    children: dict[int, list[int]] = {}
    for child, parent in zip(map(int, table[::2]), map(int, table[1::2])):
        children.setdefault(parent, []).append(child)
    found = [pid]
    for p in found:
        found += children.get(p, [])
    return found


def kill(process: subprocess.Popen, ranks: int, rng: random.Random) -> str:
    """Does it, waits for the end of what has an end, and says what it did."""
    number, one = rng.choice([signal.SIGKILL, signal.SIGTERM]), ranks > 1 and rng.random() < 0.5
    first, *others = family(process.pid)
    everyone = [first, *others] if number == signal.SIGKILL else [first]  # torchrun passes a SIGTERM on
    targets = [rng.choice(others)] if one and others else everyone
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if targets[0] == first:
        process.wait()
    return f"{number.name} of {'all' if targets[0] == first else 'one rank'}"


def chaos(folder: Path, kills: int, seed: int, runs: list[str], say=lambda text: None) -> int:
    """How many kills there were, at least `kills` over all the runs. Raises AssertionError for weights that differ."""
    rng, done = random.Random(seed), 0
    took, whole = {}, {}
    for name in runs:
        begun = time.time()
        process = start(name, folder / f"{name}-whole")
        assert process.wait() == 0, (folder / f"{name}-whole.log").read_text()[-2000:]
        took[name] = time.time() - begun
        whole[name] = torch.load(folder / f"{name}-whole" / "checkpoint.pth", weights_only=True)["states"]["method"]
    for attempt in range(10**6):
        for name in runs:
            if done >= kills:
                return done
            cut, log, deeds = folder / f"{name}-{attempt}", folder / f"{name}-{attempt}.log", []
            process, most, starts = start(name, cut), rng.randint(1, 4), 1
            while process.poll() is None or process.returncode:
                if process.poll() is not None:  # killed, or ended by what happened to it
                    assert starts <= len(deeds), f"{name} failed by itself: {log.read_text()[-2000:]}"
                    process, starts = start(name, cut), starts + 1
                try:
                    wait = rng.uniform(0, 1.2 * took[name]) if len(deeds) < most else None
                    process.wait(wait)
                except subprocess.TimeoutExpired:
                    deeds.append(kill(process, RUNS[name][1], rng))
            done += len(deeds)
            assert "AttributeError" not in log.read_text(), f"{name} stumbled: {log.read_text()[-2000:]}"
            method = torch.load(cut / "checkpoint.pth", weights_only=True)["states"]["method"]
            for file in folder.glob(f"{name}-whole/arch.json"):  # of a search: what was found
                found, other = (json.loads(path.read_text()) for path in (file, cut / "arch.json"))
                assert found["backbone"] == other["backbone"] and found.get("heads") == other.get("heads"), name
            differs = [k for k, v in whole[name].items() if not torch.equal(v, method[k])]
            say(f"{done:4d}  {name}: {', '.join(deeds) or 'not killed'}: {'differs' if differs else 'equal'}")
            assert not differs, f"{name} ({cut}), after {deeds}: {differs[0]} and {len(differs) - 1} more differ"
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        n = chaos(Path(place), args.kills, args.seed, args.runs, lambda text: print(text, flush=True))
    print(f"{n} kills: every run ended with the uninterrupted run's weights")
