import re

import numpy as np
import pytest

from orrery import ActionSpec, ConfigError, EnvironmentFault, EnvironmentSettings, TensorSpec
from orrery.environments import LaneFault, make_lanes
from orrery.workers import LocalWorker, ProcessWorker

fake_envs = pytest.importorskip("fake_envs")  # needs gymnasium and dm_env

ZERO = np.zeros(2, np.float32)
MODES = ("NEXT_STEP", "SAME_STEP", "DISABLED")


def settings(name="counting", **changes):
    kwargs = changes.pop("kwargs", {})
    return EnvironmentSettings(f"python:fake_envs:{name}", kwargs=kwargs, **changes)


def rows(step):
    """Episode, step and seed as the counting environment shows them."""
    return [int(value) for value in step.observation["observation"]]


def play(lanes, steps, wants=lambda lane, time: True):
    """Plays as an actor does: begins an episode in each idle lane that `wants` one and is ready; finished episodes as (lane,
    seed asked for, time steps)."""
    running, done = {}, []
    for time in range(steps):
        whole, fresh = not running, lanes.fresh()
        seeds = {lane: 100 * lane + time for lane in range(lanes.count)
                 if lane not in running and wants(lane, time) and (whole or fresh[lane])}
        if seeds:
            for lane, first in lanes.reset(seeds, whole).items():
                running[lane] = (lane, seeds[lane], [first])
        if not running:
            continue
        for lane, step in lanes.step({lane: ZERO for lane in running}).items():
            running[lane][2].append(step)
            if step.terminated or step.truncated:
                done.append(running.pop(lane))
    return done


def check_episode(episode, length, terminal=True):
    """Every row of one episode of the environment, none twice, and its own last observation."""
    _, _, steps = episode
    shown = [rows(step) for step in steps]
    assert [time for _, time, _ in shown] == list(range(length + 1))
    assert len({number for number, _, _ in shown}) == 1, "all of one episode of the environment"
    assert [step.reward for step in steps] == [float(time) for time in range(length + 1)]
    assert [step.terminated for step in steps] == [False] * length + [terminal]
    assert [step.truncated for step in steps] == [False] * length + [not terminal]


def test_single_lane_plays_whole_episodes():
    lanes = make_lanes(settings())
    assert lanes.spec.observations == (TensorSpec("observation", "float32", (3,)),) and lanes.spec.action == ActionSpec(2)
    done = play(lanes, 23)
    assert len(done) == 4
    for episode in done:
        check_episode(episode, 5)
        assert rows(episode[2][0])[2] == episode[1], "the seed"


def test_time_limits_truncate():
    done = play(make_lanes(settings(time_limit=3)), 6)
    assert len(done) == 2
    for episode in done:
        check_episode(episode, 3, terminal=False)


def test_the_environments_own_truncation_is_no_termination():
    check_episode(play(make_lanes(settings(kwargs={"terminal": False})), 5)[0], 5, terminal=False)


def test_an_end_beats_a_time_limit_at_the_same_step():
    check_episode(play(make_lanes(settings(time_limit=5)), 5)[0], 5, terminal=True)


def test_action_repeat_sums_and_stops_at_the_end():
    lanes = make_lanes(settings(action_repeat=2))
    lanes.reset({0: 1}, True)
    steps = [lanes.step({0: ZERO})[0] for _ in range(3)]
    assert [step.reward for step in steps] == [1 + 2, 3 + 4, 5]
    assert [step.steps for step in steps] == [2, 2, 1]
    assert [rows(step)[1] for step in steps] == [2, 4, 5]
    assert [step.terminated for step in steps] == [False, False, True]


def test_pictures_are_drawn_where_asked():
    lanes = make_lanes(settings(modalities=("image", "joints=*"), image_size=32))
    first = lanes.reset({0: 1}, True)[0]
    second = lanes.step({0: ZERO})[0]
    assert first.observation["image"].shape == (32, 32, 3) and np.all(first.observation["image"] == 0)
    assert np.all(second.observation["image"][:, :, 0] == 1) and np.all(second.observation["image"][:, :, 1:] == 0)
    assert second.observation["joints"].shape == (3,)


def test_discrete_actions_arrive_as_numbers():
    lanes = make_lanes(settings(kwargs={"discrete": True}))
    lanes.reset({0: 1}, True)
    lanes.step({0: np.array([0, 1, 0], np.float32)})
    assert lanes._game._env.unwrapped.actions == [6]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("terminal", [True, False])
