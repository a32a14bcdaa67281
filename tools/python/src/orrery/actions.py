"""The agent's actions, [-1, 1] or one-hot, as an environment wants them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.errors import ConfigError
from orrery.specification import ActionSpec


class ActionMap:
    """Continuous: scaled to `low` and `high`, clipped; numbers beyond those that the environment takes are ignored. Discrete:
    the number of the choice, from `start`. Constant."""

    def __init__(self, spec: ActionSpec, *, low: npt.NDArray[Any] | None = None, high: npt.NDArray[Any] | None = None,
                 dtype: np.dtype[Any] | None = None, start: int = 0):
        self.spec = spec
        self._low = None if low is None else np.asarray(low, np.float64)
        self._high = None if high is None else np.asarray(high, np.float64)
        self._dtype = np.dtype(np.float32) if dtype is None else dtype
        self._start = start

    def to_native(self, action: npt.NDArray[np.float32]) -> Any:
        """A number for a discrete action, else an array of the environment's shape and dtype."""
        if self._low is None or self._high is None:
            return self._start + int(np.argmax(action))
        unit = np.clip(np.asarray(action, np.float64)[: self._low.size].reshape(self._low.shape), -1.0, 1.0)
        native = (self._low + self._high) / 2 + (self._high - self._low) / 2 * unit
        # float32 may round over a bound of float64.
        return np.clip(native.astype(self._dtype), self._low.astype(self._dtype), self._high.astype(self._dtype))


    def padded(self, size: int) -> ActionMap:
        """The same with `size` numbers, so that one agent can play environments with fewer; 0: as it is."""
        if size == 0 or size == self.spec.size:
            return self
        if self.spec.discrete or size < self.spec.size:
            raise ConfigError(f"an action of {size} numbers is asked for: the environment's is "
                              f"{'discrete' if self.spec.discrete else 'continuous'} {self.spec.size}")
        return ActionMap(ActionSpec(size), low=self._low, high=self._high, dtype=self._dtype)


def _continuous(low: npt.NDArray[Any], high: npt.NDArray[Any], dtype: np.dtype[Any], what: str) -> ActionMap:
    if dtype.kind != "f":
        raise ConfigError(f"{what} has dtype {dtype}: expected floating point")
    if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low <= high)):
        raise ConfigError(f"{what} is unbounded, from {np.min(low)} to {np.max(high)}: actions are scaled from [-1, 1], so "
                          "wrap the environment in one that states finite bounds (gymnasium.wrappers.RescaleAction)")
    return ActionMap(ActionSpec(int(np.prod(low.shape))), low=low, high=high, dtype=dtype)


def gymnasium_action(space: Any) -> ActionMap:
    """Of a gymnasium.Space: Box with finite bounds, or Discrete."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return ActionMap(ActionSpec(int(space.n), discrete=True), start=int(space.start))
    if isinstance(space, spaces.Box):
        return _continuous(space.low, space.high, np.dtype(space.dtype), f"action space {space}")
    raise ConfigError(f"action space {space}: expected Box or Discrete")


def dm_env_action(spec: Any) -> ActionMap:
    """Of what dm_env.Environment.action_spec returns: a BoundedArray with finite bounds, or a DiscreteArray."""
    if hasattr(spec, "num_values"):
        return ActionMap(ActionSpec(int(spec.num_values), discrete=True), start=int(spec.minimum))
    if not hasattr(spec, "minimum"):
        raise ConfigError(f"action_spec {spec}: expected one BoundedArray or DiscreteArray")
    low = np.broadcast_to(spec.minimum, spec.shape)
    high = np.broadcast_to(spec.maximum, spec.shape)
    return _continuous(low, high, np.dtype(spec.dtype), f"action_spec {spec}")
