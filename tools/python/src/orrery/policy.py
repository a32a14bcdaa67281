"""A trained agent as a function of observations."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.actions import ActionMap, gymnasium_action
from orrery.channel import Tls
from orrery.config.v1 import model_pb2
from orrery.errors import DataError
from orrery.local import Program
from orrery.pictures import as_picture, resize
from orrery.planner_client import PlannerClient


class Policy:
    """Plays what a planner serves, at "HOST:PORT", or a snapshot: for "FILE.safetensors" an `orrery-planner` is started
    (found as orrery.local.find_program says) and ended by `close`. Calls about one agent must not overlap.

        with Policy("latest.safetensors", action_space=env.action_space) as policy:
            observation, _ = env.reset()
            policy.reset()
            while …:
                observation, … = env.step(policy(observation))

    An observation is a dictionary of modalities (what is missing is unknown at this step), or, for a model of one modality,
    the array itself. Pictures of another size are averaged down; vectors are flattened. The action is in [-1, 1] (discrete:
    one-hot), or with `action_space` a valid action of that gymnasium.Space.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        action_space: Any = None,
        timeout: float = 30.0,
        device: str = "cpu",
        threads: int = 0,
        tls: Tls | None = None,
        token: str | None = None,
    ):
        self._program: Program | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._action: ActionMap | None = None if action_space is None else gymnasium_action(action_space)
        address = os.fspath(target)
        if address.endswith(".safetensors"):
            if not pathlib.Path(address).is_file():
                raise DataError(f"{address}: no such snapshot")
            self._folder = tempfile.TemporaryDirectory(prefix="orrery-")
            try:
                self._program = Program(
                    "orrery-planner", [f"--snapshot={address}", f"--device={device}", f"--threads={threads}"],
                    pathlib.Path(self._folder.name) / "planner.log")
            except BaseException:
                self._folder.cleanup()
                raise
            address, tls, token = self._program.address, None, None
        self._planner = PlannerClient(address, timeout=timeout, tls=tls, token=token)
        try:
            self.model: model_pb2.Model = self._planner.model().model
            self._check_action()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Policy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, observation: Any, *, agent: Hashable = 0, noise: float = 0.0, seed: int | None = None) -> Any:
        """The next action of `agent`. Without `noise` the planner's own."""
        action = self._planner.act(self._modalities(observation), agent=agent, noise=noise, seed=seed)
        return action if self._action is None else self._action.to_native(action)

    def reset(self, *agents: Hashable) -> None:
        """Begins an episode of these agents; of all where none is named."""
        self._planner.reset(*agents)

    def close(self) -> None:
        self._planner.close()
        if self._program is not None:
            self._program.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _check_action(self) -> None:
        if self._action is None:
            return
        size = self.model.action.discrete.size if self.model.action.HasField("discrete") else self.model.action.continuous.size
        if self._action.spec.size != size or self._action.spec.discrete != self.model.action.HasField("discrete"):
            raise DataError(f"the model's action is {self.model.action.WhichOneof('kind')} {size}, the action space's is "
                            f"{'discrete' if self._action.spec.discrete else 'continuous'} {self._action.spec.size}")

    def _modalities(self, observation: Any) -> dict[str, npt.NDArray[Any]]:
        known = {modality.name: modality for modality in self.model.modalities}
        if not isinstance(observation, Mapping):
            if len(known) != 1:
                raise DataError(f"the model has the modalities {', '.join(known)}: expected a dictionary of them")
            observation = {next(iter(known)): observation}
        unknown = [str(name) for name in observation if name not in known]
        if unknown:
            raise DataError(f"unknown modalities {', '.join(unknown)}: expected some of {', '.join(known)}")
        return {name: _fit(known[name], value) for name, value in observation.items()}


def _fit(modality: model_pb2.Modality, value: Any) -> npt.NDArray[Any]:
    if modality.HasField("image"):
        picture = as_picture(value, f"modality {modality.name!r}")
        return np.ascontiguousarray(resize(picture, modality.image.height, modality.image.width))
    return np.ravel(np.asarray(value)).astype(np.float32)
