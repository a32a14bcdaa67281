#!/usr/bin/env python3
"""Plays the same actions with dm_control and with `orrery inspect rollout --quality=reference` and compares what came back:
pictures byte for byte, states, rewards and observations within 1e-6. Each task is played from several random starts, which
dm_control chooses; contacts make a difference of the last bit grow, so that a start should not be followed for too long.

    pip install dm_control==1.0.50 mujoco==3.17.0 safetensors==0.8.0
    MUJOCO_GL=osmesa tools/bench/compare_dm_control.py [TASK …] [--orrery BINARY] [--starts N] [--steps N] [--seed N]
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "libs/envs/testdata"))
from make_golden import TASKS, play  # noqa: E402

GIVEN = ("qpos", "qvel", "target")
TOLERANCE = 1e-6


def ours(orrery, task, given, folder):
    """Arrays of `orrery inspect rollout`: reward [T], qpos, qvel, image [T+1, 64, 64, 3], …"""
    save_file(given, folder / "input.safetensors")
    subprocess.run([orrery, "inspect", "rollout", f"--env={task}", "--quality=reference",
                    f"--input={folder / 'input.safetensors'}", f"--out={folder / 'output.safetensors'}"],
                   check=True, stdout=subprocess.DEVNULL)
    return load_file(folder / "output.safetensors")


def compare(orrery, task, starts, steps, seed):
    numbers, pictures = play(TASKS[task], starts, steps, starts * (steps + 1), seed)
    expected = {key: np.array(values) for key, values in numbers.items() if key not in ("starts", "frames")}
    expected["image"] = pictures[64]
    largest = {}
    different = 0
    for start in range(starts):
        of_steps = slice(start * steps, (start + 1) * steps)
        of_rows = slice(start * (steps + 1), (start + 1) * (steps + 1))
        theirs = {key: values[of_steps if key in ("action", "reward") else of_rows] for key, values in expected.items()}
        given = {key: theirs[key][0] for key in GIVEN if key in theirs}
        with tempfile.TemporaryDirectory() as folder:
            found = ours(orrery, task, {"action": theirs.pop("action"), **given}, pathlib.Path(folder))
        if found.keys() != theirs.keys():
            sys.exit(f"{task}: got {sorted(found)}, dm_control has {sorted(theirs)}")
        different += int((found.pop("image") != theirs.pop("image")).sum())
        for key, values in theirs.items():
            largest[key] = max(largest.get(key, 0.0), float(np.abs(found[key] - values).max()))
    rewards = expected["reward"]
    print(f"{task}: {starts} starts of {steps} steps, rewards {rewards.min():.3g} to {rewards.max():.3g}, "
          f"{different} of {expected['image'].size} bytes of pixels differ; largest differences "
          + ", ".join(f"{key} {value:.2g}" for key, value in largest.items()), flush=True)
    return different == 0 and max(largest.values()) <= TOLERANCE


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"default: all, {', '.join(TASKS)}")
    parser.add_argument("--orrery", default=ROOT / "build/bin/orrery")
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="from each start")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    same = [compare(args.orrery, task, args.starts, args.steps, args.seed) for task in args.tasks or TASKS]
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
