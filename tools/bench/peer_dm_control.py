#!/usr/bin/env python3
"""Measures steps and pictures per second of dm_control tasks, for compare.py: one object per line, medians after a warm-up.

A step is `env.step` with random actions (reward and observations included, nothing drawn; Orrery's has the reward only); a
picture is `physics.render` of the first camera. How many threads draw is Mesa's affair (LP_NUM_THREADS).
"""
import argparse
import json
import os

import numpy as np
from dm_control import suite

from timing import median_seconds


def bench(args, task):
    env = suite.load(*task.rsplit("_", 1), task_kwargs={"random": 1})
    spec, random = env.action_spec(), np.random.RandomState(1)
    env.reset()

    def step(count):
        for action in random.uniform(spec.minimum, spec.maximum, (count, *spec.shape)):
            env.step(action)  # begins anew after the last step of an episode

    def draw():
        step(1)
        for _ in range(args.frames):
            env.physics.render(args.size, args.size, camera_id=0)

    print(json.dumps({"what": "render", "task": task, "size": args.size, "mesa_threads": os.environ.get("LP_NUM_THREADS"),
                      "frames_per_second": args.frames / median_seconds(args, draw)}), flush=True)
    print(json.dumps({"what": "step", "task": task, "steps_per_second": args.steps / median_seconds(args, lambda: step(args.steps))}),
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="cartpole_swingup", help="separated by commas")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for task in args.tasks.split(","):
        bench(args, task)


if __name__ == "__main__":
    main()
