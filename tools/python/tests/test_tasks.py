"""orrery.make and orrery.make_vec: against a program whose every step is known, and against the real one."""

import math
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import orrery
import orrery.env_process
from orrery import ConfigError, DataError, EnvironmentFault, OrreryError
from orrery.env_process import NOTHING, RESET, STEP, EnvProcess
from orrery.local import find_program

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.utils.env_checker import check_env  # noqa: E402
from gymnasium.vector import AutoresetMode  # noqa: E402

import orrery.gymnasium_tasks  # noqa: E402

MODES = ("NEXT_STEP", "SAME_STEP", "DISABLED")


@pytest.fixture
def fake(tmp_path):
    """A program of this name, as a path."""
    script = pathlib.Path(__file__).parent / "fake_env_program.py"
    program = tmp_path / "orrery"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    return str(program)


def missing_program():
    try:
        find_program("orrery")
        return ""
    except OrreryError as error:
        return str(error)


real = pytest.mark.skipif(missing_program() != "", reason=f"TESTS OF THE REAL TASKS DID NOT RUN: {missing_program()}")


def make_vec(fake, count=2, task="known", **arguments):
    return orrery.make_vec(task, count, program=fake, **arguments)


def clock(observations):
    return observations["clock"].tolist()


def test_spaces_and_observations(fake):
    with orrery.make("known", program=fake) as env:
        assert env.observation_space["clock"] == gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        assert env.observation_space["image"] == gymnasium.spaces.Box(0, 255, (2, 2, 3), np.uint8)
        assert env.action_space == gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        observation, info = env.reset(seed=7)
        assert clock(observation) == [7, 0, 0] and info == {}
        observation, reward, terminated, truncated, info = env.step(np.array([0.5, 0], np.float32))
        assert clock(observation) == [7, 1, 0.5] and (reward, terminated, truncated, info) == (1.0, False, False, {})
        assert env.step(env.action_space.sample())[1:] == (2.0, False, True, {}), "an odd seed is cut"
        env.reset(seed=8)
        env.step(env.action_space.sample())
        assert env.step(env.action_space.sample())[1:] == (2.0, True, False, {}), "an even seed is ended"


def test_pictures_for_people(fake):
    with orrery.make("known", program=fake, render_mode="rgb_array", height=5, width=7) as env:
        env.reset(seed=1)
        env.step(np.zeros(2, np.float32))
        assert env.render().shape == (5, 7, 3) and np.all(env.render() == 1)
    envs = make_vec(fake, render_mode="rgb_array", height=5, width=7)
    envs.reset(seed=1)
    frames = envs.render()
    assert len(frames) == 2 and all(frame.shape == (5, 7, 3) and not frame.any() for frame in frames)
    envs.close()
    with pytest.raises(ConfigError, match="render_mode is 'human'"):
        orrery.gymnasium_tasks.TaskVectorEnv("known", program=fake, render_mode="human")


def test_discrete_actions(fake):
    envs = make_vec(fake, 3, "discrete")
    assert envs.single_action_space == gymnasium.spaces.Discrete(3)
    envs.reset(seed=1)
    observations = envs.step(np.array([0, 1, 0]))[0]
    assert observations["clock"][:, 2].tolist() == [1, 0, 1], "one-hot: the first number of choice 0 is 1"
    for wrong in ([0, 1], [0, 1, 3], [0, -1, 1], [0.0, 1.0, 0.0]):
        with pytest.raises(DataError, match="expected 3 choices from 0 to 2"):
            envs.step(np.array(wrong))
    assert envs.step(np.array([1, 1, 1]))[0]["clock"][:, 1].tolist() == [2, 2, 2], "a refused action changes nothing"
    envs.close()


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros(2), [[0, np.nan], [0, 0]], [["a", "b"], ["c", "d"]]])
def test_wrong_actions(fake, wrong):
    envs = make_vec(fake)
    envs.reset(seed=1)
    with pytest.raises(DataError, match=r"expected \[2, 2\] finite numbers"):
        envs.step(wrong)
    assert clock(envs.step(np.zeros((2, 2)))[0]) == [[1, 1, 0], [2, 1, 0]]
    envs.close()


def step(envs):
    observations, rewards, terminated, truncated, infos = envs.step(np.zeros((2, 2), np.float32))
    return observations["clock"][:, 1].tolist(), rewards.tolist(), terminated.tolist(), truncated.tolist(), infos


