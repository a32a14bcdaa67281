"""Environments of other libraries, played in lanes: each lane plays one episode at a time.

Lanes of one Gymnasium or dm_env environment are independent of all others. Lanes of a gymnasium.vector.VectorEnv step
together; what its autoreset mode does to an ended lane is hidden here: the last observation is always the ended episode's,
the first of the next one never gets lost, and no episode begins in the middle of another.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from orrery.actions import ActionMap, dm_env_action, gymnasium_action
from orrery.errors import ConfigError, DataError
from orrery.observations import ObservationMap, Parts, dm_env_parts, gymnasium_parts
from orrery.specification import EnvironmentSpec

_SEED_MASK = (1 << 31) - 1  # some environments take no larger seed
PYTHON_PREFIX = "python:"
DM_CONTROL_PREFIX = "dm_control:"
# Modules that make ids known to gymnasium when they are imported.
_REGISTERED_BY = (("BulletEnv-", "pybullet_envs_gymnasium"), ("ALE/", "ale_py"))


@dataclasses.dataclass(frozen=True)
class EnvironmentSettings:
    """How environments are made.

    env: a Gymnasium id; "python:MODULE:FUNCTION", a function that returns a gymnasium.Env, a gymnasium.vector.VectorEnv or a
    dm_env.Environment; or "dm_control:DOMAIN-TASK". kwargs go to it. modalities: see orrery.observations. camera: arguments of
    the picture, to gymnasium.make or dm_control's render; a name that begins with '.' is set on the unwrapped environment
    instead. time_limit: simulator steps, None: the environment's own. vector: lanes of one vector environment; 0: single.
    action_size: numbers of a continuous action, those that the environment does not take are ignored; 0: its own."""

    env: str
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    image_size: int = 64
    camera: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    action_repeat: int = 1
    time_limit: int | None = None
    vector: int = 0
    action_size: int = 0

    def __post_init__(self) -> None:
        if self.action_repeat < 1:
            raise ConfigError(f"action_repeat is {self.action_repeat}: expected at least 1")
        if self.time_limit is not None and self.time_limit < 1:
            raise ConfigError(f"time_limit is {self.time_limit}: expected at least 1")


@dataclasses.dataclass(frozen=True)
class TimeStep:
    """What followed a decision (or a reset): rewards of `steps` simulator steps summed."""

    observation: dict[str, npt.NDArray[Any]]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class LaneFault:
    """A lane gave something that cannot be used; its episode is over."""

    message: str


Results = dict[int, TimeStep | LaneFault]


class Lanes(Protocol):
    """Not thread-safe. What raises ends the episodes of all lanes: close it and make another."""

    spec: EnvironmentSpec
    count: int

    def reset(self, seeds: Mapping[int, int], whole: bool) -> Results:
        """Begins an episode in each of these lanes. `whole`: no other lane plays one now; else only lanes that `fresh` names
        may be asked for."""

    def step(self, actions: Mapping[int, npt.NDArray[np.float32]]) -> Results:
        """One decision in each of these lanes, which are all those that play an episode."""

    def fresh(self) -> list[bool]:
        """Lanes in which an episode may begin while others are played."""

    def render(self) -> npt.NDArray[np.uint8]:
        """A picture of the first lane, for people."""

    def close(self) -> None: ...


class Game(Protocol):
    """One environment of a library, in its own units."""

    parts: Parts
    action: ActionMap

    def reset(self, seed: int) -> Any: ...

    def step(self, action: Any) -> tuple[Any, Any, bool, bool]:
        """Observation, reward, terminated, truncated."""

    def render(self) -> Any: ...

    def close(self) -> None: ...


class GymnasiumGame:
    """A gymnasium.Env."""

    def __init__(self, env: Any):
        self._env = env
        self.parts = gymnasium_parts(env.observation_space)
        self.action = gymnasium_action(env.action_space)

    def reset(self, seed: int) -> Any:
        observation, _ = self._env.reset(seed=seed & _SEED_MASK)
        return observation

    def step(self, action: Any) -> tuple[Any, Any, bool, bool]:
        observation, reward, terminated, truncated, _ = self._env.step(action)
        return observation, reward, bool(terminated), bool(truncated)

    def render(self) -> Any:
        return self._env.render()

    def close(self) -> None:
        self._env.close()


class DmEnvGame:
    """A dm_env.Environment. Its interface takes no seed; dm_control's tasks have a random state that is seeded."""

    def __init__(self, env: Any, camera: Mapping[str, Any]):
        self._env = env
        self._camera = camera
        self.parts = dm_env_parts(env.observation_spec())
        self.action = dm_env_action(env.action_spec())

    def reset(self, seed: int) -> Any:
        random = getattr(getattr(self._env, "task", None), "random", None)
        if isinstance(random, np.random.RandomState):
            random.seed(seed & _SEED_MASK)
        return self._env.reset().observation

    def step(self, action: Any) -> tuple[Any, Any, bool, bool]:
        step = self._env.step(action)
        terminated = bool(step.last() and step.discount == 0)
        return step.observation, step.reward, terminated, bool(step.last() and not terminated)

    def render(self) -> Any:
        physics = getattr(self._env, "physics", None)
        if physics is None:
            raise ConfigError("this dm_env environment draws no pictures: it has no `physics`")
        return physics.render(**{"height": 256, "width": 256, **self._camera})

    def close(self) -> None:
        self._env.close()


