"""Stands in for the program `orrery` with its command `env` (tools/orrery/env_server.h): every step is known.

The observation "clock" is [seed modulo 1000, step, the action's first number], "image" is filled with the step; the reward of
step t is t + the environment's number / 8; an episode has 2 steps in environment 0 and one more in each next one, and is ended
by the task where the seed is even. What else happens is said by the task's name.
"""

import argparse
import os
import signal
import struct
import sys

import numpy as np

from orrery.common.v1 import environment_pb2, tensor_pb2


def send(kind, body):
    os.write(1, struct.pack("<IB", len(body) + 1, kind) + body)


def receive():
    header = sys.stdin.buffer.read(5)
    if len(header) < 5:
        sys.exit(0)
    length, kind = struct.unpack("<IB", header)
    return kind, sys.stdin.buffer.read(length - 1)


def ready(task, discrete):
    spec = environment_pb2.EnvironmentSpec()
    spec.observations.add(name="clock", data_type=tensor_pb2.FLOAT32, shape=[3])
    spec.observations.add(name="image", data_type=tensor_pb2.UINT8, shape=[2, 2, 3])
    spec.action.size, spec.action.discrete = 3 if discrete else 2, discrete
    if task == "unknown_type":
        spec.observations[0].data_type = 99
    send(1, b"\xff\xff" if task == "no_proto" else spec.SerializeToString())


class Lane:
    def __init__(self, number):
        self.number, self.seed, self.step, self.action, self.flags, self.reward = number, 0, 0, 0.0, 0, 0.0

    def reset(self, seed):
        self.seed, self.step, self.action, self.flags, self.reward = seed, 0, 0.0, 0, 0.0

    def advance(self, action):
        self.step += 1
        self.action, self.reward = float(action[0]), self.step + self.number / 8
        if self.step == self.number + 2:
            self.flags = 3 if self.seed % 2 == 0 else 2


def advance(task, lanes, size, body):
    count = len(lanes)
    what, seeds = np.frombuffer(body, np.uint8, count), np.frombuffer(body, "<u8", count, count)
    actions = np.frombuffer(body, "<f4", count * size, 9 * count).reshape(count, size)
    for lane, todo, seed, action in zip(lanes, what, seeds, actions, strict=True):
        lane.flags, lane.reward = 0, 0.0
        if todo == 1:
            lane.reset(int(seed))
        elif todo == 2:
            lane.advance(action)
    if task == "fails" and lanes[-1].step == 2:
        return send(6, f"environment {count - 1}: no third step".encode())
    rewards = np.array([lane.reward for lane in lanes])
    flags = np.array([lane.flags for lane in lanes], np.uint8)
    clocks = np.array([[lane.seed % 1000, lane.step, lane.action] for lane in lanes], np.float32)
    images = np.stack([np.full((2, 2, 3), lane.step, np.uint8) for lane in lanes])
    message = rewards.tobytes() + flags.tobytes() + clocks.tobytes() + images.tobytes()
    return send(4, message + b"more" if task == "wrong_size" else message)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    for flag in ("log_level", "task", "image_size", "action_repeat", "time_limit", "quality", "timeout"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--num_envs", type=int)
    flags = parser.parse_args()
    if flags.task == "refused":
        sys.exit("orrery: error: there is no such task")
    if flags.task == "another_program":
        print("Usage: another program")
        sys.exit(0)
    discrete = flags.task == "discrete"
    ready(flags.task, discrete)
    lanes = [Lane(number) for number in range(flags.num_envs)]
    while True:
        kind, body = receive()
        if kind == 2:
            if flags.task == "dies" and lanes[0].step == 1:
                sys.exit("orrery: error: out of luck")
            if flags.task == "hangs" and lanes[0].step == 1:
                signal.pause()
            advance(flags.task, lanes, 3 if discrete else 2, body)
        else:
            index, height, width = struct.unpack("<III", body)
            send(5, bytes([lanes[index].step]) * (height * width * 3))


if __name__ == "__main__":
    main()
