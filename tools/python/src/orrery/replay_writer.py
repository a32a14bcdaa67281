"""Sends chunks and keeps each until it is acknowledged, across reconnects and restarts of the service."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc

from orrery import tracing
from orrery.channel import Backoff, to_error
from orrery.errors import DataError, ServiceError
from orrery.replay.v1 import replay_pb2
from orrery.replay_client import Chunk, ReplayClient

_log = logging.getLogger("orrery")
_MAX_PAYLOAD_BYTES = 64 << 20
_MAX_FAILURES_KEPT = 1024


@dataclasses.dataclass
class _Entry:
    request: replay_pb2.AppendChunksRequest
    bytes: int

    @property
    def key(self) -> tuple[int, int]:
        return self.request.chunk.episode_id, self.request.chunk.first_row


@dataclasses.dataclass(eq=False)
class _Stream:
    """One call of AppendChunks: its first `sent` entries of the queue went out on it."""

    sent: int = 0
    broken: bool = False


class ReplayWriter:
    """Thread-safe. One thread reads acknowledgements, and grpc's own sends; the queue holds what is not acknowledged, in
    order, at most `max_unacknowledged_bytes` (one chunk always fits alone). Leases of the episodes named by `keep_alive` are
    renewed every `heartbeat` seconds. After a broken connection everything not acknowledged is sent again: the service stores
    each chunk once.

        with ReplayWriter(replay) as writer:
            writer.append(chunk)
            writer.flush(timeout=60)
    """

    def __init__(self, replay: ReplayClient, *, max_unacknowledged_bytes: int = 64 << 20, heartbeat: float = 10.0):
        self._replay = replay
        self._limit = max_unacknowledged_bytes
        self._heartbeat = heartbeat
        self._changed = threading.Condition()
        # Guarded by `_changed`.
        self._queue: collections.deque[_Entry] = collections.deque()
        self._bytes = 0
        self._failures: dict[int, ServiceError] = {}  # by episode
        self._unreported: ServiceError | None = None
        self._last_error: ServiceError | None = None
        self._alive: tuple[int, ...] = ()
        self._next_heartbeat = time.monotonic() + heartbeat
        self._stream: _Stream | None = None
        self._call: Any = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="orrery-replay-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> ReplayWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def unacknowledged_bytes(self) -> int:
        with self._changed:
            return self._bytes

    def append(self, chunk: Chunk, timeout: float | None = None) -> None:
        """Queues a chunk, in the trace around; waits while it would not fit. TimeoutError: still full after `timeout` seconds.
        ServiceError: the service has refused this episode."""
        if not 1 <= len(chunk.payload) <= _MAX_PAYLOAD_BYTES:
            raise DataError(f"chunk payload of {len(chunk.payload)} bytes: expected 1 to {_MAX_PAYLOAD_BYTES}")
        request = replay_pb2.AppendChunksRequest(run=self._replay.run, chunk=chunk.to_proto())
        if (context := tracing.current()) is not None:
            request.traceparent = context.child().traceparent
        size = request.ByteSize()
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                if chunk.episode_id in self._failures:
                    raise self._failures[chunk.episode_id]
                if self._closed:
                    raise ServiceError(grpc.StatusCode.CANCELLED, "the writer is closed")
                if not self._queue or self._bytes + size <= self._limit:
                    break
                if not self._wait(deadline):
                    raise TimeoutError(f"replay has not acknowledged {self._bytes} bytes: a chunk of {size} does not fit")
            self._queue.append(_Entry(request, size))
            self._bytes += size
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> None:
        """Waits until everything queued is acknowledged. TimeoutError: it is not after `timeout` seconds. ServiceError: an
        episode was refused since the last flush."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._queue:
                if self._closed or not self._wait(deadline):
                    why = "" if self._last_error is None else f": {self._last_error}"
                    raise TimeoutError(f"replay has not acknowledged {len(self._queue)} chunks{why}")
            failure, self._unreported = self._unreported, None
        if failure is not None:
            raise failure

    def keep_alive(self, episode_ids: Iterable[int]) -> None:
        """The episodes whose leases are renewed from now on, instead of those named before."""
        with self._changed:
            self._alive = tuple(episode_ids)
            self._changed.notify_all()

    def close(self) -> None:
        """Gives up what is not acknowledged: flush first."""
        with self._changed:
            self._closed = True
            if self._call is not None:
                self._call.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _wait(self, deadline: float | None) -> bool:
        """For a change, with the lock held; False when the deadline has passed."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        self._changed.wait(left)
        return True

    def _run(self) -> None:
        backoff = Backoff()
        while self._await_work():
            with tracing.trace():  # of the stream; the chunks have those of their episodes
                error = self._run_stream(backoff)
                with self._changed:
                    if self._closed:
                        return
                    self._handle_end(error)
            with self._changed:
                until = time.monotonic() + backoff.next()
                while not self._closed and self._wait(until):
                    pass

    def _await_work(self) -> bool:
        with self._changed:
            while not self._closed and not self._queue and not self._heartbeat_due():
                self._wait_for_work()
            return not self._closed

    def _heartbeat_due(self) -> bool:
        return bool(self._alive) and time.monotonic() >= self._next_heartbeat

    def _wait_for_work(self) -> None:
        self._changed.wait(max(0.0, self._next_heartbeat - time.monotonic()) if self._alive else None)

    def _run_stream(self, backoff: Backoff) -> ServiceError:
        """Opens a stream and uses it until it breaks or the writer is closed; says how it ended."""
        stream = _Stream()
        with self._changed:
            if self._closed:
                return ServiceError(grpc.StatusCode.CANCELLED, "closed")
            self._stream = stream
            call = self._call = self._replay.append_chunks(self._requests(stream))
        error = ServiceError(grpc.StatusCode.UNAVAILABLE, "the service ended the stream")
        try:
            for response in call:
                with self._changed:
                    self._acknowledge(stream, response.episode_id, response.first_row)
                backoff.reset()
        except grpc.RpcError as rpc_error:
            error = to_error(rpc_error)
        except ServiceError as protocol_error:
            call.cancel()
            error = protocol_error
        with self._changed:
            stream.broken = True
            self._call = None
            self._changed.notify_all()
        return error

    def _requests(self, stream: _Stream) -> Iterator[replay_pb2.AppendChunksRequest]:
        """What goes out on one stream; ends with it."""
        while True:
            with self._changed:
                while not (self._closed or stream.broken or stream.sent < len(self._queue) or self._heartbeat_due()):
                    self._wait_for_work()
                if self._closed or stream.broken:
                    return
                if self._heartbeat_due():
                    self._next_heartbeat = time.monotonic() + self._heartbeat
                    request = replay_pb2.AppendChunksRequest(run=self._replay.run, alive_episode_ids=self._alive)
                else:
                    request = self._queue[stream.sent].request
                    stream.sent += 1
            yield request

    def _acknowledge(self, stream: _Stream, episode_id: int, first_row: int) -> None:
        """Acknowledgements come in the order of sending."""
        if stream.sent == 0 or self._queue[0].key != (episode_id, first_row):
            raise ServiceError(grpc.StatusCode.INTERNAL, f"replay acknowledged episode {episode_id} row {first_row}, which is "
                               "not the next chunk sent")
        self._bytes -= self._queue.popleft().bytes
        stream.sent -= 1
        self._changed.notify_all()

    def _handle_end(self, error: ServiceError) -> None:
        """A final error is about the oldest chunk sent and not acknowledged: its episode is given up, the others go on."""
        if self._last_error is None or error.code != self._last_error.code:
            _log.warning("replay stream ended error=\"%s\" unacknowledged_chunks=%d", error, len(self._queue))
        self._last_error = error
        if not error.final or self._stream is None or self._stream.sent == 0:
            return
        episode = self._queue[0].key[0]
        with tracing.use(tracing.Trace.parse(self._queue[0].request.traceparent)):
            _log.error("replay refused episode=%d error=\"%s\"", episode, error)
        self._failures[episode] = error
        if len(self._failures) > _MAX_FAILURES_KEPT:
            del self._failures[min(self._failures)]
        self._unreported = self._unreported or error
        kept = [entry for entry in self._queue if entry.key[0] != episode]
        self._queue = collections.deque(kept)
        self._bytes = sum(entry.bytes for entry in kept)
        self._changed.notify_all()
