"""This project's own tasks, simulated by a child process: `orrery env`, which steps them in parallel.

The messages are described in tools/orrery/env_server.h.
"""

from __future__ import annotations

import dataclasses
import os
import select
import struct
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from orrery.common.v1 import environment_pb2
from orrery.errors import ConfigError, DataError, EnvironmentFault
from orrery.local import find_program
from orrery.specification import DTYPES, ActionSpec, EnvironmentSpec, TensorSpec

NOTHING, RESET, STEP = 0, 1, 2

_READY, _ADVANCE, _RENDER, _STATES, _PICTURE, _ERROR = range(1, 7)
_HEADER = struct.Struct("<IB")  # length of what follows the length, kind
_MOST_TEXT = 1 << 20  # bytes of READY and ERROR
_START_TIMEOUT = 300.0  # seconds
_END_TIMEOUT = 5.0
_MARGIN = 30.0  # the child itself gives up an environment that hangs, and says which


@dataclasses.dataclass(frozen=True)
class States:
    """What followed, for N environments: rewards float64 [N], terminated and truncated bool [N], observations [N, …] by
    modality. New arrays every time."""

    rewards: npt.NDArray[np.float64]
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    observations: dict[str, npt.NDArray[Any]]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The end of its input ends the child."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        process.wait(_END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _close(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    _stop(process)
    log.close()


class EnvProcess:
    """`num_envs` environments of one task in a child process, each on a thread of its own. Not thread-safe. Ended by `close`,
    and with this object. ConfigError where the task cannot be made as it is asked for. EnvironmentFault from the methods: an
    environment failed (it needs a reset), or the child ended or hung (this object is useless then).

    image_size: 32 to 128. action_repeat: simulator steps per action, 1 to 64. time_limit: simulator steps of an episode; 0:
    the task's own. quality: "fast" or "reference" (pictures as dm_control draws them). program: the program `orrery`; None:
    found as orrery.local.find_program says. timeout: seconds that one call of an environment may take."""

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        *,
        image_size: int = 64,
        action_repeat: int = 1,
        time_limit: int = 0,
        quality: str = "fast",
        program: str | os.PathLike[str] | None = None,
        timeout: float = 60.0,
    ):
        self.task = task
        self.count = num_envs
        self._timeout = timeout
        self._asked = False  # and not yet answered
        found = find_program("orrery") if program is None else os.fspath(program)
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="orrery-")
        arguments = ["--log_level=error", "env", f"--task={task}", f"--num_envs={num_envs}", f"--image_size={image_size}",
                     f"--action_repeat={action_repeat}", f"--time_limit={time_limit}", f"--quality={quality}",
                     f"--timeout={timeout}"]
        try:
            # In a session of its own: Ctrl-C is for this process to handle.
            self._process = subprocess.Popen([found, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=self._log, bufsize=0, start_new_session=True)
        except OSError as error:
            self._log.close()
            raise ConfigError(f"{found}: {error}") from error
        self.close = weakref.finalize(self, _close, self._process, self._log)
        assert self._process.stdout is not None
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)
        try:
            self.spec = self._start()
        except EnvironmentFault as error:
            raise ConfigError(f"task {task!r}: {error}") from None

    def advance(self, what: Sequence[int], seeds: Sequence[int], actions: npt.ArrayLike) -> States:
        """What each environment does: NOTHING (its observation is the one before), RESET with its seed (64 bits), or STEP with
        its action. `actions` is [N, size]; numbers in [-1, 1] or one-hot."""
        deadline = time.monotonic() + self._timeout + _MARGIN
        self._send(_ADVANCE, np.asarray(what, np.uint8).tobytes() + np.asarray(seeds, "<u8").tobytes() +
                   np.ascontiguousarray(actions, "<f4").tobytes())
        rewards, flags = np.empty(self.count, np.float64), np.empty(self.count, np.uint8)
        observations = {tensor.name: np.empty((self.count, *tensor.shape), tensor.dtype) for tensor in self.spec.observations}
        self._receive(_STATES, [rewards, flags, *observations.values()], deadline)
        terminated = (flags & 1) != 0
        return States(rewards, terminated, ((flags & 2) != 0) & ~terminated, observations)

    def render(self, index: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        """A picture of one environment for people, [height, width, 3]."""
        deadline = time.monotonic() + self._timeout + _MARGIN
        self._send(_RENDER, struct.pack("<III", index, height, width))
        picture = np.empty((height, width, 3), np.uint8)
        self._receive(_PICTURE, [picture], deadline)
        return picture

    def _start(self) -> EnvironmentSpec:
        deadline = time.monotonic() + _START_TIMEOUT
        kind, length = self._header(deadline)
        if kind != _READY or length > _MOST_TEXT:
            raise self._dead(f"kind {kind} and {length} bytes are no READY: this is another program than `orrery env`")
        try:
            proto = environment_pb2.EnvironmentSpec.FromString(self._text(length, deadline))
            observations = tuple(TensorSpec(tensor.name, DTYPES[tensor.data_type - 1], tuple(tensor.shape))
                                 for tensor in proto.observations)
            return EnvironmentSpec(observations, ActionSpec(proto.action.size, proto.action.discrete))
        except (DecodeError, IndexError, ConfigError) as error:
            raise self._dead(f"its specification cannot be used: {error}") from error

    def _receive(self, expected: int, arrays: Sequence[npt.NDArray[Any]], deadline: float) -> None:
        """Fills the arrays in their order."""
        kind, length = self._header(deadline)
        if kind == _ERROR and length <= _MOST_TEXT:
            text = self._text(length, deadline).decode("utf-8", "replace")
            self._asked = False
            raise EnvironmentFault(f"task {self.task!r}: {text}")
        size = sum(array.nbytes for array in arrays)
        if kind != expected or length != size:
            raise self._dead(f"kind {kind} and {length} bytes: expected kind {expected} and {size}")
        for array in arrays:
            self._fill(array.reshape(-1).data.cast("B"), deadline)
        self._asked = False

    def _header(self, deadline: float) -> tuple[int, int]:
        """Kind and bytes of the body."""
        header = bytearray(_HEADER.size)
        self._fill(memoryview(header), deadline)
        length, kind = _HEADER.unpack(header)
        return kind, length - 1

    def _text(self, length: int, deadline: float) -> bytes:
        text = bytearray(length)
        self._fill(memoryview(text), deadline)
        return bytes(text)

    def _fill(self, buffer: memoryview, deadline: float) -> None:
        assert self._process.stdout is not None
        while len(buffer) > 0:
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise self._dead("it did not answer in time and was killed", kill=True)
            count = self._process.stdout.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                raise self._dead("it ended")
            buffer = buffer[count:]

    def _send(self, kind: int, body: bytes) -> None:
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise EnvironmentFault(f"task {self.task!r}: its process has ended")
        if self._asked:  # by a call that Ctrl-C, for example, has ended
            raise self._dead("the answer to an earlier call was never read", kill=True)
        self._asked = True
        left = memoryview(_HEADER.pack(len(body) + 1, kind) + body)
        try:
            while len(left) > 0:
                left = left[self._process.stdin.write(left):]
        except OSError as error:
            raise self._dead(str(error)) from error

    def _dead(self, what: str, kill: bool = False) -> EnvironmentFault:
        """Ends the child; the error to raise."""
        if kill:
            self._process.kill()
        _stop(self._process)
        self._log.seek(0)
        log = " ".join(self._log.read()[-2000:].decode("utf-8", "replace").replace("orrery: error: ", "").split())
        self.close()
        return EnvironmentFault(f"{log} (`orrery env`: {what}; exit code {self._process.returncode})".strip())
