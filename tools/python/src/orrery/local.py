"""Starts the services of this project as child processes on this machine: for tutorials, tests and snapshots on disk."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence

from orrery.errors import ConfigError, OrreryError
from orrery.experiment import Experiment

_READY = re.compile(r" serving port=(\d+) ")
_START_TIMEOUT = 60.0
_END_TIMEOUT = 20.0


def find_program(name: str) -> str:
    """`name` in $ORRERY_BIN_DIR, else on the PATH. ConfigError says what to do when it is nowhere."""
    folder = os.environ.get("ORRERY_BIN_DIR")
    found = shutil.which(name, path=folder) if folder else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} was not found {'in ' + folder if folder else 'on the PATH'}: build the project and set "
                          "ORRERY_BIN_DIR to its build/bin")
    return found


class Program:
    """One service on free ports of 127.0.0.1, its log in `log`. Ended by `close`, SIGTERM first. OrreryError shows the end of
    the log when it does not start."""

    def __init__(self, name: str, arguments: Sequence[str], log: pathlib.Path):
        self._name = name
        self._log = log
        listen = [f"--{flag}=127.0.0.1:0" for flag in ("listen", "health_listen", "metrics_listen")]
        with log.open("wb") as file:
            self._process = subprocess.Popen([find_program(name), *arguments, *listen], stdin=subprocess.DEVNULL, stdout=file,
                                             stderr=subprocess.STDOUT)
        try:
            self.address = f"127.0.0.1:{self._await_port()}"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> int:
        """Its exit code."""
        if self.running:
            self._process.terminate()
        try:
            return self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _await_port(self) -> int:
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            ended = not self.running  # before the log is read, so that its last line is seen
            text = self.log()
            found = _READY.search(text)
            if found is not None:
                return int(found.group(1))
            if ended or time.monotonic() > deadline:
                what = f"is not ready after {_START_TIMEOUT:g} s"
                if ended:
                    what = f"ended with exit code {self._process.returncode}"
                raise OrreryError(f"{self._name} {what}: {text[-2000:].strip()}")
            time.sleep(0.05)


class Services:
    """Replay, learner and planner of one experiment; actors are the caller's. Data live in `store` and go with it; `folder`
    gets the configuration, the logs and the learning curve (learner.csv), a temporary one where it is None.

        with Services(experiment) as services:
            … ReplayClient(services.replay, run=…), PlannerClient(services.planner) …
    """

    def __init__(self, experiment: Experiment, *, folder: str | os.PathLike[str] | None = None, store: str = "memory:",
                 device: str = "cpu", threads: int = 0):
        self._temporary = tempfile.TemporaryDirectory(prefix="orrery-") if folder is None else None
        self.folder = pathlib.Path(self._temporary.name if self._temporary is not None else folder or ".")
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.textproto"
        experiment.save(config)
        compute = [f"--device={device}", f"--threads={threads}"]
        self.programs: list[Program] = []
        try:
            self.replay = self._start("orrery-replay", [f"--config={config}", f"--store={store}"])
            self.learner = self._start("orrery-learner", [f"--config={config}", f"--replay={self.replay}",
                                                          f"--log_dir={self.folder}", *compute])
            self.planner = self._start("orrery-planner", [f"--config={config}", f"--learner={self.learner}",
                                                          f"--replay={self.replay}", *compute])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, name: str, arguments: Sequence[str]) -> str:
        self.programs.append(Program(name, arguments, self.folder / f"{name}.log"))
        return self.programs[-1].address

    def check(self) -> None:
        """OrreryError with the end of its log for a program that has ended."""
        for program in self.programs:
            if not program.running:
                raise OrreryError(f"a service has ended: {program.log()[-2000:].strip()}")

    def close(self) -> list[int]:
        """Ends them, the planner first; their exit codes, replay's first."""
        codes = [program.close() for program in reversed(self.programs)]
        if self._temporary is not None:
            self._temporary.cleanup()
        return codes[::-1]
