"""Trains for an hour and says whether its memory grows. The peak of the first epochs still moves by an activation or
two (the blocks of the allocator settle); after a tenth of the run it has to stay.

    python tests/soak.py
    python tests/soak.py --minutes 5 --script search.py --flags --space resnet --method simclr
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--script", choices=["pretrain.py", "search.py"], default="pretrain.py")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for the script; the last of all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        more = ["--epochs", "100000", "--knn-every", "1", "--output-dir", folder, *args.flags]
        process = subprocess.Popen([sys.executable, ROOT / args.script, *more], stdout=subprocess.DEVNULL)
        try:
            process.wait(60 * args.minutes)
            sys.exit(f"{args.script} ended by itself, with status {process.returncode}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        process.wait()
        lines = [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()[1:]]
    peaks = [line["peak_mib"] for line in lines if "peak_mib" in line]
    tenth, half = len(peaks) // 10, len(peaks) // 2
    print(f"{args.minutes:g} minutes, {len(peaks)} epochs: peak memory {peaks[0]:,.1f} MiB after the first, ", end="")
    print(f"{peaks[tenth]:,.1f} after a tenth, {peaks[half]:,.1f} after half of them, {peaks[-1]:,.1f} after the last")
    sys.exit(peaks[-1] > 1.01 * peaks[tenth])
