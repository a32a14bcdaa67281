"""orrery-gym-actor: plays Gymnasium and dm_env environments for a run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from orrery import tracing
from orrery.actor import Actor, ActorOptions, EpisodeSummary, Task
from orrery.channel import Tls
from orrery.environments import EnvironmentSettings
from orrery.errors import ConfigError, OrreryError
from orrery.experiment import Experiment
from orrery.metrics import Metrics, MetricsServer
from orrery.planner_client import PlannerClient, default_client_id
from orrery.replay_client import ReplayClient
from orrery.specification import model_text
from orrery.workers import LocalWorker, ProcessWorker, Worker

_log = logging.getLogger("orrery")
_DESCRIPTION = """Plays episodes of a run in any Gymnasium or dm_env environment: asks replay what to play and the planner how,
and sends the rows to replay. The experiment's model.action and model.modalities must be written out: --print_model shows
them."""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="orrery-gym-actor", description=_DESCRIPTION)
    add = arguments.add_argument
    add("--config", metavar="FILE", help="experiment (text proto)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="sets one field of the experiment; may be repeated")
    add("--env", metavar="ENV", help="Gymnasium id, python:MODULE:FUNCTION or dm_control:DOMAIN-TASK (default: the "
        "experiment's environment.task; of several tasks each name is one)")
    add("--env_kwargs", metavar="JSON", type=_json, default={}, help="arguments of the environment")
    add("--modality", metavar="NAME[=SOURCE],…", default="", help="modalities: NAME=KEY+KEY parts of the observation, NAME=* "
        "all of it, NAME=@render a drawn picture; `image` alone is drawn where the observation holds none (default: all parts)")
    add("--camera", metavar="JSON", type=_json, default={}, help="arguments of the drawn picture, for example {\"width\": 256, "
        "\"height\": 256, \"camera_id\": 0}; a name that begins with '.' is set on the unwrapped environment")
    add("--vector", action="store_true", help="step the lanes together in one vector environment (gymnasium.make_vec)")
    add("--in_process", action="store_true", help="no process for each environment; one that hangs then hangs the actor")
    add("--replay", metavar="HOST:PORT", default="127.0.0.1:7101", help="replay service (default: %(default)s)")
    add("--planner", metavar="HOST:PORT", default="127.0.0.1:7103", help="planner service (default: %(default)s)")
    add("--actor_id", metavar="NAME", help="unique in the run (default: host and process number)")
    add("--act_timeout", metavar="SECONDS", type=_seconds, default=60.0, help="for one answer (default: %(default)s)")
    add("--step_timeout", metavar="SECONDS", type=_seconds, default=60.0,
        help="after which an environment hangs (default: %(default)s)")
    add("--max_faults", metavar="N", type=_count, default=5,
        help="faults of environments in a row after which the actor gives up (default: %(default)s)")
    add("--metrics_listen", metavar="HOST:PORT", default="127.0.0.1:9104",
        help="HTTP /metrics, /healthz and /readyz; port 0: any free one (default: %(default)s)")
    add("--tls_ca", metavar="FILE", help="PEM; TLS with these roots instead of an unencrypted connection")
    add("--tls_certificate", metavar="FILE", help="PEM; this actor's own certificate, with --tls_key")
    add("--tls_key", metavar="FILE", help="PEM; the key of --tls_certificate")
    add("--token_file", metavar="FILE", help="sent with every call as 'authorization: Bearer …'")
    add("--log_level", choices=("debug", "info", "warning", "error"), default="info")
    add("--print_model", "--print-model", action="store_true", help="print the environment's part of the experiment and end")
    return arguments


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON object")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: expected seconds above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def _all_settings(flags: argparse.Namespace, experiment: Experiment) -> dict[str, EnvironmentSettings]:
    """By task; --env may name the only one's environment."""
    environment = experiment.proto.environment
    time_limit = environment.time_limit if environment.HasField("time_limit") else None
    settings = EnvironmentSettings(
        env=flags.env or environment.task, kwargs=flags.env_kwargs, camera=flags.camera, image_size=environment.image_size,
        modalities=tuple(choice for choice in flags.modality.split(",") if choice), action_repeat=environment.action_repeat,
        time_limit=time_limit, vector=experiment.proto.collection.environments if flags.vector else 0)
    if not environment.tasks:
        if not settings.env:
            raise ConfigError("no environment: give --env, or --config with environment.task")
        return {environment.task: settings}
    if flags.env or flags.vector:
        raise ConfigError("--env and --vector are for one task, the experiment has environment.tasks")
    return {task.name: dataclasses.replace(
        settings, env=task.name, action_repeat=task.action_repeat if task.HasField("action_repeat") else settings.action_repeat,
        time_limit=task.time_limit if task.HasField("time_limit") else time_limit) for task in environment.tasks}


