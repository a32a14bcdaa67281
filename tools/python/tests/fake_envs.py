"""Environments whose every step is known, for tests. Importable by name, so that child processes can make them."""

import os
import threading

import dm_env
import gymnasium
import numpy as np
from dm_env import specs
from gymnasium import spaces


class Counting(gymnasium.Env):
    """Observation [number of the episode, step, seed of the reset or -1]; the reward of step t is t; `length` steps.
    `fault` happens at step `at` of the episodes named by `episodes` (all where empty), counted from 1."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, length=5, terminal=True, discrete=False, fault="", at=2, episodes=(), bound=2.0, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Discrete(3, start=5) if discrete else spaces.Box(-bound, 2 * bound, (2,), np.float32)
        self.length, self.terminal, self.fault, self.at, self.episodes = length, terminal, fault, at, episodes
        self.episode = 0
        self.time = 0
        self.seed = -1
        self.actions = []

    def _observation(self):
        return np.array([self.episode, self.time, self.seed], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.time = 0
        self.seed = -1 if seed is None else seed
        if self.fault == "reset" and (not self.episodes or self.episode in self.episodes):
            raise RuntimeError("no reset today")
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.time += 1
        done = self.time == self.length
        observation, reward = self._observation(), float(self.time)
        if self.fault and self.time == self.at and (not self.episodes or self.episode in self.episodes):
            observation, reward = self._fail(observation, reward)
        return observation, reward, done and self.terminal, done and not self.terminal, {}

    def _fail(self, observation, reward):
        if self.fault == "raise":
            raise ValueError("broken joint")
        if self.fault == "nan":
            observation[1] = np.nan
        if self.fault == "nan_reward":
            reward = float("nan")
        if self.fault == "shape":
            observation = observation[:2]
        if self.fault == "hang":
            threading.Event().wait()
        if self.fault == "die":
            os._exit(3)
        return observation, reward

    def render(self):
        picture = np.zeros((40, 60, 3), np.uint8)
        picture[:, :, 0] = self.time
        return picture


def counting(**kwargs):
    return Counting(**kwargs)


class Long(Counting):
    """Takes four numbers and does not end."""

    def __init__(self, **kwargs):
        super().__init__(length=10**6, **kwargs)
        self.action_space = spaces.Box(-1, 1, (4,), np.float32)


def long(**kwargs):
    return Long(**kwargs)


def single_only(num_envs, **kwargs):
    """Takes the number of lanes and does not heed it."""
    return Counting(**kwargs)


class FaultsEachLife:
    """Counts the environments made in this process, so that one made anew can behave otherwise."""

    made = 0


def raises_once(**kwargs):
    """The first environment made raises at step 2; later ones work."""
    FaultsEachLife.made += 1
    return Counting(fault="raise" if FaultsEachLife.made == 1 else "", **kwargs)


def vector(num_envs, lengths=(2, 3, 5), mode="NEXT_STEP", **kwargs):
    """A vector environment of gymnasium's own with lanes of these lengths."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    makers = [lambda length=lengths[i % len(lengths)]: Counting(length=length, **kwargs) for i in range(num_envs)]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode[mode])


class DmCounting(dm_env.Environment):
    """Observation {"step": [t], "seen": one number}; ends after `length` steps with this discount."""

    def __init__(self, length=3, discount=0.0):
        self.length, self.discount, self.time = length, discount, 0

    def _observation(self):
        return {"step": np.array([self.time], np.float64), "seen": np.float64(-self.time)}

    def reset(self):
        self.time = 0
        return dm_env.restart(self._observation())

    def step(self, action):
        self.action = action
        self.time += 1
        if self.time < self.length:
            return dm_env.transition(float(self.time), self._observation())
        return dm_env.TimeStep(dm_env.StepType.LAST, float(self.time), self.discount, self._observation())

    def observation_spec(self):
        return {"step": specs.Array((1,), np.float64), "seen": specs.Array((), np.float64)}

    def action_spec(self):
        return specs.BoundedArray((2,), np.float64, minimum=[-1, 0], maximum=[1, 10])


def dm_counting(**kwargs):
    return DmCounting(**kwargs)


class Reach(gymnasium.Env):
    """A point on a line is to be moved to 0: observation [place], reward 1 - |place|, 20 steps. Learned in seconds."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = spaces.Dict({
            "place": spaces.Box(-1, 1, (1,), np.float32), "camera": spaces.Box(0, 255, (32, 32, 3), np.uint8)})
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.place, self.time = 0.0, 0

    def _observation(self):
        picture = np.zeros((32, 32, 3), np.uint8)
        column = int(round((self.place + 1) / 2 * 29))
        picture[8:24, column:column + 3] = 255
        return {"place": np.array([self.place], np.float32), "camera": picture}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = float(self.np_random.uniform(-1, 1))
        self.time = 0
        return self._observation(), {}

    def step(self, action):
        self.place = float(np.clip(self.place + 0.2 * float(action[0]), -1, 1))
        self.time += 1
        return self._observation(), 1 - abs(self.place), False, self.time == 20, {}

    def render(self):
        return self._observation()["camera"]


def reach(**kwargs):
    return Reach(**kwargs)
