import threading

import fake_services
import grpc
import numpy as np
import pytest

from orrery import (
    ActionSpec, Chunk, DataError, EnvironmentSpec, Episode, EpisodeEnd, EpisodeMode, EpisodeRecorder, ReplayClient,
    ReplayWriter, ServiceError, TensorSpec, decode_rows)

SPEC = EnvironmentSpec((TensorSpec("joints", "float32", (2,)),), ActionSpec(1))
EPISODE = Episode("run-id", False, 3, EpisodeMode.TRAIN, "task", 9, 60)


@pytest.fixture
def replay(fakes):
    with ReplayClient(fakes.address, "my_run", token="secret") as client:
        yield client


def chunk(episode=1, first_row=0, size=10):
    return Chunk("run-id", episode, first_row, 5, EpisodeMode.TRAIN, EpisodeEnd.CONTINUES, 77, (1, 2), 0.5, b"x" * size)


def keys(chunks):
    return [(one.episode_id, one.first_row) for one in chunks]


def test_begins_episodes(fakes, replay):
    fakes.replay.script.append((7, 2, 2**64 - 1))
    episode = replay.begin_episode("actor-1", SPEC, timeout=10)
    assert episode == Episode("run-id", False, 7, EpisodeMode.TRAIN, "counting", 2**64 - 1, 60)
    request = fakes.replay.begun[0]
    assert (request.run, request.actor_id, request.specification_hash) == ("my_run", "actor-1", SPEC.hash())
    assert replay.begin_episode("actor-1", SPEC, timeout=10).run_complete


def test_none_may_begin_before_the_deadline(fakes, replay):
    fakes.replay.begin_errors.append((grpc.StatusCode.DEADLINE_EXCEEDED, "not now"))
    assert replay.begin_episode("actor-1", SPEC, timeout=10) is None


def test_beginning_is_tried_again_and_final_errors_are_not(fakes, replay):
    fakes.replay.begin_errors.extend([
        (grpc.StatusCode.UNAVAILABLE, "away"), (grpc.StatusCode.FAILED_PRECONDITION, "other hash")])
    with pytest.raises(ServiceError, match="FAILED_PRECONDITION: other hash"):
        replay.begin_episode("actor-1", SPEC, timeout=10)
    assert len(fakes.replay.begun) == 2


def test_a_question_keeps_its_id_until_it_is_answered(fakes, replay):
    def ask(code=None):
        """The id of each try."""
        before = len(fakes.replay.begun)
        if code is not None:
            fakes.replay.begin_errors.append((code, "no"))
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                assert replay.begin_episode("actor-1", SPEC, timeout=10) is None
            else:
                with pytest.raises(ServiceError, match=code.name):
                    replay.begin_episode("actor-1", SPEC, timeout=10)
        else:
            assert replay.begin_episode("actor-1", SPEC, timeout=10).run_complete
        return [request.request_id for request in fakes.replay.begun[before:]]

    fakes.replay.begin_errors.append((grpc.StatusCode.UNAVAILABLE, "away"))
    first, again = ask(grpc.StatusCode.DEADLINE_EXCEEDED)
    assert first == again and 8 <= len(first) <= 64
    assert ask(grpc.StatusCode.ABORTED) == [first]
    assert ask(grpc.StatusCode.INTERNAL) == [first]
    assert replay.begin_episode("actor-2", SPEC, timeout=10).run_complete
    assert fakes.replay.begun[-1].request_id != first
    assert ask() == [first]
    second, = ask()
    assert second != first
    third, = ask(grpc.StatusCode.FAILED_PRECONDITION)
    assert third not in (first, second)
    fourth, = ask()
    assert fourth not in (first, second, third)


