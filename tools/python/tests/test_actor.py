import logging
import threading

import grpc
import numpy as np
import pytest
from google.protobuf import text_format

from orrery import (
    ConfigError, EnvironmentFault, EnvironmentSettings, EpisodeEnd, EpisodeMode, Experiment, PlannerClient, ReplayClient,
    ServiceError, Trace, decode_rows, tracing)
from orrery.actor import Actor, ActorOptions, Task
from orrery.metrics import Metrics
from orrery.seeds import MersenneTwister64, derive_seed, random_action
from orrery.workers import LocalWorker, ProcessWorker

fake_envs = pytest.importorskip("fake_envs")  # needs gymnasium and dm_env

RANDOM, TRAIN, EVALUATE = 1, 2, 3
CONFIG = """
name: "test" environment { task: "counting" } replay { chunk_rows: 4 } collection { exploration_noise: 0.5 }
"""


class Play:
    """An actor between the fake services."""

    def __init__(self, fakes, name="counting", config="", kwargs=(), settings=(), worker=LocalWorker, **options):
        self.experiment = Experiment.parse(CONFIG)
        text_format.Merge(config, self.experiment.proto)
        self.summaries = []
        self.metrics = Metrics()
        lane = {} if name == "vector" else {"length": 9}
        made = EnvironmentSettings(f"python:fake_envs:{name}", kwargs={**lane, **dict(kwargs)}, **dict(settings))
        self.replay = ReplayClient(fakes.address, "test")
        self.planner = PlannerClient(fakes.address, client_id="actor-1")
        self.actor = Actor(ActorOptions(
            experiment=self.experiment.proto, tasks=[Task("counting", made.env, lambda: worker(made))], actor_id="actor-1",
            replay=self.replay, planner=self.planner, on_episode=self.summaries.append, metrics=self.metrics, **options))

    def run(self):
        try:
            self.actor.run()
        finally:
            self.planner.close()
            self.replay.close()


def rows(fakes, episode_id):
    """All rows of an episode, from chunks that follow each other."""
    parts, following = [], 0
    for chunk in fakes.replay.of(episode_id):
        assert chunk.first_row == following
        following += chunk.rows
        parts.append(decode_rows(chunk.payload, chunk.rows))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_plays_a_random_episode(fakes):
    fakes.replay.script.append((5, RANDOM, 77))
    play = Play(fakes)
    play.run()
    chunks = fakes.replay.of(5)
    assert [(chunk.first_row, chunk.rows, chunk.end) for chunk in chunks] == [(0, 4, 1), (4, 4, 1), (8, 2, 2)]
    assert all(chunk.mode == RANDOM and chunk.run_id == "run-id" and not chunk.HasField("snapshot_version") for chunk in chunks)
    assert {chunk.specification_hash for chunk in chunks} == {fakes.replay.begun[0].specification_hash}
    assert [chunk.reward_sum for chunk in chunks] == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7, 8 + 9]
    all_rows = rows(fakes, 5)
    assert all_rows["observation"][:, 1].tolist() == list(range(10))
    assert np.all(all_rows["observation"][:, 2] == 77), "the episode's seed"
    assert all_rows["reward"].tolist() == list(range(10))
    assert all_rows["is_first"].tolist() == [1] + [0] * 9
    assert all_rows["is_terminal"].tolist() == [0] * 9 + [1]
    random = MersenneTwister64(derive_seed(77, "random_actions"))
    expected = [[0, 0]] + [random_action(2, False, random).tolist() for _ in range(9)]
    assert all_rows["action"].tolist() == expected
    assert fakes.planner.requests == []
    summary = play.summaries[0]
    assert (summary.episode_id, summary.mode, summary.end) == (5, EpisodeMode.RANDOM, EpisodeEnd.TERMINATED)
    assert (summary.episode_return, summary.rows, summary.environment_steps) == (45, 10, 9)


