"""This project's own tasks for Gymnasium. Importing this module registers them:

    gymnasium.make("orrery.gymnasium_tasks:orrery/Task-v0", task="cheetah_run")
    gymnasium.make_vec("orrery.gymnasium_tasks:orrery/Task-v0", num_envs=8, task="cheetah_run")

orrery.make and orrery.make_vec are short for these, and describe the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from orrery.env_process import NOTHING, RESET, STEP, EnvProcess, States
from orrery.errors import ConfigError, DataError, EnvironmentFault
from orrery.specification import EnvironmentSpec, TensorSpec

TASK_ID = "orrery/Task-v0"
_METADATA = {"render_modes": ["rgb_array"], "render_fps": 25}
_SEED_MASK = (1 << 64) - 1


def _observation_space(tensors: Sequence[TensorSpec]) -> Any:
    def box(tensor: TensorSpec) -> Any:
        if tensor.dtype == "uint8":
            return spaces.Box(0, 255, tensor.shape, np.uint8)
        return spaces.Box(-np.inf, np.inf, tensor.shape, np.dtype(tensor.dtype).type)

    return spaces.Dict({tensor.name: box(tensor) for tensor in tensors})


def _action_space(spec: EnvironmentSpec) -> Any:
    if spec.action.discrete:
        return spaces.Discrete(spec.action.size)
    return spaces.Box(-1.0, 1.0, (spec.action.size,), np.float32)


def _agent_actions(spec: EnvironmentSpec, actions: Any, count: int) -> npt.NDArray[np.float32]:
    """[count, size] as the child wants them. DataError for another shape, an unknown choice, a number that is not finite."""
    given = np.asarray(actions)
    if not spec.action.discrete:
        if given.shape != (count, spec.action.size) or given.dtype.kind not in "fiu" or not np.all(np.isfinite(given)):
            raise DataError(f"actions are {given.dtype}{list(given.shape)}: expected [{count}, {spec.action.size}] finite "
                            "numbers")
        return given.astype(np.float32)
    if given.shape != (count,) or given.dtype.kind not in "iu" or np.any(given < 0) or np.any(given >= spec.action.size):
        raise DataError(f"actions are {given.tolist()}: expected {count} choices from 0 to {spec.action.size - 1}")
    one_hot: npt.NDArray[np.float32] = np.eye(spec.action.size, dtype=np.float32)[given]
    return one_hot


class _Seeds:
    """Seeds of one environment's episodes: one that is given is used as it is, the next ones are drawn from it."""

    def __init__(self) -> None:
        self._random: np.random.Generator | None = None

    def next(self, given: int | None) -> int:
        if given is not None:
            self._random, _ = seeding.np_random(given)
            return int(given) & _SEED_MASK
        if self._random is None:
            self._random, _ = seeding.np_random()
        return int(self._random.integers(1 << 63))


def _check_render_mode(render_mode: str | None) -> str | None:
    if render_mode not in (None, "rgb_array"):
        raise ConfigError(f"render_mode is {render_mode!r}: expected None or 'rgb_array'")
    return render_mode


class TaskEnv(gymnasium.Env):  # type: ignore[misc]
    """One environment. Its observations and infos are new objects every time. DataError (a ValueError) for an action out of the
    action space's shape; EnvironmentFault when the environment failed: `reset` goes on."""

    metadata = dict(_METADATA)

    def __init__(self, task: str, *, render_mode: str | None = None, height: int = 240, width: int = 320, **settings: Any):
        self.render_mode = _check_render_mode(render_mode)
        self._size = height, width
        self._child = EnvProcess(task, 1, **settings)
        self.observation_space = _observation_space(self._child.spec.observations)
        self.action_space = _action_space(self._child.spec)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`seed` is the episode's, as orrery-actor and `orrery inspect rollout` have it; without one it is drawn."""
        super().reset(seed=seed)
        episode = int(self.np_random.integers(1 << 63)) if seed is None else seed & _SEED_MASK
        states = self._child.advance([RESET], [episode], np.zeros((1, self._child.spec.action.size)))
        return _lane(states.observations, 0), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        states = self._child.advance([STEP], [0], _agent_actions(self._child.spec, np.asarray(action)[None], 1))
        return (_lane(states.observations, 0), float(states.rewards[0]), bool(states.terminated[0]), bool(states.truncated[0]),
                {})

    def render(self) -> npt.NDArray[np.uint8] | None:
        """[height, width, 3] uint8 with render_mode "rgb_array", else None."""
        return None if self.render_mode is None else self._child.render(0, *self._size)

    def close(self) -> None:
        self._child.close()


