"""The real programs with an environment of Python between them."""

import csv
import itertools
import os
import pathlib
import re
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest

from orrery import (
    ActionSpec, EnvironmentSettings, EnvironmentSpec, EpisodeEnd, EpisodeMode, Experiment, OrreryError, Policy, Program,
    ReplayClient, ServiceError, Services, TensorSpec, load_snapshot, trace)
from orrery.environments import make_lanes
from orrery.local import find_program
from orrery.workers import LocalWorker

TESTS = pathlib.Path(__file__).parent
PROGRAMS = ("orrery-replay", "orrery-learner", "orrery-planner", "orrery-actor")


def missing_programs():
    try:
        for name in PROGRAMS:
            find_program(name)
        return ""
    except OrreryError as error:
        return str(error)


pytestmark = pytest.mark.skipif(missing_programs() != "", reason=f"END-TO-END TESTS DID NOT RUN: {missing_programs()}")

# Small enough for seconds.
CONFIG = """
name: "python_test"
model {
  deterministic_size: 24 stochastic_size: 6 hidden_size: 24 activation: ELU
  reward { layers: 1 hidden_size: 24 }
  objective { free_nats: 1 }
}
planner { cem { horizon: 4 iterations: 2 candidates: 32 elites: 4 } }
collection { seed_episodes: 4 environments: 2 lease_seconds: 10 }
evaluation { every_episodes: 4 }
learning {
  schedule: CONCURRENT batch_size: 8 sequence_length: 8 learning_rate: 0.003 max_episodes: 12
  snapshot_every_updates: 20
}
replay { max_rows: 100000 chunk_rows: 10 limiter { updates_per_row: 1 tolerance: 50 absent_seconds: 20 } }
"""