def test_random_actions_and_seeds_are_those_of_the_cpp_actor():
    # Printed by a program with std::mt19937_64 and DeriveSeed of libs/base.
    random = MersenneTwister64(derive_seed(77, "random_actions"))
    assert random_action(4, False, random).tolist() == [
        -0.70233416557312012, 0.4565356969833374, 0.96435654163360596, -0.8896716833114624]
    assert derive_seed(11, "act", 3) == 17213192222946975209


def test_plays_planned_episodes(fakes):
    fakes.replay.script.extend([(1, TRAIN, 11), (2, EVALUATE, 11)])
    play = Play(fakes, kwargs={"terminal": False})
    play.run()
    requests = fakes.planner.requests
    assert len(requests) == 18
    train, evaluate = requests[:9], requests[9:]
    assert {request.priority for request in train} == {1} and {request.priority for request in evaluate} == {2}
    assert {request.slots[0].exploration_noise for request in train} == {0.5}
    assert {request.slots[0].exploration_noise for request in evaluate} == {0.0}
    for number, request in enumerate(train):
        slot = request.slots[0]
        assert slot.belief == (b"" if number == 0 else f"belief-{number}".encode())
        assert list(slot.previous_action) == ([] if number == 0 else [0.25, -0.5])
        assert slot.seed == derive_seed(11, "act", number)
        assert np.frombuffer(slot.observations[0].tensor.data, "<f4")[1] == number
    assert [request.slots[0].seed for request in train] == [request.slots[0].seed for request in evaluate]
    chunks = fakes.replay.of(1)
    # Rows 1 to 3 came from answers 1 to 3, rows 4 to 7 from 4 to 7.
    assert [chunk.snapshot_version.counter for chunk in chunks] == [3, 7, 9]
    assert chunks[-1].end == EpisodeEnd.TRUNCATED and rows(fakes, 1)["is_terminal"].sum() == 0
    assert rows(fakes, 1)["action"].tolist() == [[0, 0]] + [[0.25, -0.5]] * 9


def trace_ids(traceparents):
    return [Trace.parse(traceparent).trace_id for traceparent in traceparents]


def test_an_episode_is_one_trace(fakes):
    fakes.replay.script.extend([(1, TRAIN, 11), (2, EVALUATE, 11)])
    play = Play(fakes)
    noted = []
    play.actor._options.on_episode = lambda summary: noted.append(tracing.current().trace_id)
    play.run()
    first, second, end = trace_ids(fakes.replay.begun_traceparents)  # the last one says that the run is complete
    assert len({first, second, end}) == 3 and noted == [first, second]
    asked = trace_ids(metadata["traceparent"] for metadata in fakes.planner.metadata)
    assert asked == [first] * 9 + [second] * 9
    assert not any("orrery-trace-links" in metadata for metadata in fakes.planner.metadata)
    assert trace_ids(fakes.replay.traceparents) == [first] * 3 + [second] * 3


def test_a_shared_request_names_the_traces_of_all_its_episodes(fakes):
    fakes.replay.script.extend([(1, TRAIN, 1), (2, TRAIN, 2), (3, TRAIN, 3)])
    Play(fakes, config="learning { schedule: CONCURRENT }", groups=3).run()
    first, second, third, *_ = trace_ids(fakes.replay.begun_traceparents)
    for metadata in fakes.planner.metadata:
        assert Trace.parse(metadata["traceparent"]).trace_id == first
        assert metadata["orrery-trace-links"] == f"{second},{third}"
    by_episode = {chunk.episode_id: sent for chunk, sent in zip(fakes.replay.chunks, trace_ids(fakes.replay.traceparents))}
    assert by_episode == {1: first, 2: second, 3: third}


