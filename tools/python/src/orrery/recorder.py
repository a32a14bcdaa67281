"""Turns the steps of one episode into chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.chunk_codec import encode_rows
from orrery.errors import DataError
from orrery.replay_client import Chunk, Episode, EpisodeEnd
from orrery.specification import EnvironmentSpec


class EpisodeRecorder:
    """Row t holds an observation, the action that led to it and the reward that came with it; row 0 has zeros. The newest
    row is held back until the next one or the end, so that the end can always be told with a row. `task`: place of the
    episode's task among the configuration's. Not thread-safe.

        recorder = EpisodeRecorder(episode, spec, observation)
        for …:
            chunk = recorder.add(action, observation, reward)
            if chunk is not None:
                writer.append(chunk)
        writer.append(recorder.end(EpisodeEnd.TERMINATED))
    """

    def __init__(
        self, episode: Episode, spec: EnvironmentSpec, observation: Mapping[str, npt.NDArray[Any]], chunk_rows: int = 50,
        task: int = 0,
    ):
        if not 1 <= chunk_rows <= 1000:
            raise DataError(f"chunk_rows is {chunk_rows}: expected 1 to 1000")
        self._episode = episode
        self._spec = spec
        self._task = task
        self._chunk_rows = chunk_rows
        self._hash = spec.hash()
        self._first_row = 0
        self._version = (0, 0)
        self._observations: list[dict[str, npt.NDArray[Any]]] = []
        self._actions: list[npt.NDArray[np.float32]] = []
        self._rewards: list[float] = []
        self._push(np.zeros(spec.action.size, np.float32), observation, 0.0)

    @property
    def rows(self) -> int:
        """Rows of the episode so far."""
        return self._first_row + len(self._rewards)

    def add(
        self,
        action: npt.NDArray[np.float32],
        observation: Mapping[str, npt.NDArray[Any]],
        reward: float,
        version: tuple[int, int] = (0, 0),
    ) -> Chunk | None:
        """Adds a row; `version` is that of the snapshot that chose the action. Returns the rows before it once they fill a
        chunk. DataError for a row that does not fit the specification."""
        chunk = self._take(EpisodeEnd.CONTINUES) if len(self._rewards) >= self._chunk_rows else None
        self._push(action, observation, reward)
        self._version = max(self._version, version)
        return chunk

    def end(self, end: EpisodeEnd) -> Chunk:
        """The last chunk; its last row is terminal when the task ended (TERMINATED)."""
        if end == EpisodeEnd.CONTINUES:
            raise DataError("an episode ends TERMINATED or TRUNCATED")
        return self._take(end)

    def _push(self, action: npt.NDArray[np.float32], observation: Mapping[str, npt.NDArray[Any]], reward: float) -> None:
        row = {}
        for tensor in self._spec.observations:
            if tensor.name not in observation:
                raise DataError(f"the observation has no {tensor.name!r}")
            value = np.array(observation[tensor.name])  # a copy: environments reuse their buffers
            if value.dtype.name != tensor.dtype or value.shape != tensor.shape:
                raise DataError(f"{tensor.name!r} is {value.dtype}{list(value.shape)}: expected {tensor.dtype}"
                                f"{list(tensor.shape)}")
            row[tensor.name] = value
        if action.shape != (self._spec.action.size,):
            raise DataError(f"the action is {list(action.shape)}: expected [{self._spec.action.size}]")
        self._observations.append(row)
        self._actions.append(np.array(action, np.float32))
        self._rewards.append(float(reward))

    def _take(self, end: EpisodeEnd) -> Chunk:
        rows = len(self._rewards)
        is_first = np.zeros(rows, np.uint8)
        is_first[0] = self._first_row == 0
        is_terminal = np.zeros(rows, np.uint8)
        is_terminal[-1] = end == EpisodeEnd.TERMINATED
        fields = {tensor.name: np.stack([row[tensor.name] for row in self._observations])
                  for tensor in self._spec.observations}
        payload = encode_rows({
            **fields, "action": np.stack(self._actions), "reward": np.array(self._rewards, np.float32), "is_first": is_first,
            "is_terminal": is_terminal})
        chunk = Chunk(self._episode.run_id, self._episode.episode_id, self._first_row, rows, self._episode.mode, end,
                      self._hash, self._version, float(sum(self._rewards)), payload, self._task)
        self._first_row += rows
        self._version = (0, 0)
        self._observations.clear()
        self._actions.clear()
        self._rewards.clear()
        return chunk
