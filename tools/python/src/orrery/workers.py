"""Lanes in a process of their own: one that hangs or dies costs its episodes, not the actor."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.connection
import signal
import time
import traceback
from typing import Any, Protocol

from orrery.environments import EnvironmentSettings, Lanes, make_lanes
from orrery.errors import ConfigError, EnvironmentFault
from orrery.specification import EnvironmentSpec

_MAKE_TIMEOUT = 300.0  # seconds: a first import may compile or download
_END_TIMEOUT = 5.0


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a method returned, and `fresh()` after it."""

    value: Any
    fresh: list[bool]


class Worker(Protocol):
    """Lanes and one call at a time to them. Not thread-safe."""

    spec: EnvironmentSpec
    count: int

    def submit(self, method: str, *arguments: Any) -> None:
        """Begins a call of a method of Lanes."""

    def result(self, timeout: float) -> Reply:
        """Of the call begun. EnvironmentFault names the environment and what happened; the worker is useless then."""

    def close(self) -> None: ...


def describe(error: BaseException) -> str:
    """The error and where it was raised, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


class LocalWorker:
    """Lanes in this process: nothing can be done about one that hangs."""

    def __init__(self, settings: EnvironmentSettings):
        self._name = settings.env
        try:
            self._lanes: Lanes = make_lanes(settings)
        except ConfigError as error:
            raise ConfigError(f"environment {self._name}: {error}") from error
        except Exception as error:
            raise EnvironmentFault(f"environment {self._name} cannot be made: {describe(error)}") from error
        self.spec = self._lanes.spec
        self.count = self._lanes.count
        self._call: tuple[str, tuple[Any, ...]] = ("fresh", ())

    def submit(self, method: str, *arguments: Any) -> None:
        self._call = (method, arguments)

    def result(self, timeout: float) -> Reply:
        method, arguments = self._call
        try:
            return Reply(getattr(self._lanes, method)(*arguments), self._lanes.fresh())
        except ConfigError:
            raise
        except Exception as error:
            raise EnvironmentFault(f"{method}: {describe(error)}") from error

    def close(self) -> None:
        try:
            self._lanes.close()
        except Exception:  # it may be the one that failed
            pass


def _serve(connection: multiprocessing.connection.Connection, settings: EnvironmentSettings) -> None:
    """The process: makes lanes, then answers calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the actor's to handle
    try:
        lanes = make_lanes(settings)
    except Exception as error:
        config = isinstance(error, ConfigError)
        connection.send(("config" if config else "fault", str(error) if config else describe(error)))
        return
    connection.send(("made", (lanes.spec, lanes.count)))
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            break
        if message is None:
            break
        method, arguments = message
        try:
            answer: tuple[str, Any] = ("value", Reply(getattr(lanes, method)(*arguments), lanes.fresh()))
        except ConfigError as error:
            answer = ("config", str(error))
        except Exception as error:
            answer = ("fault", describe(error))
        connection.send(answer)
    lanes.close()


class ProcessWorker:
    """Lanes in a process that is killed when they do not answer in time."""

    def __init__(self, settings: EnvironmentSettings):
        self._name = settings.env
        context = multiprocessing.get_context("spawn")  # threads and gRPC do not survive a fork
        self._connection, theirs = context.Pipe()
        # A vector environment may have processes of its own, which a daemon may not.
        self._process = context.Process(
            target=_serve, args=(theirs, settings), daemon=settings.vector == 0, name=f"env-{settings.env}")
        self._process.start()
        theirs.close()
        self._submitted = time.monotonic()
        self._method = "make"
        try:
            self.spec, self.count = self._receive(_MAKE_TIMEOUT, "made")
        except EnvironmentFault as error:
            raise EnvironmentFault(f"environment {self._name} cannot be made: {error}") from error

    def submit(self, method: str, *arguments: Any) -> None:
        self._submitted = time.monotonic()
        self._method = method
        try:
            self._connection.send((method, arguments))
        except OSError:
            pass  # it died; `result` says so

    def result(self, timeout: float) -> Reply:
        reply = self._receive(timeout, "value")
        assert isinstance(reply, Reply)
        return reply

    def _receive(self, timeout: float, expected: str) -> Any:
        left = max(0.0, self._submitted + timeout - time.monotonic())
        try:
            if not self._connection.poll(left):
                self._kill()
                raise EnvironmentFault(f"{self._method}: no answer within {timeout:g} s, its process was killed")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._kill()
            raise EnvironmentFault(f"{self._method}: its process ended with exit code {self._process.exitcode}") from error
        if kind == "config":
            self._kill()
            raise ConfigError(f"environment {self._name}: {value}")
        if kind != expected:
            raise EnvironmentFault(f"{self._method}: {value}")
        return value

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def close(self) -> None:
        try:
            self._connection.send(None)
        except (OSError, ValueError):
            pass  # dead or killed already
        self._process.join(_END_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()
