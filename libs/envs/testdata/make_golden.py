#!/usr/bin/env python3
"""Plays MuJoCo tasks with dm_control and stores what it saw, for envs_test.cc to compare with.

    pip install dm_control==1.0.50 mujoco==3.17.0
    MUJOCO_GL=osmesa python make_golden.py [--out FOLDER] [--steps N] [--frames N] [--seed N]

Writes, per task: TASK.json with `action` [T][A], and what followed it, `reward` [T], `qpos`, `qvel` and the observations
[T+1][n], and `frames`: the rows with a picture; TASK.bin with those pictures, raw RGB, first all 64x64, then all 32x32.
"""
import argparse
import json
import pathlib

import numpy as np
from dm_control import suite

TASKS = {"cartpole_balance": ("cartpole", "balance"), "cartpole_swingup": ("cartpole", "swingup")}


def play(domain, task, steps, frames, seed):
    random = np.random.RandomState(seed)
    env = suite.load(domain, task, task_kwargs={"random": seed})
    timestep = env.reset()
    physics = env.physics
    # Somewhere else than usual, moving, so that every factor of the reward matters.
    qpos = physics.data.qpos.copy()
    with physics.reset_context():
        physics.data.qpos[:] = qpos + random.uniform(-1, 1, physics.model.nq)
        physics.data.qvel[:] = random.uniform(-2, 2, physics.model.nv)
    # A little outside the actuators' range too: forces are cut there, rewards see the value itself.
    actions = random.uniform(-1.2, 1.2, (steps, physics.model.nu))
    actions[0] = 0
    out = {"action": actions.tolist(), "reward": [], "qpos": [], "qvel": []}
    rows = sorted(set(np.linspace(0, steps, frames).astype(int).tolist()))
    pictures = {64: [], 32: []}

    def observe(row):
        out["qpos"].append(physics.data.qpos.tolist())
        out["qvel"].append(physics.data.qvel.tolist())
        for name, value in env.task.get_observation(physics).items():
            out.setdefault(name, []).append(np.asarray(value).tolist())
        if row in rows:
            for size, kept in pictures.items():
                kept.append(physics.render(size, size, camera_id=0))

    observe(0)
    for row, action in enumerate(actions, start=1):
        timestep = env.step(action)
        assert not timestep.last()
        out["reward"].append(float(timestep.reward))
        observe(row)
    out["frames"] = rows
    return out, b"".join(np.stack(kept).tobytes() for kept in pictures.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, (domain, task) in TASKS.items():
        numbers, pixels = play(domain, task, args.steps, args.frames, args.seed)
        (args.out / f"{name}.json").write_text(json.dumps(numbers) + "\n")
        (args.out / f"{name}.bin").write_bytes(pixels)


if __name__ == "__main__":
    main()