def test_vector_lanes_play_whole_episodes(mode, terminal):
    lanes = make_lanes(settings("vector", vector=3, kwargs={"mode": mode, "terminal": terminal}))
    done = play(lanes, 40)
    for lane, length in enumerate((2, 3, 5)):
        mine = [episode for episode in done if episode[0] == lane]
        # NEXT_STEP spends one step on each reset.
        assert len(mine) >= 40 // (length + 1) - 1
        for episode in mine:
            check_episode(episode, length, terminal)


@pytest.mark.parametrize("mode", MODES)
def test_vector_lanes_that_wait_begin_at_a_beginning(mode):
    lanes = make_lanes(settings("vector", vector=3, kwargs={"mode": mode}))
    done = play(lanes, 120, wants=lambda lane, time: lane == 2 or time % 7 in (0, lane))
    for lane, length in enumerate((2, 3, 5)):
        mine = [episode for episode in done if episode[0] == lane]
        assert len(mine) >= 3
        for episode in mine:
            check_episode(episode, length)


def test_vector_lanes_take_seeds_where_they_can():
    for mode in MODES:
        lanes = make_lanes(settings("vector", vector=2, kwargs={"mode": mode, "lengths": (4, 4)}))
        # Both end together, so each beginning is a reset of all.
        for episode in play(lanes, 20):
            assert rows(episode[2][0])[2] == episode[1]
    lanes = make_lanes(settings("vector", vector=2, kwargs={"mode": "DISABLED", "lengths": (2, 5)}))
    for episode in play(lanes, 20):
        assert rows(episode[2][0])[2] == episode[1], "lanes are reset one by one"


def test_vector_lanes_refuse_to_begin_inside_an_episode():
    lanes = make_lanes(settings("vector", vector=2, kwargs={"mode": "SAME_STEP"}))
    lanes.reset({0: 1, 1: 2}, True)
    lanes.step({0: ZERO, 1: ZERO})
    with pytest.raises(ConfigError, match="middle of an episode"):
        lanes.reset({0: 3}, False)


def test_vector_lanes_repeat_actions_without_autoreset():
    lanes = make_lanes(settings("vector", vector=2, action_repeat=2, kwargs={"mode": "DISABLED", "lengths": (3, 4)}))
    lanes.reset({0: 1, 1: 2}, True)
    first = lanes.step({0: ZERO, 1: ZERO})
    second = lanes.step({0: ZERO, 1: ZERO})
    assert [first[0].reward, second[0].reward] == [3, 3] and second[0].steps == 1 and second[0].terminated
    assert [first[1].reward, second[1].reward] == [3, 7] and second[1].steps == 2 and second[1].terminated
    assert rows(second[0])[1] == 3
    for mode in ("NEXT_STEP", "SAME_STEP"):
        with pytest.raises(ConfigError, match="action_repeat is 2"):
            make_lanes(settings("vector", vector=2, action_repeat=2, kwargs={"mode": mode}))


def test_vector_lanes_draw_their_own_pictures():
    lanes = make_lanes(settings("vector", vector=2, modalities=("image",), image_size=32, kwargs={"mode": "NEXT_STEP"}))
    lanes.reset({0: 1, 1: 2}, True)
    for time in (1, 2):
        steps = lanes.step({0: ZERO, 1: ZERO})
        assert all(np.all(step.observation["image"][:, :, 0] == time) for step in steps.values())
    with pytest.raises(ConfigError, match="SAME_STEP: the last picture"):
        make_lanes(settings("vector", vector=2, modalities=("image",), kwargs={"mode": "SAME_STEP"}))


def test_vector_time_limits_cut_a_lane_that_goes_on():
    lanes = make_lanes(settings("vector", vector=2, time_limit=2, kwargs={"mode": "NEXT_STEP", "lengths": (5, 5)}))
    for episode in play(lanes, 40):
        check_episode(episode, 2, terminal=False)


@pytest.mark.parametrize("mode", MODES)
def test_a_faulty_lane_leaves_the_others_alone(mode):
    lanes = make_lanes(settings("vector", vector=2, kwargs={"mode": mode, "lengths": (4, 4), "fault": "nan", "at": 2,
                                                            "episodes": (1,)}))
    lanes._env.envs[1].unwrapped.fault = ""
    lanes.reset({0: 1, 1: 2}, True)
    lanes.step({0: ZERO, 1: ZERO})
    steps = lanes.step({0: ZERO, 1: ZERO})
    assert isinstance(steps[0], LaneFault) and "nan at index 1" in steps[0].message
    assert rows(steps[1])[1] == 2
    for _ in range(2):
        steps = lanes.step({1: ZERO})
    assert steps[1].terminated


