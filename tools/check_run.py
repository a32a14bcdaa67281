#!/usr/bin/env python3
"""Checks a finished run folder: the files are there and the loss fell. Says how long updates waited for their batches. Exit
status 0, or 1 with the reason.

    tools/check_run.py RUN_DIR
"""
import csv
import glob
import os
import statistics
import sys


def fail(message):
    print(f"check_run: {message}", file=sys.stderr)
    sys.exit(1)


def main():
    if len(sys.argv) != 2:
        fail("usage: tools/check_run.py RUN_DIR")
    run = sys.argv[1]
    for pattern in ("config.textproto", "metrics.csv", "episodes.csv", "film.webp", "events.out.tfevents.*",
                    "checkpoints/*.safetensors", "snapshots/latest.safetensors"):
        found = glob.glob(os.path.join(run, pattern))
        if not found or any(os.path.getsize(f) == 0 for f in found):
            fail(f"{os.path.join(run, pattern)}: missing or empty")
    with open(os.path.join(run, "metrics.csv"), newline="") as f:
        updates = list(csv.DictReader(f))
    losses = [float(update["loss_total"]) for update in updates]
    if len(losses) < 20:
        fail(f"metrics.csv: {len(losses)} updates, expected at least 20")
    tenth = len(losses) // 10
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if not last < first:
        fail(f"the loss did not fall: {first:.3f} in the first tenth of the updates, {last:.3f} in the last")
    wait, update = (statistics.median(float(one[name]) for one in updates) for name in ("batch_wait_seconds", "update_seconds"))
    print(f"check_run: {len(losses)} updates, loss {first:.3f} -> {last:.3f}; median wait for a batch {1e6 * wait:.0f} µs, "
          f"{100 * wait / update:.2f} % of an update")


main()