def _padded(
    tasks: dict[str, EnvironmentSettings], make: Callable[[EnvironmentSettings], Worker]
) -> dict[str, EnvironmentSettings]:
    """Continuous actions of several tasks get the size of the largest: each is made once to see it."""
    if len(tasks) == 1:
        return tasks
    actions = []
    for settings in tasks.values():
        worker = make(settings)
        actions.append(worker.spec.action)
        worker.close()
    if any(action.discrete for action in actions):
        return tasks
    return {name: dataclasses.replace(settings, action_size=max(action.size for action in actions))
            for name, settings in tasks.items()}


def _tls(flags: argparse.Namespace) -> Tls | None:
    if flags.tls_ca is None and flags.tls_certificate is None and flags.tls_key is None:
        return None
    return Tls(flags.tls_ca, flags.tls_certificate, flags.tls_key)


def _token(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token_file={path}: {error}") from error


def _log_episode(summary: EpisodeSummary) -> None:
    _log.info("episode=%d task=%s mode=%s rows=%d return=%.3f seconds=%.1f", summary.episode_id, summary.task,
              summary.mode.name.lower(), summary.rows, summary.episode_return, summary.seconds)


def play(flags: argparse.Namespace, stop: threading.Event) -> None:
    """Plays until the run is complete, `stop` is set or an error."""
    if flags.config is None:
        raise ConfigError("--config is required")
    experiment = Experiment.load(flags.config, *flags.set)
    environment = experiment.proto.environment
    if not experiment.proto.name or not (environment.task or environment.tasks):
        raise ConfigError(f"{flags.config}: name and environment.task must be set")
    make: Callable[[EnvironmentSettings], Worker] = LocalWorker if flags.in_process else ProcessWorker
    tasks = [Task(name, settings.env, functools.partial(make, settings))
             for name, settings in _padded(_all_settings(flags, experiment), make).items()]
    actor_id = flags.actor_id or default_client_id("actor")
    tls, token = _tls(flags), _token(flags.token_file)
    metrics = Metrics()
    server = MetricsServer(flags.metrics_listen, metrics)
    replay = ReplayClient(flags.replay, experiment.proto.name, tls=tls, token=token)
    planner = PlannerClient(flags.planner, client_id=actor_id, tls=tls, token=token)
    try:
        actor = Actor(ActorOptions(
            experiment=experiment.proto, tasks=tasks, actor_id=actor_id, replay=replay, planner=planner,
            groups=1 if flags.vector else experiment.proto.collection.environments,
            act_timeout=flags.act_timeout, step_timeout=flags.step_timeout, max_faults=flags.max_faults,
            on_episode=_log_episode, metrics=metrics))
        server.ready = True
        _log.info("actor ready env=%s replay=%s planner=%s metrics_port=%d", ",".join(task.environment for task in tasks),
                  flags.replay, flags.planner, server.port)
        _run(actor, stop)
    finally:
        server.close()
        planner.close()
        replay.close()


def _run(actor: Actor, stop: threading.Event) -> None:
    """The actor plays on a thread of its own, so that a signal interrupts nothing."""
    failure: list[BaseException] = []

    def body() -> None:
        try:
            actor.run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="orrery-actor")
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if stop.is_set() and not actor.stopped:
            _log.info("stopping: sending what the running episodes have")
            actor.stop()
    if failure:
        raise failure[0]


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(argv)
    output = logging.StreamHandler(sys.stderr)
    output.addFilter(tracing.add_field)
    logging.basicConfig(handlers=[output], level=flags.log_level.upper(),
                        format="%(asctime)s %(levelname).1s orrery-gym-actor] %(message)s%(trace)s")
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if flags.print_model:
            experiment = Experiment.load(flags.config, *flags.set) if flags.config is not None else Experiment()
            settings = next(iter(_padded(_all_settings(flags, experiment), LocalWorker).values()))
            worker = LocalWorker(settings)
            print(model_text(worker.spec), end="")
            worker.close()
        else:
            play(flags, stop)
    except OrreryError as error:
        print(f"orrery-gym-actor: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"orrery-gym-actor: error: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