def test_an_evaluation_is_played_by_one_snapshot(fakes):
    fakes.replay.script.extend([(1, EVALUATE, 1), (2, TRAIN, 2)])
    Play(fakes, config="learning { schedule: CONCURRENT }", groups=2).run()
    first, *others = fakes.planner.requests
    assert len(first.slots) == 2 and not first.HasField("snapshot_version")
    evaluation = [request for request in others if request.priority == 2]
    training = [request for request in others if request.priority == 1]
    # From then on they plan apart, the evaluation with the snapshot of its first answer.
    assert len(evaluation) == len(training) == 8
    assert all(request.snapshot_version.generation == request.snapshot_version.counter == 1 for request in evaluation)
    assert not any(request.HasField("snapshot_version") for request in training)


def test_asks_once_for_all_lanes(fakes):
    fakes.replay.script.extend([(1, TRAIN, 1), (2, TRAIN, 2), (3, TRAIN, 3)])
    Play(fakes, config="learning { schedule: CONCURRENT }", groups=3).run()
    assert [len(request.slots) for request in fakes.planner.requests] == [3] * 9
    for episode in (1, 2, 3):
        assert rows(fakes, episode)["reward"].tolist() == list(range(10))
        assert rows(fakes, episode)["observation"][0, 2] == episode


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_plays_whole_episodes_in_vector_environments(fakes, mode):
    lengths = (3, 5, 4)
    fakes.replay.script.extend((number, RANDOM, number) for number in range(1, 13))
    play = Play(fakes, "vector", config="learning { schedule: CONCURRENT }", settings={"vector": 3},
                kwargs={"mode": mode, "lengths": lengths})
    play.run()
    assert len(play.summaries) == 12
    for number in range(1, 13):
        whole = rows(fakes, number)
        times = whole["observation"][:, 1].tolist()
        assert times == list(range(len(times))) and len(times) - 1 in lengths
        assert len(set(whole["observation"][:, 0].tolist())) == 1
        assert fakes.replay.of(number)[-1].end == EpisodeEnd.TERMINATED