def checked_reward(value: Any) -> float:
    """DataError unless it is one finite number."""
    try:
        reward = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"the reward is {value!r}: expected a number") from error
    if not np.isfinite(reward):
        raise DataError(f"the reward is {reward}: expected a finite number")
    return reward


class SingleLane:
    """One environment with action repeat and time limit around it."""

    count = 1

    def __init__(self, game: Game, observations: ObservationMap, settings: EnvironmentSettings):
        self._game = game
        self._observations = observations
        self._settings = settings
        self._steps = 0
        self._action = game.action.padded(settings.action_size)
        self.spec = EnvironmentSpec(observations.specs, self._action.spec)

    def reset(self, seeds: Mapping[int, int], whole: bool) -> Results:
        self._steps = 0
        return {lane: self._take(self._game.reset(seed)) for lane, seed in seeds.items()}

    def step(self, actions: Mapping[int, npt.NDArray[np.float32]]) -> Results:
        return {lane: self._decide(action) for lane, action in actions.items()}

    def fresh(self) -> list[bool]:
        return [True]

    def render(self) -> npt.NDArray[np.uint8]:
        return np.asarray(self._game.render(), np.uint8)

    def close(self) -> None:
        self._game.close()

    def _decide(self, action: npt.NDArray[np.float32]) -> TimeStep | LaneFault:
        native = self._action.to_native(action)
        total = 0.0
        steps = 0
        while True:
            observation, reward, terminated, truncated = self._game.step(native)
            steps += 1
            self._steps += 1
            try:
                total += checked_reward(reward)
            except DataError as error:
                return LaneFault(str(error))
            truncated = truncated or self._steps == self._settings.time_limit
            if terminated or truncated or steps == self._settings.action_repeat:
                return self._take(observation, total, terminated, truncated, steps)

    def _take(
        self, observation: Any, reward: float = 0.0, terminated: bool = False, truncated: bool = False, steps: int = 0
    ) -> TimeStep | LaneFault:
        try:
            modalities = self._observations.convert(observation, self._game.render)
        except DataError as error:
            return LaneFault(str(error))
        return TimeStep(modalities, reward, terminated, truncated and not terminated, steps)