def await_true(condition, services, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        services.check()
        assert time.monotonic() < deadline, "\n".join(program.log()[-2000:] for program in services.programs)
        time.sleep(0.1)


def experiment_for(settings, depth=4):
    """CONFIG with the environment's specification written out, as `orrery-gym-actor --print_model` prints it."""
    experiment = Experiment.parse(CONFIG)
    experiment.set("environment.task", settings.env)
    experiment.set("environment.image_size", settings.image_size)
    worker = LocalWorker(settings)
    experiment.proto.model.MergeFrom(worker.spec.to_model())
    worker.close()
    for modality in experiment.proto.model.modalities:
        if modality.HasField("image"):
            modality.image.depth = depth
        else:
            modality.vector.hidden_size = 24
    return experiment


def play(services, *flags):
    process = subprocess.run(
        [sys.executable, "-m", "orrery.gym_actor", f"--config={services.folder / 'config.textproto'}",
         f"--replay={services.replay}", f"--planner={services.planner}", "--metrics_listen=127.0.0.1:0", *flags],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, stderr=subprocess.PIPE, text=True, timeout=400)
    assert process.returncode == 0, process.stderr + "".join(program.log()[-2000:] for program in services.programs)
    return process.stderr


def losses(folder):
    """loss/total of learner.csv in order of the updates."""
    with (folder / "learner.csv").open() as file:
        return [float(row["loss/total"]) for row in csv.DictReader(file)]


def check_rows(replay):
    """What is stored is what the environment did: reward and place follow from each other and from the action."""
    for mode, count in [(EpisodeMode.RANDOM, 4), (EpisodeMode.TRAIN, 8), (EpisodeMode.EVALUATE, 2)]:
        episodes = list(replay.episodes(mode))
        assert len(episodes) == count
        for episode in episodes:
            rows = replay.get_episode(episode.episode_id)
            place = rows["joints"][:, 0]
            np.testing.assert_allclose(rows["reward"][1:], 1 - np.abs(place[1:]), atol=1e-6)
            np.testing.assert_allclose(np.clip(place[:-1] + 0.2 * rows["action"][1:, 0], -1, 1), place[1:], atol=1e-6)
            assert episode.end == EpisodeEnd.TRUNCATED and rows["is_terminal"].sum() == 0 and rows["is_first"].sum() == 1
            column = np.round((place + 1) / 2 * 29).astype(int)
            assert [int(np.flatnonzero(picture[10, :, 0])[0]) for picture in rows["image"]] == column.tolist()


def check_policies(services, snapshot, observation, action_size):
    """The planner of the run and one started from the file choose the same action with the same seed."""
    actions = []
    for target in (services.planner, snapshot):
        with Policy(target) as policy:
            actions.append([policy(observation, seed=seed) for seed in (5, 6)])
    for served, from_file in zip(*actions, strict=True):
        assert served.shape == (action_size,) and np.all(np.abs(served) <= 1)
        np.testing.assert_allclose(served, from_file, atol=1e-5)


def test_trains_a_python_environment(tmp_path):
    pytest.importorskip("fake_envs")  # needs gymnasium and dm_env
    modalities = ("image=camera", "joints=place")
    settings = EnvironmentSettings("python:fake_envs:reach", modalities=modalities, image_size=32)
    with Services(experiment_for(settings), folder=tmp_path, threads=1) as services:
        log = play(services, f"--modality={','.join(modalities)}")
        assert log.count("mode=random") == 4 and log.count("mode=train") == 8 and log.count("mode=evaluate") == 2, log
        with ReplayClient(services.replay, "python_test") as replay:
            await_true(lambda: replay.stats().updates_done >= 12 * 21, services)
            stats = replay.stats()
            assert stats.episodes_finished == 12 and stats.rows_appended == 12 * 21 and stats.rows == 14 * 21
            check_rows(replay)
            (tmp_path / "last.safetensors").write_bytes(replay.get_snapshot())
        snapshot = load_snapshot(tmp_path / "last.safetensors")
        assert snapshot.run == "python_test" and snapshot.version >= (1, 200)
        assert [modality.name for modality in snapshot.model.modalities] == ["image", "joints"]
        assert all(np.all(np.isfinite(array)) for array in snapshot.arrays.values())
        observation = {"joints": np.array([0.5], np.float32), "image": np.zeros((32, 32, 3), np.uint8)}
        check_policies(services, tmp_path / "last.safetensors", observation, 1)
        curve = losses(tmp_path)
        assert len(curve) >= 20 and np.mean(curve[-5:]) < 0.7 * np.mean(curve[:2]), curve
        assert services.close() == [0, 0, 0]


def test_trains_cartpole_with_discrete_actions(tmp_path):
    pytest.importorskip("gymnasium")
    settings = EnvironmentSettings("CartPole-v1", modalities=("state",))
    with Services(experiment_for(settings), folder=tmp_path, threads=1) as services:
        log = play(services, "--modality=state")
        assert log.count("mode=train") == 8, log
        with ReplayClient(services.replay, "python_test") as replay:
            await_true(lambda: replay.stats().updates_done >= replay.stats().rows_appended, services)
            (tmp_path / "last.safetensors").write_bytes(replay.get_snapshot())
        with Policy(services.planner) as policy:
            action = policy(np.zeros(4, np.float32))
        assert sorted(action.tolist()) == [0, 1], "one-hot"


def test_trains_bullet_from_pictures_and_joints(tmp_path):
    pytest.importorskip("pybullet_envs_gymnasium", reason="THE BULLET TEST DID NOT RUN: pip install 'orrery[bullet]'")
    modalities = ("image", "joints")
    settings = EnvironmentSettings("HalfCheetahBulletEnv-v0", modalities=modalities, action_repeat=2, time_limit=60)
    experiment = experiment_for(settings)
    experiment.set("environment.action_repeat", 2)
    experiment.set("environment.time_limit", 60)
    experiment.set("model.posterior", "MOPOE")
    experiment.set("learning.max_episodes", 10)
    with Services(experiment, folder=tmp_path, threads=1) as services:
        log = play(services, f"--modality={','.join(modalities)}")
        assert log.count("mode=train") == 6, log
        with ReplayClient(services.replay, "python_test") as replay:
            await_true(lambda: replay.stats().updates_done >= replay.stats().rows_appended == 310, services)
            assert replay.get_episode(1)["joints"].shape == (31, 26)
            assert replay.get_episode(1)["image"].shape == (31, 64, 64, 3)
            assert replay.get_episode(1)["image"].std() > 1, "a picture of something"
        curve = losses(tmp_path)
        assert np.mean(curve[-5:]) < 0.7 * np.mean(curve[:2]), curve
        played = [evaluate(services.planner, settings, shown) for shown in (modalities, ("image",), ("joints",))]
    for returned, actions in played:
        assert np.isfinite(returned) and actions.shape == (30, 6) and np.all(np.abs(actions) <= 1)
    for one, other in itertools.combinations(played, 2):
        assert not np.array_equal(one[1], other[1]), "what it sees matters"


def evaluate(planner, settings, shown):
    """Return and actions of an episode that the policy plays without exploration, seeing these modalities only."""
    lanes = make_lanes(settings)
    total, actions = 0.0, []
    with Policy(planner) as policy:
        step = lanes.reset({0: 7}, True)[0]
        while not (step.terminated or step.truncated):
            actions.append(policy({name: step.observation[name] for name in shown}, seed=len(actions)))
            step = lanes.step({0: actions[-1]})[0]
            total += step.reward
    lanes.close()
    return total, np.array(actions)


def test_the_hash_is_the_one_of_the_cpp_actor(tmp_path):
    experiment = Experiment.parse(CONFIG)
    experiment.set("environment", '{ task: "point_pixels" image_size: 32 }')
    experiment.set("collection.seed_episodes", 100000)
    experiment.set("learning.max_episodes", 100000)
    experiment.save(tmp_path / "config.textproto")
    image = TensorSpec("image", "uint8", (32, 32, 3))
    flags = [f"--config={tmp_path / 'config.textproto'}", "--store=memory:"]
    with Program("orrery-replay", flags, tmp_path / "r.log") as program:
        actor = subprocess.Popen(
            [find_program("orrery-actor"), f"--config={tmp_path / 'config.textproto'}", f"--replay={program.address}",
             "--metrics_listen=127.0.0.1:0"], stderr=subprocess.DEVNULL)
        try:
            with ReplayClient(program.address, "python_test") as replay:
                deadline = time.monotonic() + 60
                while replay.stats().rows_appended == 0:
                    assert time.monotonic() < deadline, program.log()
                    time.sleep(0.1)
                episode = replay.begin_episode("python", EnvironmentSpec((image,), ActionSpec(2)), timeout=20)
                assert episode is not None and episode.task == "point_pixels"
                with pytest.raises(ServiceError) as refused:
                    replay.begin_episode("python", EnvironmentSpec((image,), ActionSpec(3)), timeout=20)
                assert refused.value.code == grpc.StatusCode.FAILED_PRECONDITION
        finally:
            actor.terminate()
            actor.wait()


def test_an_episode_is_one_trace_in_all_logs(tmp_path):
    experiment = Experiment.parse(CONFIG)
    experiment.set("environment", '{ task: "point_pixels" image_size: 32 time_limit: 30 }')
    experiment.set("collection.environments", 1)
    experiment.set("collection.seed_episodes", 1)
    experiment.set("learning.max_episodes", 3)
    config = tmp_path / "config.textproto"
    experiment.save(config)

    def program(name, *flags):
        return Program(name, [f"--config={config}", "--log_level=debug", *flags], tmp_path / f"{name}.log")

    sent = "4bf92f3577b34da6a3ce929d0e0e4736"
    with (program("orrery-replay", "--store=memory:") as replay,
          program("orrery-learner", f"--replay={replay.address}", "--threads=1") as learner,
          program("orrery-planner", f"--replay={replay.address}", f"--learner={learner.address}", "--threads=1") as planner):
        actor = subprocess.run(
            [find_program("orrery-actor"), f"--config={config}", f"--replay={replay.address}", f"--planner={planner.address}",
             "--metrics_listen=127.0.0.1:0"], stderr=subprocess.PIPE, text=True, timeout=400)
        assert actor.returncode == 0, actor.stderr
        with ReplayClient(replay.address, "python_test") as client, trace(f"00-{sent}-00f067aa0ba902b7-01"):
            client.stats()
        in_replay, in_planner = replay.log(), planner.log()
    assert re.search(rf"D orrery-replay\] call ended method=\S*/GetStats code=OK seconds=\S+ trace_id={sent}$", in_replay, re.M)
    played = re.findall(r" episode=(\d+) task=point_pixels rows=(\d+) .* trace_id=([0-9a-f]{32})$", actor.stderr, re.M)
    assert len(played) == 3 and len({trace_id for _, _, trace_id in played}) == 3, actor.stderr
    for number, (episode, rows, trace_id) in enumerate(played):
        assert len(re.findall(rf"/BeginEpisode code=OK .* trace_id={trace_id}$", in_replay, re.M)) == 1
        chunks = re.findall(rf" chunk appended episode={episode} .* rows=(\d+) trace_id={trace_id}$", in_replay, re.M)
        assert sum(map(int, chunks)) == int(rows) == 31
        asked = len(re.findall(rf"/Act code=OK .* trace_id={trace_id}$", in_planner, re.M))
        assert asked == (0 if number == 0 else 30), "the first episode is random"


def test_a_program_that_does_not_start_says_why(tmp_path):
    with pytest.raises(OrreryError, match="orrery-replay ended with exit code 1: .*nowhere.textproto"):
        Program("orrery-replay", ["--config=/nowhere.textproto"], tmp_path / "log")