def test_lanes_that_step_together_wait_for_each_other(fakes):
    okay, away = (grpc.StatusCode.OK, ""), (grpc.StatusCode.UNAVAILABLE, "no snapshot yet")
    # Asked first together; then training is answered and the evaluation is not.
    fakes.planner.errors.extend([okay, okay, away])
    fakes.replay.script.extend([(1, EVALUATE, 1), (2, TRAIN, 2)])
    Play(fakes, "vector", config="learning { schedule: CONCURRENT }", settings={"vector": 2}, kwargs={"lengths": (4, 4)}).run()
    training = [request for request in fakes.planner.requests if request.priority == 1]
    evaluation = [request for request in fakes.planner.requests[1:] if request.priority == 2]
    assert len(training) == 3 and len(evaluation) == 4
    assert evaluation[0] == evaluation[1], "asked again, the same"
    for episode in (1, 2):
        assert rows(fakes, episode)["observation"][:, 1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_keeps_the_episode_while_the_planner_is_away(fakes, code):
    fakes.planner.errors.extend([(grpc.StatusCode.OK, ""), (code, "not now"), (code, "not now")])
    fakes.replay.script.append((1, TRAIN, 1))
    Play(fakes).run()
    requests = fakes.planner.requests
    assert len(requests) == 11
    assert requests[1].slots == requests[2].slots == requests[3].slots
    assert len(rows(fakes, 1)["reward"]) == 10


def test_a_queue_that_is_full_for_a_moment_is_no_news(fakes, caplog):
    def play(refusals, **options):
        caplog.clear()
        fakes.planner.errors.extend([(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")] * refusals)
        fakes.replay.script.append((1, TRAIN, 1))
        with caplog.at_level(logging.INFO, logger="orrery"):
            Play(fakes, **options).run()
        return [record.getMessage() for record in caplog.records if "planner" in record.getMessage()]

    assert play(2) == []
    away, back = play(6, act_timeout=0.5)
    assert "does not answer, trying again: RESOURCE_EXHAUSTED" in away and back == "the planner answers again"


def test_begins_a_new_belief_when_the_model_changed(fakes):
    fakes.planner.errors.extend([(grpc.StatusCode.OK, ""), (grpc.StatusCode.FAILED_PRECONDITION, "other structure")])
    fakes.replay.script.append((1, TRAIN, 1))
    Play(fakes).run()
    requests = fakes.planner.requests
    assert len(requests) == 10
    assert [request.slots[0].belief for request in requests[1:3]] == [b"belief-1", b""]
    assert not requests[2].slots[0].previous_action


def test_ends_when_the_planner_refuses_the_observation(fakes):
    fakes.planner.errors.append((grpc.StatusCode.INVALID_ARGUMENT, "unknown modality"))
    fakes.replay.script.append((1, TRAIN, 1))
    with pytest.raises(ServiceError, match="unknown modality"):
        Play(fakes).run()


def test_ends_when_an_action_has_another_size(fakes):
    fakes.planner.action = (1.0,)
    fakes.replay.script.append((1, TRAIN, 1))
    with pytest.raises(ServiceError, match="an action of 1 numbers, expected 2"):
        Play(fakes).run()


def test_waits_while_replay_is_away(fakes):
    fakes.replay.begin_errors.extend([(grpc.StatusCode.ABORTED, "others came first")] * 2)
    fakes.replay.script.append((1, RANDOM, 1))
    Play(fakes).run()
    assert len(rows(fakes, 1)["reward"]) == 10


def test_ends_when_replay_refuses_the_specification(fakes):
    fakes.replay.begin_errors.append((grpc.StatusCode.FAILED_PRECONDITION, "is not the run's"))
    with pytest.raises(ServiceError, match="is not the run's"):
        Play(fakes).run()


def test_drops_an_episode_that_replay_refuses(fakes):
    fakes.replay.refuse = 1
    fakes.replay.script.extend([(1, RANDOM, 1), (2, RANDOM, 2)])
    Play(fakes).run()
    assert len(rows(fakes, 2)["reward"]) == 10 and fakes.replay.of(1) == []


def test_refuses_another_task(fakes):
    fakes.replay.script.append((1, RANDOM, 1, "other"))
    with pytest.raises(ConfigError, match="hands out task 'other', this actor plays 'counting'"):
        Play(fakes).run()


def test_refuses_a_model_that_does_not_fit(fakes):
    with pytest.raises(ConfigError, match="size 3, the environment's has 2"):
        Play(fakes, config="model { action { continuous { size: 3 } } }")


def test_early_end_cuts_collected_episodes_only(fakes):
    fakes.replay.script.extend([(1, TRAIN, 1), (2, EVALUATE, 1), (3, RANDOM, 1)])
    Play(fakes, config="collection { early_end { reward_below: 3.5 failed_rows: 2 } }").run()
    for episode, length in [(1, 3), (2, 10), (3, 3)]:
        assert len(rows(fakes, episode)["reward"]) == length
    assert fakes.replay.of(1)[-1].end == EpisodeEnd.TRUNCATED


def test_stop_while_the_planner_hangs_marks_the_episode_truncated(fakes):
    fakes.planner.hold.clear()
    fakes.replay.script.append((1, TRAIN, 1))
    play = Play(fakes)

    def stop():
        assert fakes.planner.asked.wait(30)
        play.actor.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    play.run()
    thread.join()
    chunks = fakes.replay.of(1)
    assert [(chunk.rows, chunk.end) for chunk in chunks] == [(1, EpisodeEnd.TRUNCATED)]
    assert play.summaries == [], "the return of a part would be taken for that of an episode"


def test_counts(fakes):
    fakes.replay.script.extend([(1, RANDOM, 1), (2, EVALUATE, 2)])
    play = Play(fakes, settings={"action_repeat": 2})
    play.run()
    text = play.metrics.text()
    for line in [
        'orrery_actor_env_steps_total{task="counting"} 18.0',
        'orrery_actor_episodes_total{task="counting"} 2.0',
        'orrery_actor_episode_return{mode="random",task="counting"} 45.0',
        'orrery_actor_episode_return{mode="evaluate",task="counting"} 45.0',
        "orrery_actor_env_step_seconds_count 10",
        "orrery_actor_action_wait_seconds_count 5",
        "orrery_actor_unacknowledged_bytes 0",
    ]:
        assert line in text.splitlines() or line + ".0" in text.splitlines(), line


@pytest.mark.parametrize("worker", [LocalWorker, ProcessWorker])
@pytest.mark.parametrize("fault, message", [
    ("raise", "step: ValueError: broken joint"),
    ("nan", "holds nan at index 1"),
    ("nan_reward", "the reward is nan"),
    ("shape", "changed its shape"),
])
def test_a_fault_cuts_the_episode_and_the_next_one_is_played(fakes, caplog, worker, fault, message):
    fakes.replay.script.extend([(1, RANDOM, 1), (2, RANDOM, 2)])
    play = Play(fakes, kwargs={"fault": fault, "at": 6}, max_faults=3, worker=worker)
    with caplog.at_level(logging.ERROR, logger="orrery"):
        play.run()
    # The step that failed is not there; the rows before it are the episode.
    for episode in (1, 2):
        assert rows(fakes, episode)["reward"].tolist() == [0, 1, 2, 3, 4, 5]
        assert fakes.replay.of(episode)[-1].end == EpisodeEnd.TRUNCATED
    assert play.summaries == []
    faults = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(faults) == 2
    assert "environment python:fake_envs:counting failed (episode 1 at step 5): " in faults[0] and message in faults[0]
    assert 'orrery_actor_environment_failures_total{task="counting"} 2.0' in play.metrics.text()


def test_gives_up_after_faults_in_a_row(fakes):
    fakes.replay.script.extend([(number, RANDOM, number) for number in range(1, 9)])
    play = Play(fakes, kwargs={"fault": "raise"}, max_faults=3)
    with pytest.raises(EnvironmentFault, match="counting failed .*3 faults in a row, giving up"):
        play.run()
    assert {chunk.episode_id for chunk in fakes.replay.chunks} == {1, 2, 3}
    assert fakes.replay.of(3)[-1].end == EpisodeEnd.TRUNCATED, "the last one, too"


def test_a_whole_episode_forgives_the_faults_before_it(fakes):
    fakes.replay.script.extend([(number, RANDOM, number) for number in range(1, 6)])
    # LaneFaults leave the environment as it is, so its episodes count on.
    play = Play(fakes, kwargs={"fault": "nan", "episodes": (1, 3, 5)}, max_faults=2)
    play.run()
    assert [summary.episode_id for summary in play.summaries] == [2, 4]


def test_an_environment_made_anew_goes_on(fakes):
    fake_envs.FaultsEachLife.made = 0
    fakes.replay.script.extend([(1, RANDOM, 1), (2, RANDOM, 2)])
    play = Play(fakes, "raises_once", max_faults=2)
    play.run()
    assert fake_envs.FaultsEachLife.made == 2
    assert [summary.episode_id for summary in play.summaries] == [2]


def test_an_episode_whose_reset_fails_is_played_later(fakes):
    fakes.replay.script.append((1, RANDOM, 1))
    play = Play(fakes, kwargs={"fault": "reset"}, max_faults=3)
    with pytest.raises(EnvironmentFault, match="episode 1 at step 0.*no reset today"):
        play.run()
    assert len(fakes.replay.begun) == 1, "not asked for another one"


def test_a_hanging_environment_is_killed_and_the_next_episode_played(fakes):
    fakes.replay.script.extend([(1, RANDOM, 1), (2, RANDOM, 2)])
    play = Play(fakes, kwargs={"fault": "hang", "at": 3}, max_faults=4, worker=ProcessWorker, step_timeout=5.0)
    play.run()
    for episode in (1, 2):
        assert rows(fakes, episode)["reward"].tolist() == [0, 1, 2]
        assert fakes.replay.of(episode)[-1].end == EpisodeEnd.TRUNCATED
