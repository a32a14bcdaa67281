"""Channels to services, deadlines, and the waits between tries."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import random
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from orrery import tracing
from orrery.errors import ConfigError, ServiceError

MAX_MESSAGE_BYTES = 68 << 20  # a chunk of 64 MiB and what surrounds it

_OPTIONS = (
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),  # services talk to each other directly
)
_SCHEMES = ("unix:", "ipv4:", "ipv6:")
_Answer = TypeVar("_Answer")


@dataclasses.dataclass(frozen=True)
class Tls:
    """Files in PEM. `ca` None: the system's roots. `certificate` and `key` together: this client proves who it is.
    `server_name`: the name expected in the server's certificate, where it is not the address's."""

    ca: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None


def make_channel(address: str, tls: Tls | None = None) -> grpc.Channel:
    """To HOST:PORT (or any gRPC target, such as "dns:///planner:7103"): keepalive every 10 s, round robin over the addresses
    of the name, reconnects within 2 s. Without `tls` unencrypted. ConfigError for an empty address or a file that is not
    there."""
    if not address:
        raise ConfigError("address is empty: expected HOST:PORT")
    target = address if "://" in address or address.startswith(_SCHEMES) else f"dns:///{address}"
    if tls is None:
        return grpc.insecure_channel(target, options=_OPTIONS)
    if (tls.certificate is None) != (tls.key is None):
        raise ConfigError("tls: certificate and key belong together: give both or none")
    credentials = grpc.ssl_channel_credentials(_read(tls.ca), _read(tls.key), _read(tls.certificate))
    named = () if tls.server_name is None else (("grpc.ssl_target_name_override", tls.server_name),)
    return grpc.secure_channel(target, credentials, options=_OPTIONS + named)


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: {os.fspath(path)}: {error.strerror}") from error


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with a call: its trace, and the token, where there is one."""
    return tracing.metadata() if token is None else (*tracing.metadata(), ("authorization", f"Bearer {token}"))


class Backoff:
    """Waits that double from `first` to `last` seconds, each drawn from its upper half. Not thread-safe."""

    def __init__(self, first: float = 0.05, last: float = 2.0):
        self._first = first
        self._last = last
        self._current = first

    def next(self) -> float:
        wait = self._current * random.uniform(0.5, 1.0)
        self._current = min(self._current * 2, self._last)
        return wait

    def reset(self) -> None:
        self._current = self._first


def to_error(error: grpc.RpcError) -> ServiceError:
    """Calls of grpc raise errors that are calls, too."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return ServiceError(code or grpc.StatusCode.UNKNOWN, details or "")


def retry(
    timeout: float,
    call: Callable[[float], _Answer],
    codes: frozenset[grpc.StatusCode] = frozenset({grpc.StatusCode.UNAVAILABLE}),
    shortest_try: float = math.inf,
) -> _Answer:
    """Calls `call(its seconds)` until it gives something else than an error of `codes`, at most `timeout` seconds; then its last
    error. A try gets half of the time that is left, but at least `shortest_try`, and one that took all its time is followed by
    another. All tries belong to one trace."""
    with tracing.use(None):
        return _retry(timeout, call, codes, shortest_try)


def _retry(
    timeout: float, call: Callable[[float], _Answer], codes: frozenset[grpc.StatusCode], shortest_try: float
) -> _Answer:
    backoff = Backoff()
    deadline = time.monotonic() + timeout
    while True:
        left = max(0.0, deadline - time.monotonic())
        given = min(left, max(left / 2, shortest_try))
        try:
            return call(given)
        except grpc.RpcError as rpc_error:
            error = to_error(rpc_error)
        hung = error.code == grpc.StatusCode.DEADLINE_EXCEEDED and given < left
        wait = backoff.next()
        if not (hung or error.code in codes) or time.monotonic() + wait >= deadline:
            raise error
        time.sleep(wait)
