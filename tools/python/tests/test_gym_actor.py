import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import grpc
import pytest

from orrery import ConfigError, Experiment, decode_rows
from orrery.gym_actor import main
from orrery.metrics import Metrics, MetricsServer

pytest.importorskip("fake_envs")  # needs gymnasium and dm_env

TESTS = pathlib.Path(__file__).parent
CONFIG = 'name: "test" environment { task: "counting" image_size: 32 } collection { environments: 2 } replay { chunk_rows: 3 }'


@pytest.fixture
def config(tmp_path):
    (tmp_path / "e.textproto").write_text(CONFIG + " learning { schedule: CONCURRENT }")
    return str(tmp_path / "e.textproto")


def flags(config, fakes, *more):
    return [f"--config={config}", f"--replay={fakes.address}", f"--planner={fakes.address}", "--metrics_listen=127.0.0.1:0",
            *more]


def test_plays_a_run(fakes, config):
    fakes.replay.script.extend([(1, 1, 1), (2, 2, 2), (3, 3, 3)])
    kwargs = json.dumps({"length": 4, "terminal": False})
    assert main(flags(config, fakes, "--env=python:fake_envs:counting", f"--env_kwargs={kwargs}",
                      "--modality=image,joints=*")) == 0
    assert {episode: sum(chunk.rows for chunk in fakes.replay.of(episode)) for episode in (1, 2, 3)} == {1: 5, 2: 5, 3: 5}
    names = {one.name: list(one.tensor.shape) for one in fakes.planner.requests[0].slots[0].observations}
    assert names == {"image": [32, 32, 3], "joints": [3]}


def test_plays_in_a_vector_environment(fakes, config):
    fakes.replay.script.extend([(1, 1, 1), (2, 1, 2), (3, 1, 3)])
    assert main(flags(config, fakes, "--env=python:fake_envs:vector", "--vector")) == 0
    assert sorted(sum(chunk.rows for chunk in fakes.replay.of(episode)) for episode in (1, 2)) == [3, 4]


def test_plays_several_tasks_with_padded_actions(fakes, tmp_path, capsys):
    path = tmp_path / "tasks.textproto"
    path.write_text("""name: "test" environment { action_repeat: 2
        tasks { name: "python:fake_envs:counting" } tasks { name: "python:fake_envs:long" action_repeat: 1 time_limit: 7 } }""")
    fakes.replay.script.extend([(1, 1, 1, "python:fake_envs:counting"), (2, 1, 2, "python:fake_envs:long"),
                                (3, 1, 3, "python:fake_envs:counting")])
    assert main(flags(path, fakes)) == 0
    # Five steps two by two; seven one by one; two numbers of the action padded to four.
    assert {episode: sum(chunk.rows for chunk in fakes.replay.of(episode)) for episode in (1, 2, 3)} == {1: 4, 2: 8, 3: 4}
    for episode in (1, 2, 3):
        chunk = fakes.replay.of(episode)[0]
        assert decode_rows(chunk.payload, chunk.rows)["action"].shape[1] == 4
    assert main([f"--config={path}", "--print_model"]) == 0
    assert Experiment.parse(capsys.readouterr().out).proto.model.action.continuous.size == 4
    assert main(flags(path, fakes, "--vector")) == 1


def test_print_model(config, capsys):
    assert main([f"--config={config}", "--env=python:fake_envs:counting", "--modality=image,joints=*", "--print-model"]) == 0
    model = Experiment.parse(capsys.readouterr().out).proto.model
    assert model.action.continuous.size == 2
    assert model.modalities[0].image.height == 32 and model.modalities[1].vector.size == 3


@pytest.mark.parametrize("more, message", [
    (["--env=python:fake_envs:counting", '--env_kwargs={"bound": Infinity}'], "fake_envs:counting: .*unbounded"),
    (["--set=name="], "name and environment.task must be set"),
    (["--set=nonsense=1"], "nonsense"),
    (["--token_file=/nowhere"], "/nowhere"),
    (["--env=python:fake_envs:counting", "--metrics_listen=nonsense"], "expected HOST:PORT"),
])
def test_errors_are_one_line(fakes, config, capsys, more, message):
    assert main(flags(config, fakes, *more)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("orrery-gym-actor: error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors


@pytest.mark.parametrize("flag", ["--env_kwargs=[1]", "--max_faults=0", "--step_timeout=-1", "--nonsense"])
def test_wrong_flags_end_with_2(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        main([flag])
    assert ended.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


def test_sigterm_sends_what_there_is(fakes, config):
    fakes.planner.hold.clear()
    fakes.replay.script.append((1, 2, 1))
    fakes.replay.begin_errors.extend([(grpc.StatusCode.OK, "")] + [(grpc.StatusCode.DEADLINE_EXCEEDED, "none")] * 1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "orrery.gym_actor", *flags(config, fakes, "--env=python:fake_envs:counting")],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, stderr=subprocess.PIPE, text=True)
    assert fakes.planner.asked.wait(60)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert [(chunk.rows, chunk.end) for chunk in fakes.replay.of(1)] == [(1, 3)], log


def test_metrics_pages():
    metrics = Metrics()
    metrics.add("actor_episodes_total", task='a"b\\')
    metrics.observe("actor_env_step_seconds", 0.003)
    metrics.observe("actor_env_step_seconds", 99)
    server = MetricsServer("127.0.0.1:0", metrics)
    try:
        def get(path):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, ""

        assert get("/readyz")[0] == 503
        server.ready = True
        assert get("/readyz") == (200, "ok\n") and get("/healthz") == (200, "ok\n") and get("/other")[0] == 404
        lines = get("/metrics")[1].splitlines()
        assert 'orrery_actor_episodes_total{task="a\\"b\\\\"} 1.0' in lines
        assert 'orrery_actor_env_step_seconds_bucket{le="0.002"} 0' in lines
        assert 'orrery_actor_env_step_seconds_bucket{le="0.005"} 1' in lines
        assert 'orrery_actor_env_step_seconds_bucket{le="+Inf"} 2' in lines
        assert "# TYPE orrery_actor_env_step_seconds histogram" in lines
    finally:
        server.close()
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        MetricsServer("here", metrics)
