"""Trains on two hosts, cuts the cable between them, mends it, and goes on.

    python tests/two_hosts.py               # as root: the hosts are network namespaces of this machine

On each host torchrun starts one rank, as on a cluster. The same command on one host with two ranks, never cut, is what
the weights must equal, bit for bit. Both hosts must end by themselves within --rank-timeout and what torchrun adds.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
TINY = "--max-images 160 --width 0.0625 --batch-size 16 --epochs 20 --held-out 0.2 --knn-every 20 --device cpu"
LAUNCH = [sys.executable, "-m", "torch.distributed.run"]


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts(name: str):
    """Network namespaces <name>0 and <name>1, 10.77.0.1 and 10.77.0.2, joined by a cable: cable(up) plugs it."""
    hosts = [f"{name}{k}" for k in range(2)]
    try:
        for host in hosts:
            ip(f"netns add {host}")
        ip(f"link add {hosts[0]} netns {hosts[0]} type veth peer name {hosts[1]} netns {hosts[1]}")
        for k, host in enumerate(hosts):
            ip(f"-n {host} addr add 10.77.0.{k + 1}/24 dev {host}")
            ip(f"-n {host} link set lo up")
            ip(f"-n {host} link set {host} up")
        yield hosts, lambda up: ip(f"-n {hosts[0]} link set {hosts[0]} {'up' if up else 'down'}")
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def start(hosts: list[str], folder: Path, *flags: str) -> list[subprocess.Popen]:
    """torchrun on each host; the run's folder is on a drive that both see."""
    started = []
    for k, host in enumerate(hosts):
        nodes = ["--nnodes", "2", "--node-rank", str(k), "--master-addr", "10.77.0.1", "--master-port", "29500"]
        command = ["ip", "netns", "exec", host, *LAUNCH, *nodes, ROOT / "pretrain.py", *TINY.split(), *flags]
        with open(folder.with_name(f"{folder.name}-{k}.log"), "a") as log:
            environment = os.environ | {"GLOO_SOCKET_IFNAME": host}
            command += ["--output-dir", folder]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return started


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)["states"]["method"]


def cut_and_mend(folder: Path, timeout: float) -> list[float]:
    """Seconds from the cut until each host has ended. timeout: of ranks, in seconds. Raises AssertionError."""
    whole, cut = folder / "whole", folder / "cut"
    command = [*LAUNCH, "--standalone", "--nproc-per-node", "2", ROOT / "pretrain.py", *TINY.split()]
    subprocess.run([*command, "--output-dir", whole], check=True, capture_output=True)
    flags = ["--rank-timeout", str(timeout / 60), "--checkpoint-minutes", "0.01"]
    with two_hosts(f"host{os.getpid()}-") as (hosts, cable):
        ranks = start(hosts, cut, *flags)
        while not (cut / "checkpoint.pth").exists() and all(rank.poll() is None for rank in ranks):
            time.sleep(0.05)
        cable(up=False)
        begun, seconds = time.time(), []
        for rank in ranks:
            assert rank.wait(timeout + 60) == 1
            seconds.append(time.time() - begun)
        logs = [folder / f"cut-{k}.log" for k in range(2)]
        assert all("lost the other ranks" in log.read_text() for log in logs)
        cable(up=True)
        assert [rank.wait(300) for rank in start(hosts, cut, *flags)] == [0, 0], logs[0].read_text()
    first = json.loads((cut / "log.txt").read_text().splitlines()[0])
    assert first["ranks"] == 2 and 0 < first["resumed"][0]["after"] < 8 * 20, first
    differs = [name for name, value in weights(whole).items() if not torch.equal(value, weights(cut)[name])]
    assert not differs, differs
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--timeout", type=float, default=10.0, help="of ranks, in seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        seconds = cut_and_mend(Path(place), args.timeout)
    print(
        f"the cable was cut: the hosts ended after {seconds[0]:.1f} and {seconds[1]:.1f} s, of which {args.timeout:g}"
    )
    print("are --rank-timeout; it was mended: the same command ended with the uninterrupted run's weights")