def autoreset_mode(env: Any) -> str:
    """"NEXT_STEP", "SAME_STEP" or "DISABLED" of a gymnasium.vector.VectorEnv; Gymnasium 1.0 knew only the first."""
    mode = (env.metadata or {}).get("autoreset_mode", "NEXT_STEP")
    for name in ("NEXT_STEP", "SAME_STEP", "DISABLED"):
        if str(getattr(mode, "name", mode)).replace("_", "").upper() == name.replace("_", ""):
            return name
    raise ConfigError(f"autoreset mode {mode!r}: expected NEXT_STEP, SAME_STEP or DISABLED")


@dataclasses.dataclass
class _Lane:
    """`first`: the observation of a reset after which nothing was stepped. `ended`: by the environment, not yet reset."""

    first: Any = None
    fresh: bool = False
    ended: bool = False
    steps: int = 0  # of the running episode


class VectorLanes:
    """The lanes of one gymnasium.vector.VectorEnv. Lanes that play nothing are stepped along with random actions, for the
    others' sake; an episode begins in them only with the first observation after a reset. Where the environment resets lanes
    by itself, only a reset of all lanes takes seeds."""

    def __init__(self, env: Any, observations: ObservationMap, settings: EnvironmentSettings):
        from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
        from gymnasium.vector.utils import iterate

        self._env = env
        self._takes_seeds = isinstance(env.unwrapped, AsyncVectorEnv | SyncVectorEnv)
        self._iterate = iterate
        self._observations = observations
        self._settings = settings
        self._action = gymnasium_action(env.single_action_space).padded(settings.action_size)
        self._mode = autoreset_mode(env)
        if settings.action_repeat > 1 and self._mode != "DISABLED":
            raise ConfigError(f"action_repeat is {settings.action_repeat} with autoreset mode {self._mode}: a lane that ends "
                              "between two repeated steps would lose its reset; play single environments instead")
        if observations.needs_render and self._mode == "SAME_STEP":
            raise ConfigError("pictures are drawn with autoreset mode SAME_STEP: the last picture of an episode is never drawn")
        self.count = int(env.num_envs)
        self.spec = EnvironmentSpec(observations.specs, self._action.spec)
        self._lanes = [_Lane() for _ in range(self.count)]

    def reset(self, seeds: Mapping[int, int], whole: bool) -> Results:
        if whole:
            self._reset_all([seeds[i] & _SEED_MASK if i in seeds else None for i in range(self.count)])
        elif self._mode == "DISABLED":
            self._reset_masked(seeds)
        results: Results = {}
        frames = self._frames()
        for lane in seeds:
            if not self._lanes[lane].fresh:
                raise ConfigError(f"lane {lane} is asked to begin in the middle of an episode")
            results[lane] = self._take(lane, self._lanes[lane].first, frames)
            self._lanes[lane].steps = 0
        return results

    def step(self, actions: Mapping[int, npt.NDArray[np.float32]]) -> Results:
        results: Results = {}
        rewards = dict.fromkeys(actions, 0.0)
        for repeat in range(1, self._settings.action_repeat + 1):
            playing = [lane for lane in actions if lane not in results]
            if not playing:
                break
            for lane, step in self._step_once(actions, playing, rewards, repeat).items():
                if step is not None:
                    results[lane] = step
        return results

    def fresh(self) -> list[bool]:
        return [self._mode == "DISABLED" or lane.fresh for lane in self._lanes]

    def render(self) -> npt.NDArray[np.uint8]:
        frames = self._frames(always=True)
        return np.asarray(frames[0], np.uint8)

    def close(self) -> None:
        self._env.close()

    def _seed(self, seeds: Sequence[int | None]) -> Any:
        """As the environment takes it: only gymnasium's own classes take one for each lane."""
        return list(seeds) if self._takes_seeds else next((seed for seed in seeds if seed is not None), None)

    def _reset_all(self, seeds: Sequence[int | None]) -> None:
        observations, _ = self._env.reset(seed=self._seed(seeds))
        for lane, first in zip(self._lanes, self._each(observations), strict=True):
            lane.first, lane.fresh, lane.ended = first, True, False

    def _reset_masked(self, seeds: Mapping[int, int | None]) -> None:
        """DISABLED: resets these lanes only."""
        mask = np.zeros(self.count, np.bool_)
        mask[list(seeds)] = True
        masked: list[int | None] = [None] * self.count
        for index, seed in seeds.items():
            masked[index] = None if seed is None else seed & _SEED_MASK
        observations, _ = self._env.reset(seed=self._seed(masked), options={"reset_mask": mask})
        for lane, first, chosen in zip(self._lanes, self._each(observations), mask, strict=True):
            if chosen:
                lane.first, lane.fresh, lane.ended = first, True, False

    def _step_once(
        self, actions: Mapping[int, npt.NDArray[np.float32]], playing: Sequence[int], rewards: dict[int, float], repeat: int
    ) -> dict[int, TimeStep | LaneFault | None]:
        """One step of all lanes; None for a lane whose decision goes on."""
        ended = [index for index, lane in enumerate(self._lanes) if lane.ended]
        if self._mode == "DISABLED" and ended:
            self._reset_masked(dict.fromkeys(ended))
        native = [self._action.to_native(actions[i]) if i in playing else self._env.single_action_space.sample()
                  for i in range(self.count)]
        batch = np.stack([np.asarray(one, self._env.single_action_space.dtype) for one in native])
        observations, reward, terminated, truncated, infos = self._env.step(batch)
        each = self._each(observations)
        finals = [each[i] for i in range(self.count)]
        for index, lane in enumerate(self._lanes):
            self._note(lane, each[index], bool(terminated[index] or truncated[index]))
            if self._mode == "SAME_STEP" and lane.fresh:
                finals[index] = self._final(infos, index)
        last = repeat == self._settings.action_repeat
        frames = self._frames() if last or any(self._lanes[i].ended for i in playing) else ()
        results: dict[int, TimeStep | LaneFault | None] = {}
        for lane_index in playing:
            lane = self._lanes[lane_index]
            lane.steps += 1
            try:
                rewards[lane_index] += checked_reward(reward[lane_index])
            except DataError as error:
                results[lane_index] = LaneFault(str(error))
                continue
            is_terminal = bool(terminated[lane_index])
            is_cut = bool(truncated[lane_index]) or lane.steps == self._settings.time_limit
            if is_terminal or is_cut or last:
                frames = frames or self._frames()
                results[lane_index] = self._take(
                    lane_index, finals[lane_index], frames, rewards[lane_index], is_terminal, is_cut, repeat)
        return results

    def _note(self, lane: _Lane, observation: Any, done: bool) -> None:
        """Keeps what a step did to a lane."""
        was_ended = lane.ended
        lane.first, lane.fresh, lane.ended = None, False, False
        if self._mode == "SAME_STEP":
            lane.fresh = done
        elif self._mode == "NEXT_STEP" and was_ended:
            lane.fresh = True  # this step ignored the action and reset the lane
        else:
            lane.ended = done
        if lane.fresh:
            lane.first = observation

    def _final(self, infos: Mapping[str, Any], index: int) -> Any:
        """SAME_STEP: the ended episode's last observation."""
        for key in ("final_obs", "final_observation"):
            if key in infos:
                final = infos[key]
                if isinstance(final, Mapping):
                    return {name: value[index] for name, value in final.items()}
                return final[index]
        raise ConfigError("autoreset mode SAME_STEP without infos['final_obs']: the last observation of the episode is lost")

    def _each(self, observations: Any) -> list[Any]:
        """Copies of the lanes' observations: environments reuse their buffers."""
        return [_copy(one) for one in self._iterate(self._env.observation_space, observations)]

    def _frames(self, always: bool = False) -> Sequence[Any]:
        if not (always or self._observations.needs_render):
            return ()
        frames = self._env.render()
        if frames is None or len(frames) != self.count:
            raise ConfigError(f"the vector environment draws {0 if frames is None else len(frames)} pictures: expected "
                              f"{self.count}, one per lane")
        return list(frames)

    def _take(
        self, lane: int, observation: Any, frames: Sequence[Any], reward: float = 0.0, terminated: bool = False,
        truncated: bool = False, steps: int = 0,
    ) -> TimeStep | LaneFault:
        try:
            modalities = self._observations.convert(observation, lambda: frames[lane])
        except DataError as error:
            return LaneFault(str(error))
        return TimeStep(modalities, reward, terminated, truncated and not terminated, steps)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_copy(one) for one in value)
    return np.array(value)


