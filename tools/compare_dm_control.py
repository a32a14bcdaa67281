#!/usr/bin/env python3
"""Plays the same actions with dm_control and with `orrery inspect rollout --quality=reference` and compares what came back:
pictures byte for byte, states and rewards within 1e-6.

    pip install dm_control==1.0.50 mujoco==3.17.0 safetensors==0.8.0
    MUJOCO_GL=osmesa tools/compare_dm_control.py [--orrery BINARY] [--steps N] [--seed N]
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "libs/envs/testdata"))
from make_golden import TASKS, play  # noqa: E402


def ours(orrery, task, numbers, folder):
    """Arrays of `orrery inspect rollout`: reward [T], qpos, qvel, image [T+1, 64, 64, 3], …"""
    given = {"action": np.array(numbers["action"]), "qpos": np.array(numbers["qpos"][0]), "qvel": np.array(numbers["qvel"][0])}
    save_file(given, folder / "input.safetensors")
    subprocess.run([orrery, "inspect", "rollout", f"--env={task}", "--quality=reference",
                    f"--input={folder / 'input.safetensors'}", f"--out={folder / 'output.safetensors'}"],
                   check=True, stdout=subprocess.DEVNULL)
    return load_file(folder / "output.safetensors")


def compare(orrery, task, steps, seed):
    domain, name = TASKS[task]
    numbers, pixels = play(domain, name, steps, steps + 1, seed)
    large = np.frombuffer(pixels, np.uint8)[: (steps + 1) * 64 * 64 * 3].reshape(steps + 1, 64, 64, 3)
    with tempfile.TemporaryDirectory() as folder:
        found = ours(orrery, task, numbers, pathlib.Path(folder))
    different = int((found["image"] != large).sum())
    largest = {key: float(np.abs(found[key] - np.array(numbers[key])).max()) for key in ("reward", "qpos", "qvel")}
    print(f"{task}: {steps} steps, {different} of {large.size} bytes of pixels differ; largest differences "
          + ", ".join(f"{key} {value:.2g}" for key, value in largest.items()))
    return different == 0 and max(largest.values()) <= 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orrery", default=ROOT / "build/bin/orrery")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    same = [compare(args.orrery, task, args.steps, args.seed) for task in TASKS]
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
