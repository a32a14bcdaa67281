"""Plays episodes in environments of other libraries: asks replay what to play, the planner how, and sends the rows to replay.

The counterpart of services/actor: the same modes, rows, waits and errors. What is different: environments may fail. Then the
episode's rows so far are sent, marked as truncated, the environment is made anew, and the next episode begins.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from orrery import tracing
from orrery.channel import Backoff
from orrery.config.v1 import experiment_pb2
from orrery.environments import LaneFault, TimeStep
from orrery.errors import ConfigError, EnvironmentFault, ServiceError
from orrery.metrics import Metrics
from orrery.planner_client import Answer, PlannerClient, Slot
from orrery.recorder import EpisodeRecorder
from orrery.replay_client import Chunk, Episode, EpisodeEnd, EpisodeMode, ReplayClient
from orrery.replay_writer import ReplayWriter
from orrery.seeds import MersenneTwister64, derive_seed, random_action
from orrery.tracing import Trace
from orrery.workers import Worker

_log = logging.getLogger("orrery")
_SLICE = 0.8  # seconds: waits on replay are cut into slices of this length, so that stop is noticed
_BRIEF_WAIT = 0.2  # while other episodes run, idle lanes ask only briefly and seldom
_BEGIN_INTERVAL = 1.0
_FINISH_TIMEOUT = 5.0
_OTHER_MODEL = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)

Action = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class EpisodeSummary:
    """An episode that was played to its end. rows: decisions + 1."""

    episode_id: int
    mode: EpisodeMode
    end: EpisodeEnd
    task: str
    episode_return: float
    rows: int
    environment_steps: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Task:
    """name: as replay hands it out. environment: what is played, for messages. make: makes its lanes, for each group and
    again after a fault."""

    name: str
    environment: str
    make: Callable[[], Worker]


@dataclasses.dataclass
class ActorOptions:
    """experiment: what the services were started with. tasks: at least one; of several each has one lane. timeouts in seconds.
    max_faults: consecutive faults of environments after which the actor gives up."""

    experiment: experiment_pb2.Experiment
    tasks: Sequence[Task]
    actor_id: str
    replay: ReplayClient
    planner: PlannerClient
    groups: int = 1
    act_timeout: float = 60.0
    step_timeout: float = 60.0
    max_faults: int = 5
    on_episode: Callable[[EpisodeSummary], None] = lambda summary: None
    metrics: Metrics = dataclasses.field(default_factory=Metrics)


@dataclasses.dataclass(frozen=True)
class _Decision:
    action: Action
    version: tuple[int, int]


@dataclasses.dataclass(eq=False)
class _Run:
    """A running episode. belief empty: the planner begins a new one."""

    recorder: EpisodeRecorder
    observation: dict[str, npt.NDArray[Any]]
    random: MersenneTwister64
    begin: float
    belief: bytes = b""
    previous_action: Action | None = None
    decisions: int = 0
    environment_steps: int = 0
    episode_return: float = 0.0
    failed_rows: int = 0  # as Collection.early_end counts
    pinned: tuple[int, int] = (0, 0)  # the snapshot that plays an evaluation; (0, 0): the newest
    decision: _Decision | None = None  # not yet executed


@dataclasses.dataclass(eq=False)
class _Player:
    """A lane. `episode`: handed out, running or waiting for the lane; `run`: of a running one; `trace`: of the episode, all
    calls and log lines about it."""

    lane: int
    episode: Episode | None = None
    run: _Run | None = None
    trace: Trace = dataclasses.field(default_factory=Trace.new)


@dataclasses.dataclass(eq=False)
class _Group:
    """Lanes that step together. `workers` by task: one that failed is not there until it is made again; `task`: whose worker
    plays, or played last."""

    players: list[_Player]
    workers: dict[str, Worker]
    task: Task
    fresh: list[bool]

    def running(self) -> list[_Player]:
        return [player for player in self.players if player.run is not None]

    def decided(self) -> dict[int, Action]:
        """Actions by lane, once every running episode has its decision; empty before."""
        actions = {player.lane: player.run.decision.action for player in self.players
                   if player.run is not None and player.run.decision is not None}
        return actions if len(actions) == len(self.running()) else {}


def _mode(player: _Player) -> EpisodeMode:
    assert player.episode is not None
    return player.episode.mode


def _by_pinned(players: Sequence[_Player]) -> list[list[_Player]]:
    """Those that plan with the same snapshot together, the newest's first."""
    groups: dict[tuple[int, int], list[_Player]] = {}
    for player in players:
        if player.run is not None:
            groups.setdefault(player.run.pinned, []).append(player)
    return [groups[version] for version in sorted(groups)]


