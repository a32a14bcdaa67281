#!/usr/bin/env python3
"""Times plans and updates of Orrery and of plain PyTorch, in turns on one machine, and prints the ratios.

    pip install torch==2.11.0 numpy
    tools/bench/compare.py --reference=SCRIPT [--orrery=BINARY] [--rounds=3] [--batches=1,8] [--skip-update]

SCRIPT times the same sizes in PyTorch (PlaNet's, 6 actions) and prints one object per line as `orrery bench --json` does:
{"what": "plan", "batch": 1, "dtype": "float32", "seconds": 0.96}. It takes --dtype, --plans and --skip-update.
Each round runs both; a figure is the median over the rounds. Both use every processor.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from collections import defaultdict

ROOT = pathlib.Path(__file__).resolve().parents[2]


def lines(command):
    """The JSON objects that a command prints."""
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def key(result):
    return result["what"], result["batch"]


def measure(args, precision):
    """Seconds by (side, what, batch), one per round."""
    seconds = defaultdict(list)
    for _ in range(args.rounds):
        reference = [sys.executable, args.reference, f"--dtype={precision}", f"--plans={args.batches}"]
        commands = {
            "pytorch": [reference + (["--skip-update"] if args.skip_update else [])],
            "orrery": [[args.orrery, "bench", "planner", "--json", f"--batch={args.batches}", f"--precision={precision}"]],
        }
        if not args.skip_update and precision == "float32":
            commands["orrery"].append([args.orrery, "bench", "learner", "--json", "--warm_up=1", "--repeats=3"])
        for side, runs in commands.items():
            for result in (result for run in runs for result in lines(run)):
                seconds[(side, *key(result))].append(result["seconds"])
    return {what: statistics.median(values) for what, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--orrery", default=str(ROOT / "build/bin/orrery"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--skip-update", action="store_true")
    args = parser.parse_args()
    measured = {precision: measure(args, precision) for precision in ("float32", "bfloat16")}
    for precision, seconds in measured.items():
        for (side, what, batch), ours in seconds.items():
            if side != "orrery":
                continue
            for peer_precision, peers in measured.items():
                peer = peers.get(("pytorch", what, batch))
                if peer is not None:
                    print(json.dumps({"what": what, "batch": batch, "orrery": precision, "seconds": round(ours, 4),
                                      "pytorch": peer_precision, "pytorch_seconds": round(peer, 4),
                                      "ratio": round(peer / ours, 2)}), flush=True)


if __name__ == "__main__":
    main()
