import threading
import types

import grpc
import numpy as np
import pytest

from orrery import ConfigError, DataError, PlannerClient, Policy, ServiceError, Slot, Tls
from orrery.channel import Backoff, make_channel, retry
from orrery.planner.v1 import planner_pb2

IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
JOINTS = np.array([1, 2], np.float32)


@pytest.fixture
def planner(fakes):
    with PlannerClient(fakes.address, client_id="me", timeout=10, token="secret") as client:
        yield client


def test_sends_what_the_planner_needs(fakes, planner):
    action = planner.act({"image": IMAGE, "joints": JOINTS}, noise=0.5, seed=9)
    assert action.dtype == np.float32 and action.tolist() == [0.25, -0.5]
    planner.act({"joints": JOINTS}, valid_actions=[True, False])
    first, second = fakes.planner.requests
    assert first.client_id == "me" and first.priority == 1 and second.priority == 2
    slot = first.slots[0]
    image, joints = slot.observations
    assert (image.name, image.tensor.data_type, list(image.tensor.shape)) == ("image", 1, [2, 2, 3])
    assert image.tensor.data == bytes(range(12))
    assert (joints.name, joints.tensor.data_type, list(joints.tensor.shape)) == ("joints", 4, [2])
    assert joints.tensor.data == b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    assert slot.belief == b"" and not slot.previous_action and slot.seed == 9 and slot.exploration_noise == 0.5
    assert second.slots[0].belief == b"belief-1" and list(second.slots[0].previous_action) == [0.25, -0.5]
    assert not second.slots[0].HasField("seed") and list(second.slots[0].valid_actions) == [True, False]
    assert fakes.planner.metadata[0]["authorization"] == "Bearer secret"


def test_keeps_a_belief_for_each_agent(fakes, planner):
    planner.act_many({"a": {"joints": JOINTS}, "b": {"joints": JOINTS}})
    planner.act({"joints": JOINTS}, agent="a")
    planner.reset("a")
    planner.executed(np.array([1, 0.5], np.float32), agent="b")
    planner.act_many({"b": {"joints": JOINTS}, "a": {"joints": JOINTS}, "c": {"joints": JOINTS}})
    slots = fakes.planner.requests[2].slots
    assert [slot.belief for slot in slots] == [b"belief-1", b"", b""]
    assert list(slots[0].previous_action) == [1, 0.5]
    planner.reset()
    planner.act({"joints": JOINTS}, agent="b")
    assert fakes.planner.requests[3].slots[0].belief == b""