class TaskVectorEnv(gymnasium.vector.VectorEnv):  # type: ignore[misc]
    """`num_envs` environments that step in parallel in one child process. Environment i of `reset(seed=s)` plays the episodes
    of a TaskEnv that was reset with s + i, whatever the others do. DataError for actions out of the action space's shape
    changes nothing; after an EnvironmentFault all must be reset.

    autoreset_mode: as of gymnasium.vector.SyncVectorEnv. With DISABLED, `reset(options={"reset_mask": bool [num_envs]})` resets
    some of them."""

    metadata = dict(_METADATA)

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        height: int = 240,
        width: int = 320,
        **settings: Any,
    ):
        self.render_mode = _check_render_mode(render_mode)
        self._mode = _autoreset(autoreset_mode)
        self._size = height, width
        self._child = EnvProcess(task, num_envs, **settings)
        self.num_envs = num_envs
        self.metadata = {**_METADATA, "autoreset_mode": self._mode}
        self.single_observation_space = _observation_space(self._child.spec.observations)
        self.single_action_space = _action_space(self._child.spec)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seeds = [_Seeds() for _ in range(num_envs)]
        self._ended: npt.NDArray[np.bool_] = np.zeros(num_envs, np.bool_)
        self._ready = False  # reset, and without a fault since

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`seed`: of environment 0, the others' follow it; or one for each; None where it is drawn."""
        mask = self._reset_mask(options)
        if seed is None or isinstance(seed, int | np.integer):
            super().reset(seed=None if seed is None else int(seed))
            seeds: list[int | None] = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed has {len(seeds)} numbers: expected {self.num_envs}, one for each environment")
        if not (self._ready or mask.all()):
            raise EnvironmentFault("some environments are to be reset before all were, or after a fault: reset all of them")
        states = self._reset(mask, seeds)
        self._ended &= ~mask
        self._ready = True
        return states.observations, {}

    def step(
        self, actions: Any
    ) -> tuple[dict[str, Any], npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        chosen = _agent_actions(self._child.spec, actions, self.num_envs)
        if not self._ready:
            raise EnvironmentFault("step before a reset of all environments, which a fault makes necessary, too")
        if self._mode == AutoresetMode.DISABLED and np.any(self._ended):
            raise EnvironmentFault(f"environments {np.flatnonzero(self._ended).tolist()} have ended: reset them "
                                   "(options={'reset_mask': …}), autoreset is disabled")
        resets = self._ended  # only with NEXT_STEP
        seeds = [self._seeds[i].next(None) if resets[i] else 0 for i in range(self.num_envs)]
        states = self._advance(np.where(resets, RESET, STEP), seeds, chosen)
        self._ended = states.terminated | states.truncated
        if self._mode == AutoresetMode.SAME_STEP and np.any(self._ended):
            return self._same_step(states)
        return states.observations, states.rewards, states.terminated, states.truncated, {}

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """A picture of each, [height, width, 3] uint8, with render_mode "rgb_array", else None."""
        if self.render_mode is None:
            return None
        return tuple(self._child.render(i, *self._size) for i in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        self._child.close()

    def _same_step(self, states: States) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Resets those that have ended; what ended them is in the infos."""
        ended, self._ended = self._ended, np.zeros(self.num_envs, np.bool_)
        finals = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            finals[i] = _lane(states.observations, int(i))
        infos = {"final_obs": finals, "_final_obs": ended, "final_info": {}, "_final_info": ended.copy()}
        first = self._reset(ended, [None] * self.num_envs)
        return first.observations, states.rewards, states.terminated, states.truncated, infos

    def _reset(self, mask: npt.NDArray[np.bool_], given: Sequence[int | None]) -> States:
        seeds = [self._seeds[i].next(given[i]) if mask[i] else 0 for i in range(self.num_envs)]
        return self._advance(np.where(mask, RESET, NOTHING), seeds, np.zeros((self.num_envs, self._child.spec.action.size)))

    def _advance(self, what: npt.NDArray[Any], seeds: Sequence[int], actions: npt.NDArray[Any]) -> States:
        try:
            return self._child.advance(what.tolist(), seeds, actions)
        except EnvironmentFault:
            self._ready = False
            raise

    def _reset_mask(self, options: Mapping[str, Any] | None) -> npt.NDArray[np.bool_]:
        if options is None or "reset_mask" not in options:
            return np.ones(self.num_envs, np.bool_)
        mask = options["reset_mask"]
        if not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(f"options['reset_mask'] is {mask!r}: expected an array of bool [{self.num_envs}], not all False")
        return mask


def _lane(observations: Mapping[str, npt.NDArray[Any]], index: int) -> dict[str, npt.NDArray[Any]]:
    return {name: array[index].copy() for name, array in observations.items()}


def _autoreset(mode: AutoresetMode | str) -> AutoresetMode:
    for known in AutoresetMode:
        if mode in (known, known.name, known.value):
            return known
    raise ConfigError(f"autoreset_mode is {mode!r}: expected one of {', '.join(known.name for known in AutoresetMode)}")


if TASK_ID not in gymnasium.registry:
    gymnasium.register(TASK_ID, entry_point=f"{__name__}:TaskEnv", vector_entry_point=f"{__name__}:TaskVectorEnv")
