"""Client of the replay service: episodes handed out and read back, totals, snapshots."""

from __future__ import annotations

import dataclasses
import enum
import secrets
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from orrery.channel import Tls, make_channel, metadata, retry
from orrery.chunk_codec import decode_rows
from orrery.common.v1 import snapshot_pb2
from orrery.errors import DataError, ServiceError
from orrery.replay.v1 import replay_pb2
from orrery.specification import EnvironmentSpec

_SERVICE = "/orrery.replay.v1.ReplayService/"
_MAX_SNAPSHOT_BYTES = 2 << 30


class EpisodeMode(enum.IntEnum):
    """How actions are chosen, and whether the episode is trained on."""

    RANDOM = 1
    TRAIN = 2
    EVALUATE = 3


class EpisodeEnd(enum.IntEnum):
    """Whether and how an episode ends with the last row of a chunk."""

    CONTINUES = 1
    TERMINATED = 2
    TRUNCATED = 3


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode handed out. `run_complete`: nothing was, and nothing will be."""

    run_id: str
    run_complete: bool = False
    episode_id: int = 0
    mode: EpisodeMode = EpisodeMode.RANDOM
    task: str = ""
    seed: int = 0
    lease_seconds: int = 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one episode. `version`: generation and counter of the newest snapshot that chose an action here;
    (0, 0): none. `task`: its place among the configuration's tasks."""

    run_id: str
    episode_id: int
    first_row: int
    rows: int
    mode: EpisodeMode
    end: EpisodeEnd
    specification_hash: int
    version: tuple[int, int]
    reward_sum: float
    payload: bytes
    task: int = 0

    def to_proto(self) -> replay_pb2.Chunk:
        chunk = replay_pb2.Chunk(
            run_id=self.run_id, episode_id=self.episode_id, first_row=self.first_row, rows=self.rows,
            mode=int(self.mode), end=int(self.end),  # type: ignore[arg-type]
            specification_hash=self.specification_hash, reward_sum=self.reward_sum, payload=self.payload,
            task=self.task)
        if self.version != (0, 0):
            chunk.snapshot_version.generation, chunk.snapshot_version.counter = self.version
        return chunk


