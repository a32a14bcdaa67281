#!/usr/bin/env python3
"""Plays MuJoCo tasks with dm_control and stores what it saw, for envs_test.cc to compare with.

    pip install dm_control==1.0.50 mujoco==3.17.0
    MUJOCO_GL=osmesa python make_golden.py [TASK …] [--out FOLDER] [--steps N] [--seed N]

Writes, per task, one or more rollouts of equal length after each other. TASK.json: `starts`, the first step of each rollout
(not there: one rollout); `action` [T][A] and `reward` [T] of all steps; `qpos`, `qvel`, the observations and (reacher) `target`
[T + rollouts][n]: of each rollout what it began with, then what followed each action; `frames`: those rows that have a picture.
TASK.bin: the pictures, raw RGB, first all 64x64, then all 32x32.
"""
import argparse
import dataclasses
import json
import pathlib
import typing

import numpy as np
from dm_control import suite


# Starts: qpos and qvel, from a freshly reset episode. Somewhere else than usual, moving, so that every factor of the reward
# matters.
def drawn(physics, random):
    return physics.data.qpos.copy(), random.uniform(-2, 2, physics.model.nv)


def cartpole(physics, random):
    return physics.data.qpos + random.uniform(-1, 1, physics.model.nq), random.uniform(-2, 2, physics.model.nv)


def ball_in_cup(physics, random):
    """The ball above the cup or in it."""
    return np.array([0, 0, random.uniform(-0.02, 0.02), random.uniform(0.35, 0.5)]), random.uniform(-0.3, 0.3, 4)


def finger(physics, random):
    """The spinner turns, mostly in the direction that is rewarded."""
    qpos, qvel = drawn(physics, random)
    qvel[2] = random.uniform(-40, 5)
    return qpos, qvel


def pendulum(physics, random):
    return random.uniform(-0.3, 0.3, 1), random.uniform(-1, 1, 1)


def reacher(physics, random):
    """The target near the finger."""
    finger_place = physics.named.data.geom_xpos["finger", :2]
    physics.named.model.geom_pos["target", :2] = finger_place + random.uniform(-0.06, 0.06, 2)
    return drawn(physics, random)


def hopper(physics, random):
    """More or less upright, moving forward."""
    qpos, qvel = drawn(physics, random)
    qpos[2] = random.uniform(-0.5, 0.5)
    qvel[0] = random.uniform(0, 3)
    return qpos, qvel


def forward(dof, speed):
    """Moving forward up to that fast."""
    def begin(physics, random):
        qpos, qvel = drawn(physics, random)
        qvel[dof] = random.uniform(0, speed)
        return qpos, qvel
    return begin


@dataclasses.dataclass(frozen=True)
class Task:
    domain: str
    name: str
    begin: typing.Callable
    starts: int = 3
    frames: int = 3


TASKS = {
    "ball_in_cup_catch": Task("ball_in_cup", "catch", ball_in_cup),
    "cartpole_balance": Task("cartpole", "balance", cartpole, starts=1, frames=8),
    "cartpole_swingup": Task("cartpole", "swingup", cartpole, starts=1, frames=8),
    "cheetah_run": Task("cheetah", "run", forward(dof=0, speed=12)),
    "finger_spin": Task("finger", "spin", finger),
    "hopper_hop": Task("hopper", "hop", hopper),
    "hopper_stand": Task("hopper", "stand", hopper),
    "pendulum_swingup": Task("pendulum", "swingup", pendulum),
    "reacher_easy": Task("reacher", "easy", reacher),
    "walker_run": Task("walker", "run", forward(dof=1, speed=10)),
    "walker_stand": Task("walker", "stand", drawn),
    "walker_walk": Task("walker", "walk", forward(dof=1, speed=2)),
}


def play(task, starts, steps, frames, seed):
    """`starts` rollouts of `steps` steps: a dictionary as in TASK.json, and its pictures by size, [64] and [32]."""
    random = np.random.RandomState(seed)
    env = suite.load(task.domain, task.name, task_kwargs={"random": seed})
    physics = env.physics
    out = {"action": [], "reward": [], "qpos": [], "qvel": []}
    rows = sorted(set(np.linspace(0, starts * (steps + 1) - 1, frames).astype(int).tolist()))
    pictures = {64: [], 32: []}

    def observe():
        if len(out["qpos"]) in rows:
            for size, kept in pictures.items():
                kept.append(physics.render(size, size, camera_id=0))
        out["qpos"].append(physics.data.qpos.tolist())
        out["qvel"].append(physics.data.qvel.tolist())
        if task.domain == "reacher":
            out.setdefault("target", []).append(physics.named.model.geom_pos["target", :2].tolist())
        for name, value in env.task.get_observation(physics).items():
            out.setdefault(name, []).append(np.atleast_1d(value).tolist())

    for _ in range(starts):
        env.reset()
        qpos, qvel = task.begin(physics, random)
        with physics.reset_context():
            physics.data.qpos[:] = qpos
            physics.data.qvel[:] = qvel
        # A little outside the actuators' range too: forces are cut there, rewards see the value itself.
        actions = random.uniform(-1.2, 1.2, (steps, physics.model.nu))
        actions[0] = 0
        observe()
        for action in actions:
            timestep = env.step(action)
            assert not timestep.last()
            out["action"].append(action.tolist())
            out["reward"].append(float(timestep.reward))
            observe()
    if starts > 1:
        out["starts"] = [steps * i for i in range(starts)]
    out["frames"] = rows
    return out, {size: np.stack(kept) if kept else None for size, kept in pictures.items()}


def is_telling(numbers):
    """Rewards differ, and so does every number that is observed."""
    observed = [np.array(values) for name, values in numbers.items() if name not in ("action", "starts", "frames", "target")]
    return all((np.ptp(values, axis=0) > 1e-3).all() for values in observed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"default: all, {', '.join(TASKS)}")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=60, help="of all rollouts of a task together")
    parser.add_argument("--seed", type=int, default=1, help="the first to try; the first with telling rollouts is kept")
    args = parser.parse_args()
    for name in args.tasks or TASKS:
        task = TASKS[name]
        steps = args.steps // task.starts
        seed = next(seed for seed in range(args.seed, args.seed + 1000)
                    if is_telling(play(task, task.starts, steps, 0, seed)[0]))
        numbers, pictures = play(task, task.starts, steps, task.frames, seed)
        (args.out / f"{name}.json").write_text(json.dumps(numbers) + "\n")
        (args.out / f"{name}.bin").write_bytes(b"".join(pictures[size].tobytes() for size in (64, 32)))
        print(f"{name}: seed {seed}")


if __name__ == "__main__":
    main()