@pytest.mark.parametrize("code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT])
def test_begins_a_new_belief_when_the_model_changed(fakes, planner, code):
    fakes.planner.errors.extend([(grpc.StatusCode.OK, ""), (code, "belief of another structure")])
    for _ in range(3):
        planner.act({"joints": JOINTS})
    beliefs = [(request.slots[0].belief, len(request.slots[0].previous_action)) for request in fakes.planner.requests]
    assert beliefs == [(b"", 0), (b"belief-1", 2), (b"", 0), (b"belief-3", 2)]


def test_a_refused_observation_is_an_error(fakes, planner):
    fakes.planner.errors.append((grpc.StatusCode.INVALID_ARGUMENT, "slots[0]: 'image' is [2, 2, 3], expected [64, 64, 3]"))
    with pytest.raises(ServiceError, match=r"INVALID_ARGUMENT: .*expected \[64, 64, 3\]") as raised:
        planner.act({"image": IMAGE})
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT and raised.value.final and not raised.value.transient
    assert len(fakes.planner.requests) == 1, "there was no belief to blame"


def test_tries_again_while_the_planner_is_away(fakes, planner):
    fakes.planner.errors.extend([(grpc.StatusCode.UNAVAILABLE, "no snapshot"), (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")])
    planner.act({"joints": JOINTS})
    assert len(fakes.planner.requests) == 3
    fakes.planner.errors.append((grpc.StatusCode.UNAVAILABLE, "no snapshot"))
    with pytest.raises(ServiceError, match="no snapshot"):
        planner.plan([Slot({"joints": JOINTS})], evaluation=True, tries=False)
    assert len(fakes.planner.requests) == 4


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED])
def test_tries_again_after_what_one_call_may_have_suffered_alone(fakes, planner, code):
    fakes.planner.errors.append((code, "out of memory"))
    assert planner.act({"joints": JOINTS}).tolist() == [0.25, -0.5]
    assert len(fakes.planner.requests) == 2
    fakes.planner.errors.extend([(code, "out of memory")] * 1000)
    with pytest.raises(ServiceError, match="out of memory") as raised:
        planner.plan([Slot({"joints": JOINTS})], evaluation=True, timeout=0.5)
    assert raised.value.code == code and raised.value.transient and not raised.value.final
    assert len(fakes.planner.requests) > 3, "tried until the deadline"


def test_an_answer_of_another_number_of_slots_is_final(planner, monkeypatch):
    monkeypatch.setattr(planner, "_call", lambda *_: planner_pb2.ActResponse())
    with pytest.raises(ServiceError, match="answered 0 slots, expected 1") as raised:
        planner.plan([Slot({"joints": JOINTS})], evaluation=True)
    assert raised.value.final and not raised.value.transient


def test_gives_up_at_the_deadline(fakes, planner):
    fakes.planner.hold.clear()
    with pytest.raises(ServiceError) as raised:
        planner.plan([Slot({"joints": JOINTS})], evaluation=True, timeout=0.2)
    assert raised.value.code == grpc.StatusCode.DEADLINE_EXCEEDED and raised.value.transient


def test_a_planner_that_hangs_leaves_time_for_another(fakes, planner, monkeypatch):
    monkeypatch.setattr("orrery.planner_client._SHORTEST_TRY", 0.1)
    fakes.planner.hangs = 1
    answer, = planner.plan([Slot({"joints": JOINTS})], evaluation=True, timeout=6)
    assert answer.version[1] == 2 and len(fakes.planner.requests) == 2
    fakes.planner.hangs = 3
    with pytest.raises(ServiceError, match="DEADLINE_EXCEEDED"):
        planner.plan([Slot({"joints": JOINTS})], evaluation=True, timeout=0.2, tries=False)
    assert len(fakes.planner.requests) == 3


class Failed(grpc.RpcError, grpc.Call):
    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return ""


@pytest.mark.parametrize("shortest, expected", [({"shortest_try": 5}, [20, 10, 5, 5]), ({}, [40])])
def test_tries_share_the_time(monkeypatch, shortest, expected):
    now = 1000.0
    monkeypatch.setattr("orrery.channel.time", types.SimpleNamespace(monotonic=lambda: now, sleep=lambda _: None))
    given = []

    def hang(seconds):
        nonlocal now
        given.append(seconds)
        now += seconds
        raise Failed(grpc.StatusCode.DEADLINE_EXCEEDED)

    with pytest.raises(ServiceError, match="DEADLINE_EXCEEDED"):
        retry(40, hang, **shortest)
    assert given == expected


def test_an_error_that_is_not_retried_ends_the_tries():
    def refuse(_):
        raise Failed(grpc.StatusCode.INVALID_ARGUMENT)

    with pytest.raises(ServiceError, match="INVALID_ARGUMENT"):
        retry(40, refuse, shortest_try=5)


def test_cancel_ends_a_running_call(fakes, planner):
    fakes.planner.hold.clear()
    raised = []

    def ask():
        try:
            planner.act({"joints": JOINTS})
        except ServiceError as error:
            raised.append(error.code)

    thread = threading.Thread(target=ask)
    thread.start()
    assert fakes.planner.asked.wait(30)
    planner.cancel()
    thread.join()
    assert raised == [grpc.StatusCode.CANCELLED]


def test_refuses_arrays_that_the_wire_does_not_know(planner):
    with pytest.raises(DataError, match="'joints' is float16"):
        planner.act({"joints": JOINTS.astype(np.float16)})


def test_channels_refuse_what_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="address is empty"):
        make_channel("")
    with pytest.raises(ConfigError, match="nothing.pem"):
        make_channel("localhost:1", Tls(ca=tmp_path / "nothing.pem"))
    with pytest.raises(ConfigError, match="certificate and key belong together"):
        make_channel("localhost:1", Tls(certificate=tmp_path / "x.pem"))


def test_backoff_doubles_within_its_bounds():
    backoff = Backoff(first=1, last=4)
    for most in (1, 2, 4, 4):
        assert most / 2 <= backoff.next() <= most
    backoff.reset()
    assert backoff.next() <= 1


def test_policy_makes_modalities_and_actions(fakes):
    gymnasium = pytest.importorskip("gymnasium")
    fakes.planner.model.model_config = """
        action { continuous { size: 2 } }
        modalities { name: "image" image { height: 32 width: 32 } } modalities { name: "joints" vector { size: 4 } }"""
    space = gymnasium.spaces.Box(np.array([0, 0], np.float32), np.array([8, 4], np.float32))
    with Policy(fakes.address, action_space=space) as policy:
        native = policy({"image": np.full((64, 64, 3), 7, np.uint8), "joints": np.ones((2, 2))})
        assert native.tolist() == [5, 1]
        image, joints = fakes.planner.requests[0].slots[0].observations
        assert list(image.tensor.shape) == [32, 32, 3] and image.tensor.data == b"\7" * (32 * 32 * 3)
        assert list(joints.tensor.shape) == [4] and joints.tensor.data_type == 4
        policy({"joints": np.ones(4)})
        assert fakes.planner.requests[1].slots[0].belief == b"belief-1"
        with pytest.raises(DataError, match="unknown modalities camera: expected some of image, joints"):
            policy({"camera": np.ones(4)})
        with pytest.raises(DataError, match="expected a dictionary"):
            policy(np.ones(4))
    with pytest.raises(DataError, match="continuous 2.*discrete 3"):
        Policy(fakes.address, action_space=gymnasium.spaces.Discrete(3))
    fakes.planner.model.model_config = 'action { continuous { size: 2 } } modalities { name: "joints" vector { size: 4 } }'
    with Policy(fakes.address) as policy:
        assert policy(np.ones(4)).tolist() == [0.25, -0.5]


def test_policy_names_a_missing_snapshot():
    with pytest.raises(DataError, match="nowhere.safetensors: no such snapshot"):
        Policy("nowhere.safetensors")