@pytest.mark.parametrize("discount, terminated", [(0.0, True), (1.0, False)])
def test_dm_env_tells_ends_from_cuts(discount, terminated):
    lanes = make_lanes(settings("dm_counting", kwargs={"discount": discount}))
    assert {spec.name: spec.shape for spec in lanes.spec.observations} == {"seen": (1,), "step": (1,)}
    first = lanes.reset({0: 7}, True)[0]
    assert first.observation["step"].tolist() == [0] and first.reward == 0
    steps = [lanes.step({0: np.array([1, 0], np.float32)})[0] for _ in range(3)]
    assert [step.reward for step in steps] == [1, 2, 3]
    assert steps[2].observation["seen"].tolist() == [-3]
    assert [(step.terminated, step.truncated) for step in steps] == [(False, False)] * 2 + [(terminated, not terminated)]
    assert lanes._game._env.action.tolist() == [1, 5]


@pytest.mark.parametrize("fault, message", [
    ("nan", "'observation' holds nan at index 1"),
    ("nan_reward", "the reward is nan"),
    ("shape", r"changed its shape to \[2\]: expected \[3\]"),
])
def test_unusable_rows_are_faults_of_their_lane(fault, message):
    worker = LocalWorker(settings(kwargs={"fault": fault}))
    worker.submit("reset", {0: 1}, True)
    assert not isinstance(worker.result(1).value[0], LaneFault)
    worker.submit("step", {0: ZERO})
    assert not isinstance(worker.result(1).value[0], LaneFault)
    worker.submit("step", {0: ZERO})
    step = worker.result(1).value[0]
    assert isinstance(step, LaneFault) and re.search(message, step.message)


@pytest.mark.parametrize("fault, message", [
    ("raise", "step: ValueError: broken joint .*fake_envs.py"),
    ("hang", "step: no answer within 0.5 s, its process was killed"),
    ("die", "step: its process ended with exit code 3"),
])
def test_a_process_contains_what_goes_wrong(fault, message):
    worker = ProcessWorker(settings(kwargs={"fault": fault}))
    try:
        assert worker.spec.action == ActionSpec(2) and worker.count == 1
        worker.submit("reset", {0: 1}, True)
        assert rows(worker.result(60).value[0]) == [1, 0, 1]
        worker.submit("step", {0: ZERO})
        assert rows(worker.result(60).value[0]) == [1, 1, 1]
        worker.submit("step", {0: ZERO})
        with pytest.raises(EnvironmentFault, match=message):
            worker.result(0.5 if fault == "hang" else 60)
    finally:
        worker.close()
    assert not worker._process.is_alive()


@pytest.mark.parametrize("make", [LocalWorker, ProcessWorker])
def test_what_cannot_be_made_is_named(make):
    with pytest.raises(ConfigError, match="environment python:fake_envs:counting: .*unbounded"):
        make(settings(kwargs={"bound": float("inf")}))
    with pytest.raises(ConfigError, match="no attribute 'nothing'"):
        make(settings("nothing"))
    with pytest.raises(EnvironmentFault, match="counting cannot be made: .*TypeError.*colour"):
        make(settings(kwargs={"colour": 3}))


def test_names_of_environments():
    gymnasium = pytest.importorskip("gymnasium")
    lanes = make_lanes(EnvironmentSettings("CartPole-v1", time_limit=7))
    assert lanes.spec.action == ActionSpec(2, discrete=True) and lanes.spec.observations[0].shape == (4,)
    assert lanes._game._env.spec.max_episode_steps == 7
    vector = make_lanes(EnvironmentSettings("CartPole-v1", vector=3))
    assert vector.count == 3 and vector.spec == lanes.spec
    assert set(vector.reset({0: 5, 2: 6}, True)) == {0, 2}
    left = np.array([1, 0], np.float32)
    while not any(step.terminated for step in vector.step({0: left, 2: left}).values()):
        pass
    with pytest.raises(gymnasium.error.Error):
        make_lanes(EnvironmentSettings("NoSuchThing-v9"))
    with pytest.raises(ConfigError, match="DOMAIN-TASK"):
        make_lanes(EnvironmentSettings("dm_control:cartpole"))
    with pytest.raises(ConfigError, match="MODULE:FUNCTION"):
        make_lanes(EnvironmentSettings("python:fake_envs"))
    with pytest.raises(ConfigError, match="single environment: expected a vector environment of 2"):
        make_lanes(EnvironmentSettings("python:fake_envs:single_only", vector=2))