# Environment 0 has 2 steps and an even seed first, environment 1 has 3 and an odd one.
def test_next_step(fake):
    envs = make_vec(fake)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    envs.reset(seed=4)
    assert step(envs) == ([1, 1], [1, 1.125], [False] * 2, [False] * 2, {})
    assert step(envs) == ([2, 2], [2, 2.125], [True, False], [False] * 2, {})
    assert step(envs) == ([0, 3], [0, 3.125], [False] * 2, [False, True], {}), "the action of what has ended is ignored"
    assert step(envs)[:2] == ([1, 0], [1, 0])
    envs.close()


def test_same_step(fake):
    envs = make_vec(fake, autoreset_mode="SAME_STEP")
    envs.reset(seed=4)
    step(envs)
    *rest, infos = step(envs)
    assert rest == [[0, 2], [2, 2.125], [True, False], [False] * 2]
    assert infos["final_obs"][0]["clock"].tolist() == [4, 2, 0] and infos["final_obs"][1] is None
    assert infos["_final_obs"].tolist() == [True, False]
    *rest, infos = step(envs)
    assert rest == [[1, 0], [1, 3.125], [False] * 2, [False, True]]
    assert infos["final_obs"][0] is None and infos["final_obs"][1]["clock"].tolist() == [5, 3, 0]
    steps, rewards, *_ = step(envs)
    assert steps == [0, 1] and rewards == [2, 1.125], "the second episodes go on as the first ones"
    envs.close()


def test_disabled(fake):
    envs = make_vec(fake, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=4)
    step(envs)
    assert step(envs)[0] == [2, 2]
    with pytest.raises(EnvironmentFault, match=r"environments \[0\] have ended: reset them"):
        step(envs)
    observations, _ = envs.reset(seed=[9, None], options={"reset_mask": np.array([True, False])})
    assert clock(observations) == [[9, 0, 0], [5, 2, 0]], "the other one is left as it was"
    assert step(envs)[0] == [1, 3]
    for mask in (np.array([True]), np.array([0, 1]), [True, False], np.array([False, False])):
        with pytest.raises(ValueError, match="reset_mask"):
            envs.reset(options={"reset_mask": mask})
    envs.close()