def make_lanes(settings: EnvironmentSettings) -> Lanes:
    """ConfigError names what does not fit; what the environment's own code raises comes through."""
    env = _make(settings, render=False)
    if hasattr(env, "observation_spec") and not hasattr(env, "observation_space"):
        camera = {name: value for name, value in settings.camera.items() if not name.startswith(".")}
        game = DmEnvGame(env, camera)
        return SingleLane(game, ObservationMap(game.parts, settings.modalities, settings.image_size), settings)
    space = env.single_observation_space if hasattr(env, "single_observation_space") else env.observation_space
    observations = ObservationMap(gymnasium_parts(space), settings.modalities, settings.image_size)
    if observations.needs_render:
        # Only now it is known that pictures are drawn; environments want to be told when they are made.
        env.close()
        env = _make(settings, render=True)
    if hasattr(env, "single_observation_space"):
        return VectorLanes(env, observations, settings)
    if settings.vector > 0:
        raise ConfigError(f"{settings.env} gives a single environment: expected a vector environment of {settings.vector}")
    return SingleLane(GymnasiumGame(env), observations, settings)


def _make(settings: EnvironmentSettings, render: bool) -> Any:
    camera = {name: value for name, value in settings.camera.items() if not name.startswith(".")}
    kwargs = {**settings.kwargs, **({"render_mode": "rgb_array", **camera} if render else {})}
    if settings.env.startswith(DM_CONTROL_PREFIX):
        return _make_dm_control(settings)
    if settings.env.startswith(PYTHON_PREFIX):
        if settings.vector > 0:
            kwargs["num_envs"] = settings.vector
        env = _function(settings.env)(**kwargs)
    else:
        env = _make_gymnasium(settings, kwargs)
    for name, value in settings.camera.items():
        if name.startswith("."):
            setattr(env.unwrapped, name[1:], value)
    return env