class ReplayClient:
    """Thread-safe. UNAVAILABLE is tried again with growing random waits until the timeout; other errors are ServiceError.

        replay = ReplayClient("127.0.0.1:7101", run="my_run")
        episode = replay.begin_episode("actor-1", spec, timeout=60)
    """

    def __init__(self, address: str, run: str, *, tls: Tls | None = None, token: str | None = None):
        self.run = run
        self._token = token
        self._lock = threading.Lock()
        self._unanswered: dict[str, list[str]] = {}  # ids of questions by actor
        self.channel = make_channel(address, tls)
        self._begin = self.channel.unary_unary(
            _SERVICE + "BeginEpisode", request_serializer=replay_pb2.BeginEpisodeRequest.SerializeToString,
            response_deserializer=replay_pb2.BeginEpisodeResponse.FromString)
        self._get_stats = self.channel.unary_unary(
            _SERVICE + "GetStats", request_serializer=replay_pb2.GetStatsRequest.SerializeToString,
            response_deserializer=replay_pb2.GetStatsResponse.FromString)
        self._list = self.channel.unary_unary(
            _SERVICE + "ListEpisodes", request_serializer=replay_pb2.ListEpisodesRequest.SerializeToString,
            response_deserializer=replay_pb2.ListEpisodesResponse.FromString)
        self._get_episode = self.channel.unary_stream(
            _SERVICE + "GetEpisode", request_serializer=replay_pb2.GetEpisodeRequest.SerializeToString,
            response_deserializer=replay_pb2.GetEpisodeResponse.FromString)
        self._get_snapshot = self.channel.unary_stream(
            _SERVICE + "GetSnapshot", request_serializer=replay_pb2.GetSnapshotRequest.SerializeToString,
            response_deserializer=replay_pb2.GetSnapshotResponse.FromString)

    def __enter__(self) -> ReplayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()

    def append_chunks(self, requests: Iterator[replay_pb2.AppendChunksRequest]) -> Any:
        """The raw stream of acknowledgements; ReplayWriter is what most callers want."""
        call = self.channel.stream_stream(
            _SERVICE + "AppendChunks", request_serializer=replay_pb2.AppendChunksRequest.SerializeToString,
            response_deserializer=replay_pb2.AppendChunksResponse.FromString)
        return call(requests, metadata=metadata(self._token))

    def begin_episode(self, actor_id: str, spec: EnvironmentSpec, timeout: float) -> Episode | None:
        """None: none may begin within `timeout` seconds. When no answer came, or an error that is not final, the next call for
        this actor asks the same question again (BeginEpisodeRequest.request_id): an episode whose answer was lost is played
        all the same."""
        request = replay_pb2.BeginEpisodeRequest(
            run=self.run, actor_id=actor_id, specification_hash=spec.hash(), request_id=self._take_question(actor_id))
        answered = False
        try:
            response = retry(timeout, lambda left: self._begin(request, timeout=left, metadata=metadata(self._token)))
            answered = True
        except ServiceError as error:
            answered = error.final
            if error.code == grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            raise
        finally:
            if not answered:
                with self._lock:
                    self._unanswered.setdefault(actor_id, []).append(request.request_id)
        if response.run_complete:
            return Episode(response.run_id, run_complete=True)
        try:
            mode = EpisodeMode(response.mode)
        except ValueError as error:
            raise DataError(f"episode mode {response.mode}: expected RANDOM, TRAIN or EVALUATE") from error
        return Episode(response.run_id, False, response.episode_id, mode, response.task, response.seed, response.lease_seconds)

    def _take_question(self, actor_id: str) -> str:
        """Id of a question of this actor that waits for its answer, which nobody else asks meanwhile, or a new one."""
        with self._lock:
            unanswered = self._unanswered.get(actor_id)
            return unanswered.pop() if unanswered else secrets.token_hex(8)

    def stats(self, timeout: float = 10.0) -> replay_pb2.GetStatsResponse:
        """Totals of the data set and of the run."""
        request = replay_pb2.GetStatsRequest(run=self.run)
        return retry(timeout, lambda left: self._get_stats(request, timeout=left, metadata=metadata(self._token)))

    def episodes(self, mode: EpisodeMode | None = None, timeout: float = 60.0) -> Iterator[replay_pb2.EpisodeSummary]:
        """What is stored of each episode (of a mode), in the order of their numbers, asked for page by page."""
        request = replay_pb2.ListEpisodesRequest(run=self.run, mode=0 if mode is None else int(mode))  # type: ignore[arg-type]
        while True:
            response = retry(timeout, lambda left: self._list(request, timeout=left, metadata=metadata(self._token)))
            yield from response.episodes
            if response.next_episode_id == 0:
                return
            request.first_episode_id = response.next_episode_id

    def get_episode(self, episode_id: int, timeout: float = 60.0) -> dict[str, npt.NDArray[Any]]:
        """The stored rows of one episode: arrays [rows, …] of the modalities, `action`, `reward`, `is_first` and `is_terminal`.
        NOT_FOUND when none is stored."""
        request = replay_pb2.GetEpisodeRequest(run=self.run, episode_id=episode_id)
        chunks = retry(timeout, lambda left: [
            response.chunk for response in self._get_episode(request, timeout=left, metadata=metadata(self._token))])
        parts = [decode_rows(chunk.payload, chunk.rows) for chunk in chunks]
        if not parts or any(part.keys() != parts[0].keys() for part in parts):
            raise DataError(f"episode {episode_id}: its {len(parts)} chunks have not the same fields")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_snapshot(self, timeout: float = 60.0) -> bytes:
        """The newest snapshot, a safetensors file (docs/snapshot_format.md). NOT_FOUND when there is none."""
        request = replay_pb2.GetSnapshotRequest(run=self.run)
        return retry(timeout, lambda left: _assemble(
            response.part for response in self._get_snapshot(request, timeout=left, metadata=metadata(self._token))))


def _assemble(parts: Iterator[snapshot_pb2.SnapshotPart]) -> bytes:
    file = bytearray()
    first: snapshot_pb2.SnapshotPart | None = None
    for part in parts:
        first = first or part
        if not 8 <= first.total_bytes <= _MAX_SNAPSHOT_BYTES:
            raise DataError(f"snapshot of {first.total_bytes} bytes: expected 8 to {_MAX_SNAPSHOT_BYTES}")
        same = (part.version == first.version and part.total_bytes == first.total_bytes and part.checksum == first.checksum)
        if not same or part.offset != len(file) or len(file) + len(part.data) > first.total_bytes:
            raise DataError(f"part of a snapshot at {part.offset}: expected the part that follows {len(file)} bytes")
        file += part.data
    if first is None or len(file) != first.total_bytes:
        raise DataError("the service ended the stream before the snapshot was complete")
    if zlib.crc32(file) != first.checksum:
        raise DataError("snapshot: wrong checksum")
    return bytes(file)