def test_seeds(fake):
    envs = make_vec(fake)
    assert clock(envs.reset(seed=[7, 70])[0]) == [[7, 0, 0], [70, 0, 0]]
    with pytest.raises(ValueError, match="seed has 3 numbers: expected 2"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(gymnasium.error.Error):
        envs.reset(seed=-1)
    largest = (1 << 64) - 1
    assert clock(envs.reset(seed=[largest, 0])[0]) == [[largest % 1000, 0, 0], [0, 0, 0]]
    envs.reset(seed=3)
    first = clock(envs.reset()[0])
    envs.reset(seed=3)
    assert clock(envs.reset()[0]) == first and clock(envs.reset()[0]) != first, "drawn from the seed given last"
    envs.close()


def episodes(envs, steps, mode):
    """What each lane of a vector environment showed: lists of (clock, reward, terminated, truncated), resets left out."""
    shown = [[] for _ in range(envs.num_envs)]
    observations, _ = envs.reset(seed=40)
    ended = np.zeros(envs.num_envs, bool)
    for number in range(steps):
        if mode == "DISABLED" and ended.any():
            envs.reset(options={"reset_mask": ended})
        actions = np.full((envs.num_envs, 2), number / 64, np.float32)
        was_ended = ended
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        ended = terminated | truncated
        for i in range(envs.num_envs):
            if mode == "NEXT_STEP" and was_ended[i]:
                continue
            seen = infos["final_obs"][i]["clock"] if mode == "SAME_STEP" and ended[i] else observations["clock"][i]
            shown[i].append((seen[:2].tolist(), rewards[i], terminated[i], truncated[i]))
    return shown


@pytest.mark.parametrize("mode", MODES)
def test_lanes_play_what_single_environments_play(fake, mode):
    envs = make_vec(fake, 3, autoreset_mode=mode)
    together = episodes(envs, 12, mode)
    envs.close()
    # All lanes of a program of their own: the fake's rules depend on a lane's number.
    for lane, shown in enumerate(together):
        child = EnvProcess("known", 3, program=fake)
        seeds = orrery.gymnasium_tasks._Seeds()
        what = [NOTHING] * 3
        alone = []
        todo = RESET
        seed = seeds.next(40 + lane)
        while len(alone) < len(shown):
            what[lane] = todo
            states = child.advance(what, [seed] * 3, np.zeros((3, 2)))
            if todo == STEP:
                alone.append((states.observations["clock"][lane, :2].tolist(), states.rewards[lane], states.terminated[lane],
                              states.truncated[lane]))
            todo = STEP
            if states.terminated[lane] or states.truncated[lane]:
                todo, seed = RESET, seeds.next(None)
        child.close()
        assert shown == alone and any(one[2] or one[3] for one in shown)


def test_a_fault_names_the_environment_and_a_reset_goes_on(fake):
    envs = make_vec(fake, task="fails")
    with pytest.raises(EnvironmentFault, match="step before a reset"):
        envs.step(np.zeros((2, 2)))
    envs.reset(seed=1)
    step(envs)
    with pytest.raises(EnvironmentFault, match="task 'fails': environment 1: no third step"):
        step(envs)
    with pytest.raises(EnvironmentFault, match="which a fault makes necessary"):
        step(envs)
    with pytest.raises(EnvironmentFault, match="reset all of them"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    envs.reset(seed=1)
    assert step(envs)[0] == [1, 1]
    envs.close()


@pytest.mark.parametrize("task, message", [
    ("refused", "task 'refused': there is no such task .*exit code 1"),
    ("another_program", "another program than `orrery env`"),
    ("no_proto", "its specification cannot be used"),
    ("unknown_type", "its specification cannot be used"),
])
def test_a_task_that_cannot_be_made(fake, task, message):
    with pytest.raises(ConfigError, match=message):
        EnvProcess(task, program=fake)


def test_a_program_that_is_not_there():
    with pytest.raises(ConfigError, match="/nowhere/orrery"):
        orrery.make("known", program="/nowhere/orrery")


@pytest.mark.parametrize("task, message", [("dies", "out of luck.*it ended; exit code 1"),
                                           ("hangs", "did not answer in time and was killed; exit code -9"),
                                           ("wrong_size", "kind 4 and 37 bytes: expected kind 4 and 33")])
def test_a_child_that_is_lost(fake, monkeypatch, task, message):
    monkeypatch.setattr(orrery.env_process, "_MARGIN", 0.0)
    with orrery.make(task, program=fake, timeout=30 if task != "hangs" else 3) as env:
        with pytest.raises(EnvironmentFault, match=message):
            env.reset(seed=1)
            env.step(np.zeros(2, np.float32))
            env.step(np.zeros(2, np.float32))
        with pytest.raises(EnvironmentFault, match="has ended"):
            env.reset()


def test_an_answer_never_goes_to_another_call(fake, monkeypatch):
    """After Ctrl-C in the middle of a step, the next one would get that step's observations."""
    child = EnvProcess("known", program=fake)
    child.advance([RESET], [1], np.zeros((1, 2)))

    def interrupted(deadline):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(child, "_header", interrupted)
        with pytest.raises(KeyboardInterrupt):
            child.advance([STEP], [0], np.zeros((1, 2)))
    with pytest.raises(EnvironmentFault, match="the answer to an earlier call was never read"):
        child.advance([STEP], [0], np.zeros((1, 2)))


def test_the_child_ends_with_its_environment(fake):
    env = orrery.make("known", program=fake)
    process = env.unwrapped._child._process
    assert process.poll() is None
    env.close()
    env.close()
    assert process.returncode == 0
    child = EnvProcess("known", program=fake)
    process = child._process
    del child
    assert process.returncode == 0


# -- the real program --


@real
@pytest.mark.parametrize("task", ["point_pixels", "point_pixels_discrete", "cartpole_swingup"])
def test_passes_gymnasiums_checker(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with orrery.make(task, image_size=32, render_mode="rgb_array") as env:
            check_env(env.unwrapped)


@real
@pytest.mark.parametrize("mode", MODES)
def test_real_lanes_play_what_single_environments_play(mode):
    """Pictures and rewards of each lane, over two ends of an episode."""
    envs = orrery.make_vec("point_pixels", 3, image_size=32, time_limit=6, autoreset_mode=mode)
    assert repr(envs.spec.id) == "'orrery/Task-v0'" and envs.num_envs == 3
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(20)]
    together = real_episodes(envs, actions, mode)
    envs.close()
    for lane in range(3):
        with orrery.make("point_pixels", image_size=32, time_limit=6) as env:
            observation, _ = env.reset(seed=11 + lane)
            shown = [(observation["image"], 0.0)]
            for number, action in enumerate(actions):
                if number % 7 == 6 and mode == "NEXT_STEP":  # the seventh only resets
                    observation, _ = env.reset()
                    shown.append((observation["image"], 0.0))
                    continue
                observation, reward, terminated, truncated, _ = env.step(action[lane])
                shown.append((observation["image"], reward))
                assert not terminated and truncated == (len(shown) % 7 == 0 if mode == "NEXT_STEP" else (number + 1) % 6 == 0)
                if truncated and mode != "NEXT_STEP":
                    env.reset()
        for (image, reward), (expected_image, expected_reward) in zip(together[lane], shown, strict=True):
            np.testing.assert_array_equal(image, expected_image)
            assert reward == expected_reward


def real_episodes(envs, actions, mode):
    observations, _ = envs.reset(seed=11)
    shown = [[(observations["image"][i], 0.0)] for i in range(envs.num_envs)]
    ended = np.zeros(envs.num_envs, bool)
    for action in actions:
        if mode == "DISABLED" and ended.any():
            envs.reset(options={"reset_mask": ended})
        observations, rewards, terminated, truncated, infos = envs.step(action)
        ended = terminated | truncated
        for i in range(envs.num_envs):
            final = mode == "SAME_STEP" and ended[i]
            shown[i].append((infos["final_obs"][i]["image"] if final else observations["image"][i], rewards[i]))
    return shown


@real
def test_rewards_are_the_tasks():
    """point_pixels: 0.2 per step and axis inside [-1, 1]², reward exp(-d²/(2·0.3²)) at distance d of the middle."""
    with orrery.make("point_pixels", image_size=32) as env:
        env.reset(seed=3)
        for _ in range(10):
            reward = env.step(np.array([1, 1], np.float32))[1]
        assert reward == pytest.approx(math.exp(-2 / 0.18), rel=1e-6), "in the corner"
        for _ in range(5):
            reward = env.step(np.array([-1, 0], np.float32))[1]
        assert reward == pytest.approx(math.exp(-1 / 0.18), rel=1e-5), "in the middle of an edge"
    with orrery.make("point_pixels", image_size=32, action_repeat=5) as env:
        env.reset(seed=3)
        env.step(np.array([1, 1], np.float32))
        env.step(np.array([1, 1], np.float32))
        expected = sum(math.exp(-((1 - 0.2 * k) ** 2 + 1) / 0.18) for k in range(1, 6))
        assert env.step(np.array([-1, 0], np.float32))[1] == pytest.approx(expected, rel=1e-5), "rewards of five steps"


@real
def test_a_seed_is_the_episodes_seed():
    """All that point_pixels shows first follows from its seed; ten others differ."""
    with orrery.make("point_pixels", image_size=32) as env:
        first = env.reset(seed=5)[0]["image"]
        np.testing.assert_array_equal(env.reset(seed=5)[0]["image"], first)
        assert all(np.any(env.reset(seed=seed)[0]["image"] != first) for seed in range(6, 16))


@real
@pytest.mark.parametrize("task, size", [("cartpole_swingup", 1), ("reacher_easy", 2)])
def test_plays_what_orrery_inspect_plays(task, size, tmp_path):
    """`orrery inspect rollout` steps the simulator without any of what is around it here. Both tasks' own units are [-1, 1]."""
    actions = np.random.default_rng(0).uniform(-1, 1, (12, size)).astype(np.float32)
    save_file({"action": actions}, tmp_path / "in.safetensors")
    subprocess.run([find_program("orrery"), "inspect", "rollout", f"--env={task}", f"--input={tmp_path / 'in.safetensors'}",
                    f"--out={tmp_path / 'out.safetensors'}", "--seed=5", "--quality=fast"], check=True)
    expected = load_file(tmp_path / "out.safetensors")
    with orrery.make(task) as env:
        images, rewards = [env.reset(seed=5)[0]["image"]], []
        for action in actions:
            observation, reward, *_ = env.step(action)
            images.append(observation["image"])
            rewards.append(reward)
    assert rewards == expected["reward"].tolist()
    np.testing.assert_array_equal(images, expected["image"])


@real
def test_wrong_arguments_name_themselves():
    with pytest.raises(ConfigError, match="task 'nonsense': unknown task \"nonsense\", expected one of: .*cheetah_run"):
        orrery.make("nonsense")
    with pytest.raises(ConfigError, match="--image_size"):
        orrery.make("point_pixels", image_size=1000)
    with pytest.raises(ConfigError, match="--num_envs"):
        orrery.make_vec("point_pixels", 0)
    with pytest.raises(ConfigError, match="autoreset_mode is 'later'"):
        orrery.make_vec("point_pixels", 1, autoreset_mode="later")