def test_questions_asked_at_the_same_time_have_their_own_ids(fakes, replay):
    both = threading.Barrier(2)

    def begin(request, context):
        fakes.replay.begun.append(request)
        both.wait(60)
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "not now")

    fakes.replay.answer_begin = begin
    for _ in range(2):
        threads = [threading.Thread(target=replay.begin_episode, args=("actor-1", SPEC, 60)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    ids = [request.request_id for request in fakes.replay.begun]
    assert len(ids) == 4 and len(set(ids)) == 2
    assert set(ids[:2]) == set(ids[2:])


def test_writes_every_field(fakes, replay):
    with ReplayWriter(replay) as writer:
        writer.append(chunk())
        writer.flush(30)
        assert writer.unacknowledged_bytes == 0
    sent = fakes.replay.chunks[0]
    assert (sent.run_id, sent.episode_id, sent.first_row, sent.rows, sent.mode, sent.end) == ("run-id", 1, 0, 5, 2, 1)
    assert (sent.specification_hash, sent.snapshot_version.generation, sent.snapshot_version.counter) == (77, 1, 2)
    assert sent.reward_sum == 0.5 and sent.payload == b"x" * 10


def test_sends_again_what_a_broken_stream_did_not_acknowledge(fakes, replay):
    fakes.replay.break_after.extend([2, 0, 3, None])
    with ReplayWriter(replay) as writer:
        for row in range(0, 50, 5):
            writer.append(chunk(first_row=row))
        writer.flush(30)
    assert keys(fakes.replay.chunks) == [(1, row) for row in range(0, 50, 5)], "each in order, none lost"


def test_survives_a_restart_of_the_service(fakes):
    port = int(fakes.address.rpartition(":")[2])
    with ReplayClient(fakes.address, "my_run") as replay, ReplayWriter(replay) as writer:
        writer.append(chunk(first_row=0))
        writer.flush(30)
        fakes.server.stop(0).wait()
        writer.append(chunk(first_row=5))
        with pytest.raises(TimeoutError, match="not acknowledged 1 chunks"):
            writer.flush(0.1)
        fakes.server, again = fake_services.start(fakes.replay, fakes.planner, port)
        assert again == port
        writer.flush(60)
    assert keys(fakes.replay.chunks) == [(1, 0), (1, 5)]


def test_gives_up_only_the_episode_that_is_refused(fakes, replay):
    fakes.replay.refuse = 2
    with ReplayWriter(replay) as writer:
        for episode, row in [(1, 0), (2, 0), (1, 5), (3, 0)]:
            writer.append(chunk(episode, row))
        with pytest.raises(ServiceError, match="ALREADY_EXISTS"):
            writer.flush(30)
        writer.flush(30)
        with pytest.raises(ServiceError, match="other contents"):
            writer.append(chunk(2, 5))
        writer.append(chunk(3, 5))
        writer.flush(30)
    assert keys(fakes.replay.chunks) == [(1, 0), (1, 5), (3, 0), (3, 5)]


def test_waits_while_its_memory_is_full(fakes, replay):
    fakes.replay.hold_acknowledgements = True
    with ReplayWriter(replay, max_unacknowledged_bytes=3000) as writer:
        writer.append(chunk(first_row=0, size=5000))  # one always fits alone
        with pytest.raises(TimeoutError, match="a chunk of .* does not fit"):
            writer.append(chunk(first_row=5, size=100), timeout=0.05)
        assert writer.unacknowledged_bytes > 5000
        appended = threading.Event()

        def append():
            writer.append(chunk(first_row=5, size=100), timeout=60)
            appended.set()

        thread = threading.Thread(target=append)
        thread.start()
        assert not appended.is_set()
        fakes.replay.hold_acknowledgements = False
        thread.join()
        assert appended.is_set()
        writer.flush(30)


def test_renews_leases(fakes, replay):
    with ReplayWriter(replay, heartbeat=0.05) as writer:
        writer.keep_alive([4, 5])
        with fakes.replay.lock:
            assert fakes.replay.changed.wait_for(lambda: fakes.replay.alive.count((4, 5)) >= 2, 30)


def test_close_ends_a_writer_that_waits(fakes, replay):
    fakes.replay.hold_acknowledgements = True
    writer = ReplayWriter(replay)
    writer.append(chunk())
    writer.close()
    with pytest.raises(ServiceError, match="closed"):
        writer.append(chunk(first_row=5))


def test_refuses_impossible_chunks(replay):
    with ReplayWriter(replay) as writer, pytest.raises(DataError, match="payload of 0 bytes"):
        writer.append(chunk(size=0))


def joints(value):
    return {"joints": np.array([value, -value], np.float32)}


def test_recorder_makes_rows_and_chunks():
    recorder = EpisodeRecorder(EPISODE, SPEC, joints(0), chunk_rows=2)
    chunks = []
    for step in range(1, 5):
        chunks.append(recorder.add(np.array([step / 8], np.float32), joints(step), reward=step, version=(1, 10 * step)))
    assert [one is None for one in chunks] == [True, False, True, False]
    chunks = [one for one in chunks if one is not None] + [recorder.end(EpisodeEnd.TERMINATED)]
    assert [(one.first_row, one.rows) for one in chunks] == [(0, 2), (2, 2), (4, 1)]
    assert [one.end for one in chunks] == [EpisodeEnd.CONTINUES, EpisodeEnd.CONTINUES, EpisodeEnd.TERMINATED]
    assert [one.version for one in chunks] == [(1, 10), (1, 30), (1, 40)]
    assert [one.reward_sum for one in chunks] == [1, 5, 4]
    assert {(one.run_id, one.episode_id, one.mode, one.specification_hash) for one in chunks} == {
        ("run-id", 3, EpisodeMode.TRAIN, SPEC.hash())}
    rows = [decode_rows(one.payload, one.rows) for one in chunks]
    whole = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    assert whole["joints"].tolist() == [[value, -value] for value in range(5)]
    assert whole["action"].tolist() == [[0], [0.125], [0.25], [0.375], [0.5]]
    assert whole["reward"].tolist() == [0, 1, 2, 3, 4]
    assert whole["is_first"].tolist() == [1, 0, 0, 0, 0]
    assert whole["is_terminal"].tolist() == [0, 0, 0, 0, 1]


def test_recorder_keeps_copies():
    buffer = joints(1)
    recorder = EpisodeRecorder(EPISODE, SPEC, buffer)
    buffer["joints"][:] = 9
    assert decode_rows(recorder.end(EpisodeEnd.TRUNCATED).payload, 1)["joints"].tolist() == [[1, -1]]


@pytest.mark.parametrize("action, observation, message", [
    (np.zeros(1, np.float32), {}, "no 'joints'"),
    (np.zeros(1, np.float32), {"joints": np.zeros(3, np.float32)}, r"float32\[3\]: expected float32\[2\]"),
    (np.zeros(1, np.float32), {"joints": np.zeros(2)}, r"float64\[2\]"),
    (np.zeros(2, np.float32), {"joints": np.zeros(2, np.float32)}, r"action is \[2\]: expected \[1\]"),
])
def test_recorder_refuses_rows_that_do_not_fit(action, observation, message):
    recorder = EpisodeRecorder(EPISODE, SPEC, joints(0))
    with pytest.raises(DataError, match=message):
        recorder.add(action, observation, 0.0)