class Actor:
    """`run` (or `step` and `finish`) on one thread; `stop` from any other, it is noticed within a second. Replay or planner
    away: waits and goes on with the episode; an episode that replay does not want any more is dropped. Errors that trying
    again cannot cure (an environment that does not fit the run or keeps failing, a request refused as invalid) are raised:
    ConfigError, EnvironmentFault, ServiceError."""

    def __init__(self, options: ActorOptions):
        self._options = options
        self._experiment = options.experiment
        self._alternate = options.experiment.learning.schedule == experiment_pb2.Learning.ALTERNATE
        self._stop = threading.Event()
        self._faults = 0  # since an episode was played to its end
        self._complete = False
        self._replay_away = self._planner_away_told = False
        self._planner_away_since = math.inf
        self._next_begin = self._next_act = 0.0
        self._replay_backoff, self._planner_backoff = Backoff(), Backoff()
        self._groups: list[_Group] = []
        try:
            for _ in range(options.groups):
                self._add_group()
        except BaseException:
            self._close_workers()
            raise
        collection = options.experiment.collection
        self._writer = ReplayWriter(
            options.replay, max_unacknowledged_bytes=collection.max_unacknowledged_bytes,
            heartbeat=max(1.0, collection.lease_seconds / 6))

    @property
    def _players(self) -> list[_Player]:
        return [player for group in self._groups for player in group.players]

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()
        self._options.planner.cancel()

    def run(self) -> None:
        """Plays until the run is complete, `stop` or an error, then finishes."""
        try:
            while self.step():
                pass
        finally:
            self.finish()

    def step(self) -> bool:
        """Begins episodes where lanes are idle and makes one decision in each running one. False: nothing more to do."""
        if self.stopped or not self._begin_episodes():
            return False
        self._decide()
        self._advance()
        self._options.metrics.set("actor_unacknowledged_bytes", self._writer.unacknowledged_bytes)
        return True

    def finish(self) -> None:
        """Sends what running episodes have, marked as truncated, waits some seconds for the acknowledgements, and closes the
        environments."""
        deadline = time.monotonic() + _FINISH_TIMEOUT
        for player in self._players:
            if player.run is not None:
                with tracing.use(player.trace):
                    self._send(player, player.run.recorder.end(EpisodeEnd.TRUNCATED))
            player.run = player.episode = None
        self._renew_leases()
        self._flush_before(deadline)
        self._options.metrics.set("actor_unacknowledged_bytes", self._writer.unacknowledged_bytes)
        self._writer.close()
        self._close_workers()

    # Environments.

    def _add_group(self) -> None:
        task = self._options.tasks[0]
        worker = task.make()
        if worker.count > 1 and len(self._options.tasks) > 1:
            worker.close()
            raise ConfigError(f"{len(self._options.tasks)} tasks with {worker.count} lanes together: expected one of both")
        if not self._groups:
            self._spec = worker.spec
            self._spec.check_fits(self._experiment.model)
        players = [_Player(lane) for lane in range(worker.count)]
        self._groups.append(_Group(players, {task.name: worker}, task, [True] * worker.count))

    def _task(self, episode: Episode) -> Task:
        for task in self._options.tasks:
            if episode.task in ("", task.name):
                return task
        raise ConfigError(f"replay hands out task {episode.task!r}, this actor plays "
                          f"{', '.join(repr(task.name) for task in self._options.tasks)}")

    def _worker(self, group: _Group, task: Task) -> Worker:
        """Of the group and the task, made again after a fault."""
        if task.name not in group.workers:
            worker = task.make()
            if worker.spec != self._spec or worker.count != len(group.players):
                worker.close()
                raise ConfigError(f"environment {task.environment} has other observations, actions or lanes than the first "
                                  f"one: {worker.spec}, expected {self._spec}")
            group.workers[task.name] = worker
        return group.workers[task.name]

    def _close_workers(self) -> None:
        for group in self._groups:
            for worker in group.workers.values():
                worker.close()
            group.workers.clear()

    def _discard(self, group: _Group) -> None:
        worker = group.workers.pop(group.task.name, None)
        if worker is not None:
            worker.close()
        for player in group.running():
            self._cut(player)

    def _cut(self, player: _Player) -> None:
        """The environment failed: the rows before that are the episode."""
        assert player.run is not None
        with tracing.use(player.trace):
            self._send(player, player.run.recorder.end(EpisodeEnd.TRUNCATED))
        player.run = player.episode = None
        self._renew_leases()

    def _note_fault(self, task: Task, players: Sequence[_Player], what: str) -> None:
        """Logs the fault with where it happened, in the first one's trace; raises after too many in a row."""
        places = ", ".join(
            f"episode {player.episode.episode_id} at step {0 if player.run is None else player.run.environment_steps}"
            for player in players if player.episode is not None)
        message = f"environment {task.environment} failed ({places}): {what}"
        with tracing.use(players[0].trace if players else None):
            _log.error("%s", message)
        self._options.metrics.add("actor_environment_failures_total", task=task.name)
        self._faults += 1
        if self._faults >= self._options.max_faults:
            raise EnvironmentFault(f"{message}; {self._faults} faults in a row, giving up")

    # Beginning episodes.

    def _begin_episodes(self) -> bool:
        """False: the run is complete and nothing is running."""
        for player in self._players:
            if self._complete or self.stopped:
                break
            if player.episode is not None:
                continue
            player.trace = Trace.new()
            with tracing.use(player.trace):
                if not self._ask_for_episode(player):
                    break
        for group in self._groups:
            self._start(group)
        return not self._complete or any(player.episode is not None for player in self._players)

    def _ask_for_episode(self, player: _Player) -> bool:
        """False: no use asking for another one now."""
        taken = [other.episode for other in self._players if other.episode is not None]
        if taken:
            # Planned episodes of ALTERNATE run alone.
            alone = self._alternate and any(episode.mode != EpisodeMode.RANDOM for episode in taken)
            if alone or time.monotonic() < self._next_begin:
                return False
        try:
            episode = self._options.replay.begin_episode(
                self._options.actor_id, self._spec, _BRIEF_WAIT if taken else _SLICE)
        except ServiceError as error:
            if not error.transient:
                raise
            self._note_replay_away(error, idle=not taken)
            return False
        if self._replay_away:
            _log.info("replay is back")
        self._replay_away = False
        self._replay_backoff.reset()
        if episode is None:
            self._next_begin = time.monotonic() + _BEGIN_INTERVAL
            return False
        if episode.run_complete:
            self._complete = True
            return False
        self._task(episode)
        player.episode = episode
        self._renew_leases()
        return True

    def _note_replay_away(self, error: ServiceError, idle: bool) -> None:
        if not self._replay_away:
            _log.warning("replay is away, trying again: %s", error)
        self._replay_away = True
        self._next_begin = time.monotonic() + _BEGIN_INTERVAL
        if idle:
            self._stop.wait(self._replay_backoff.next())

    def _start(self, group: _Group) -> None:
        """Begins the episodes that wait for a lane of this group, where the lane is ready."""
        whole = not group.running()
        waiting = [player for player in group.players if player.episode is not None and player.run is None]
        ready = [player for player in waiting if whole or group.fresh[player.lane]]
        if not ready or self.stopped:
            return
        seeds = {player.lane: player.episode.seed for player in ready if player.episode is not None}
        for player in ready:
            if player.episode is not None:
                group.task = self._task(player.episode)
        try:
            worker = self._worker(group, group.task)
            worker.submit("reset", seeds, whole)
            reply = worker.result(self._options.step_timeout)
        except EnvironmentFault as fault:
            # The episodes that wait are still to be played.
            try:
                self._note_fault(group.task, ready, str(fault))
            finally:
                self._discard(group)
            self._stop.wait(self._replay_backoff.next())
            return
        group.fresh = reply.fresh
        for player in ready:
            step = reply.value[player.lane]
            if isinstance(step, LaneFault):
                self._note_fault(group.task, [player], step.message)
            else:
                self._begin(player, step)

    def _begin(self, player: _Player, first: TimeStep) -> None:
        assert player.episode is not None
        tasks = [task.name for task in self._experiment.environment.tasks]
        number = tasks.index(player.episode.task) if player.episode.task in tasks else 0
        recorder = EpisodeRecorder(player.episode, self._spec, first.observation, self._experiment.replay.chunk_rows, number)
        player.run = _Run(recorder, first.observation, MersenneTwister64(derive_seed(player.episode.seed, "random_actions")),
                          time.monotonic())

    # Decisions.

    def _decide(self) -> None:
        """Gives every running episode its next decision, but those that the planner does not answer now."""
        for player in self._players:
            if player.run is not None and player.run.decision is None and _mode(player) == EpisodeMode.RANDOM:
                action = random_action(self._spec.action.size, self._spec.action.discrete, player.run.random)
                player.run.decision = _Decision(action, (0, 0))
        planned = [player for player in self._players if player.run is not None and player.run.decision is None]
        for together in _by_pinned(planned):
            with tracing.use(together[0].trace, [player.trace for player in together[1:]]):
                answers = self._ask_planner(together)
            if not answers:
                return
            for player, answer in zip(together, answers, strict=True):
                assert player.run is not None
                player.run.belief = answer.belief
                player.run.decision = _Decision(answer.action, answer.version)
                if _mode(player) == EpisodeMode.EVALUATE:
                    player.run.pinned = answer.version

    def _note_planner_away(self, error: ServiceError) -> None:
        now = time.monotonic()
        self._planner_away_since = min(self._planner_away_since, now)
        self._next_act = now + self._planner_backoff.next()
        # A full queue has room again after a batch or two: under load that is no news, unless it stays full for so long.
        full = error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        if full and now - self._planner_away_since < self._options.act_timeout or self.stopped or self._planner_away_told:
            return
        self._planner_away_told = True
        _log.warning("the planner does not answer, trying again: %s", error)

    def _ask_planner(self, together: Sequence[_Player]) -> list[Answer]:
        """For those that plan with one snapshot. Empty: no answer now, try again later."""
        wait = self._next_act - time.monotonic()
        if wait > 0:
            if any(group.decided() for group in self._groups):
                return []  # random episodes go on meanwhile
            self._stop.wait(wait)
        if self.stopped:
            return []
        try:
            answers = self._act(together)
        except ServiceError as error:
            if not error.transient:
                raise
            self._note_planner_away(error)
            return []
        if self._planner_away_told:
            _log.info("the planner answers again")
        self._planner_away_since, self._planner_away_told = math.inf, False
        self._planner_backoff.reset()
        for answer in answers:
            if answer.action.shape != (self._spec.action.size,):
                raise ServiceError(grpc.StatusCode.FAILED_PRECONDITION, f"the planner answered with an action of "
                                   f"{answer.action.size} numbers, expected {self._spec.action.size}")
        return answers

    def _act(self, planned: Sequence[_Player]) -> list[Answer]:
        try:
            return self._act_once(planned)
        except ServiceError as error:
            has_belief = any(player.run is not None and player.run.belief for player in planned)
            if error.code not in _OTHER_MODEL or not has_belief:
                raise
            # A model of another structure has taken over: begin new beliefs in the middle of the episodes.
            _log.warning("the planner refused a belief, beginning new ones: %s", error)
        for player in planned:
            if player.run is not None:
                player.run.belief = b""
        return self._act_once(planned)

    def _act_once(self, planned: Sequence[_Player]) -> list[Answer]:
        slots = []
        evaluation = False
        version = (0, 0)
        for player in planned:
            assert player.run is not None and player.episode is not None
            slot = Slot(player.run.observation, player.run.belief, player.run.previous_action,
                        seed=derive_seed(player.episode.seed, "act", player.run.decisions))
            if player.episode.mode == EpisodeMode.TRAIN:
                slot.noise = self._experiment.collection.exploration_noise
            else:
                evaluation = True
                version = player.run.pinned
            slots.append(slot)
        begin = time.monotonic()
        try:
            return self._options.planner.plan(
                slots, evaluation=evaluation, timeout=self._options.act_timeout, tries=False, version=version,
                stop=self._stop)
        finally:
            self._options.metrics.observe("actor_action_wait_seconds", time.monotonic() - begin)

    # Steps.

    def _advance(self) -> None:
        """All groups that have their decisions step at the same time."""
        stepped = []
        for group in self._groups:
            actions = group.decided()
            if actions:
                worker = group.workers[group.task.name]
                worker.submit("step", actions)
                stepped.append((group, worker, time.monotonic()))
        for group, worker, begin in stepped:
            try:
                reply = worker.result(self._options.step_timeout)
            except EnvironmentFault as fault:
                players = group.running()
                try:
                    self._note_fault(group.task, players, str(fault))
                finally:
                    self._discard(group)
                continue
            self._options.metrics.observe("actor_env_step_seconds", time.monotonic() - begin)
            group.fresh = reply.fresh
            for player in group.running():
                with tracing.use(player.trace):
                    self._take(group.task, player, reply.value[player.lane])

    def _take(self, task: Task, player: _Player, step: TimeStep | LaneFault) -> None:
        """What followed a decision."""
        assert player.run is not None and player.run.decision is not None
        if isinstance(step, LaneFault):
            try:
                self._note_fault(task, [player], step.message)
            finally:
                self._cut(player)
            return
        run, decision = player.run, player.run.decision
        run.decision = None
        self._options.metrics.add("actor_env_steps_total", step.steps, task=task.name)
        chunk = run.recorder.add(decision.action, step.observation, step.reward, decision.version)
        run.decisions += 1
        run.environment_steps += step.steps
        run.episode_return += step.reward
        run.previous_action = decision.action
        run.observation = step.observation
        if chunk is not None and not self._send(player, chunk):
            return
        if not (step.terminated or step.truncated or self._has_failed(player, step.reward)):
            return
        self._end(task, player, EpisodeEnd.TERMINATED if step.terminated else EpisodeEnd.TRUNCATED)
        # The next episode of ALTERNATE depends on this one: everything must be in the store before it is asked for.
        if self._alternate:
            self._flush_before(None)

    def _has_failed(self, player: _Player, reward: float) -> bool:
        """Whether collection.early_end cuts the episode with this row's reward."""
        assert player.run is not None and player.episode is not None
        collection = self._experiment.collection
        if not collection.HasField("early_end") or player.episode.mode == EpisodeMode.EVALUATE:
            return False
        if reward < collection.early_end.reward_below:
            player.run.failed_rows += 1
        return player.run.failed_rows >= collection.early_end.failed_rows

    def _end(self, task: Task, player: _Player, end: EpisodeEnd) -> None:
        assert player.run is not None and player.episode is not None
        run, episode = player.run, player.episode
        if not self._send(player, run.recorder.end(end)):
            return
        player.run = player.episode = None
        self._faults = 0
        self._renew_leases()
        summary = EpisodeSummary(episode.episode_id, episode.mode, end, task.name, run.episode_return, run.decisions + 1,
                                 run.environment_steps, time.monotonic() - run.begin)
        self._options.metrics.add("actor_episodes_total", task=task.name)
        self._options.metrics.set("actor_episode_return", run.episode_return, task=task.name, mode=episode.mode.name.lower())
        self._options.on_episode(summary)

    # Replay.

    def _send(self, player: _Player, chunk: Chunk) -> bool:
        """Queues a chunk; False, and the episode is dropped, when replay refuses it. After `stop` a full queue gets one more
        slice, then the rows are given up."""
        why: Exception
        while True:
            try:
                self._writer.append(chunk, _SLICE)
                return True
            except TimeoutError as error:
                if not self.stopped:
                    continue
                why = error
            except ServiceError as error:
                why = error
            break
        _log.warning("episode dropped episode=%d rows=%d: %s", chunk.episode_id, chunk.first_row + chunk.rows, why)
        player.run = player.episode = None
        self._renew_leases()
        return False

    def _flush_before(self, deadline: float | None) -> None:
        """None: until it is done or `stop`."""
        while True:
            try:
                self._writer.flush(_SLICE if deadline is None else max(0.0, min(_SLICE, deadline - time.monotonic())))
                return
            except TimeoutError as error:
                over = self.stopped if deadline is None else time.monotonic() >= deadline
                if over:
                    _log.warning("rows are not acknowledged: %s", error)
                    return
            except ServiceError as error:
                _log.warning("rows are not acknowledged: %s", error)
                return

    def _renew_leases(self) -> None:
        self._writer.keep_alive(player.episode.episode_id for player in self._players if player.episode is not None)