def _make_gymnasium(settings: EnvironmentSettings, kwargs: Mapping[str, Any]) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigError(f"{settings.env}: pip install gymnasium, or name a function as python:MODULE:FUNCTION") from error
    for part, module in _REGISTERED_BY:
        if part in settings.env and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    limit = {} if settings.time_limit is None else {"max_episode_steps": settings.time_limit}
    if settings.vector > 0:
        return gymnasium.make_vec(settings.env, num_envs=settings.vector, **limit, **kwargs)
    return gymnasium.make(settings.env, **limit, **kwargs)


def _make_dm_control(settings: EnvironmentSettings) -> Any:
    domain, dash, task = settings.env[len(DM_CONTROL_PREFIX):].partition("-")
    if not dash:
        raise ConfigError(f"{settings.env}: expected dm_control:DOMAIN-TASK, for example dm_control:cartpole-balance")
    try:
        suite = importlib.import_module("dm_control.suite")
    except ImportError as error:
        raise ConfigError(f"{settings.env}: pip install dm_control ({error})") from error
    return suite.load(domain, task, **settings.kwargs)


def _function(env: str) -> Callable[..., Any]:
    module, colon, name = env[len(PYTHON_PREFIX):].partition(":")
    if not colon:
        raise ConfigError(f"{env}: expected python:MODULE:FUNCTION")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{env}: {error}") from error
    if not callable(function):
        raise ConfigError(f"{env}: {name} is not a function")
    return function  # type: ignore[no-any-return]
