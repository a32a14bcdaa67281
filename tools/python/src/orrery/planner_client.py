"""Client of the planner service: observations in, actions out."""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf import text_format

from orrery.channel import Tls, make_channel, metadata, retry
from orrery.config.v1 import model_pb2
from orrery.errors import DataError, ServiceError
from orrery.planner.v1 import planner_pb2
from orrery.tensors import Observation, to_named_tensor

_SERVICE = "/orrery.planner.v1.PlannerService/"
# CANCELLED: by a planner that ended with the call in its hands; nobody here cancels. INTERNAL: of a device that was out of
# memory, or of a connection that broke in the middle, which a proxy may call UNKNOWN.
_RETRIED = frozenset({
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
})
# Seconds.
_SHORTEST_TRY = 5.0
# A planner answers these where a belief or the action before belongs to a model of another structure.
_OTHER_MODEL = frozenset({grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT})

Action = npt.NDArray[np.float32]


@dataclasses.dataclass
class Slot:
    """What the planner is asked for one agent. Without a belief an episode (or a new belief in one) begins, and the action
    before is not sent."""

    observation: Observation
    belief: bytes = b""
    previous_action: Action | None = None
    noise: float = 0.0
    seed: int | None = None
    valid_actions: Sequence[bool] = ()

    def to_proto(self) -> planner_pb2.Slot:
        slot = planner_pb2.Slot(
            observations=[to_named_tensor(name, array) for name, array in self.observation.items()],
            exploration_noise=self.noise, seed=self.seed, valid_actions=self.valid_actions)
        if self.belief:
            slot.belief = self.belief
            if self.previous_action is not None:
                slot.previous_action.extend(self.previous_action.tolist())
        return slot


@dataclasses.dataclass(frozen=True)
class Answer:
    """Action in [-1, 1] (discrete: one-hot), the belief for the next slot, the predicted return, and the version (generation,
    counter) of the snapshot that planned."""

    action: Action
    belief: bytes
    predicted_return: float
    version: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What a planner serves."""

    name: str
    version: tuple[int, int]
    model: model_pb2.Model


def default_client_id(kind: str) -> str:
    """Unique per process: kind, host and process number, at most 128 characters."""
    return f"{kind}-{socket.gethostname()[:100]}-{os.getpid()}"


class PlannerClient:
    """Thread-safe; calls about the same agent must not overlap. Beliefs are kept here, one per agent, from one `act` to the
    next; `reset` begins an episode. UNAVAILABLE (a planner that died, or has no snapshot yet), CANCELLED (one that ended
    meanwhile), RESOURCE_EXHAUSTED (its queue is full), INTERNAL (its device had no memory, or the connection broke) and UNKNOWN
    (a proxy's) are tried again with growing random waits until `timeout` seconds have passed. A try gets half of the time that
    is left, but at least 5 s, so that a planner that hangs leaves time for another one. A belief that a planner refuses,
    because a model of another structure has taken over, is begun anew. Other errors are ServiceError.

        with PlannerClient("127.0.0.1:7103") as planner:
            action = planner.act({"image": image})
    """

    def __init__(
        self,
        address: str,
        *,
        client_id: str | None = None,
        model: str = "",
        timeout: float = 30.0,
        tls: Tls | None = None,
        token: str | None = None,
    ):
        self._client_id = client_id or default_client_id("client")
        self._model = model
        self._timeout = timeout
        self._token = token
        self._channel = make_channel(address, tls)
        self._act = self._channel.unary_unary(
            _SERVICE + "Act", request_serializer=planner_pb2.ActRequest.SerializeToString,
            response_deserializer=planner_pb2.ActResponse.FromString)
        self._get_model = self._channel.unary_unary(
            _SERVICE + "GetModel", request_serializer=planner_pb2.GetModelRequest.SerializeToString,
            response_deserializer=planner_pb2.GetModelResponse.FromString)
        self._lock = threading.Lock()
        self._agents: dict[Hashable, tuple[bytes, Action]] = {}
        self._in_flight: set[Any] = set()

    def __enter__(self) -> PlannerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.cancel()
        self._channel.close()

    def cancel(self) -> None:
        """Ends running calls with CANCELLED. From any thread."""
        with self._lock:
            running = list(self._in_flight)
        for call in running:
            call.cancel()

    def model(self) -> ServedModel:
        """What is served now."""
        response = retry(
            self._timeout,
            lambda left: self._get_model(
                planner_pb2.GetModelRequest(model=self._model), timeout=left, metadata=metadata(self._token)),
            _RETRIED, _SHORTEST_TRY)
        version = response.snapshot_version
        try:
            parsed = text_format.Parse(response.model_config, model_pb2.Model())
        except text_format.ParseError as error:
            raise DataError(f"the planner's model_config: {error}") from error
        return ServedModel(response.model, (version.generation, version.counter), parsed)

    def act(
        self,
        observation: Observation,
        *,
        agent: Hashable = 0,
        noise: float = 0.0,
        seed: int | None = None,
        valid_actions: Sequence[bool] = (),
    ) -> Action:
        """The next action of one agent, as it should be executed; float32 [size], values in [-1, 1] or one-hot. Modalities
        that are missing from `observation` are unknown at this step."""
        return self.act_many({agent: observation}, noise=noise, seeds={} if seed is None else {agent: seed},
                             valid_actions={agent: valid_actions})[agent]

    def act_many(
        self,
        observations: Mapping[Hashable, Observation],
        *,
        noise: float = 0.0,
        seeds: Mapping[Hashable, int] | None = None,
        valid_actions: Mapping[Hashable, Sequence[bool]] | None = None,
    ) -> dict[Hashable, Action]:
        """Actions of several agents by one request."""
        slots = []
        with self._lock:
            for agent, observation in observations.items():
                belief, previous = self._agents.get(agent, (b"", None))
                slots.append(Slot(observation, belief, previous, noise, (seeds or {}).get(agent),
                                  (valid_actions or {}).get(agent, ())))
        answers = self.plan_anew_if_refused(slots, evaluation=noise == 0)
        with self._lock:
            for agent, answer in zip(observations, answers, strict=True):
                self._agents[agent] = (answer.belief, answer.action)
        return {agent: answer.action for agent, answer in zip(observations, answers, strict=True)}

    def executed(self, action: Action, *, agent: Hashable = 0) -> None:
        """Tells that another action than the planned one was executed."""
        with self._lock:
            if agent in self._agents:
                self._agents[agent] = (self._agents[agent][0], np.asarray(action, np.float32))

    def reset(self, *agents: Hashable) -> None:
        """Forgets the beliefs of these agents (of all, where none is named): their next `act` begins an episode."""
        with self._lock:
            if not agents:
                self._agents.clear()
            for agent in agents:
                self._agents.pop(agent, None)

    def plan_anew_if_refused(self, slots: Sequence[Slot], *, evaluation: bool) -> list[Answer]:
        """`plan`, and once more without beliefs where the planner refused one."""
        try:
            return self.plan(slots, evaluation=evaluation)
        except ServiceError as error:
            if error.code not in _OTHER_MODEL or not any(slot.belief for slot in slots):
                raise
        return self.plan([dataclasses.replace(slot, belief=b"", previous_action=None) for slot in slots], evaluation=evaluation)

    def plan(
        self, slots: Sequence[Slot], *, evaluation: bool, timeout: float | None = None, tries: bool = True,
        version: tuple[int, int] = (0, 0), stop: threading.Event | None = None,
    ) -> list[Answer]:
        """One request as it is, beliefs and all: for callers that keep them. `tries` False: sent once. `version`: the
        snapshot to plan with; (0, 0), or one that is not kept any more: the newest. `stop` set before `cancel` is called: no
        call is missed by it."""
        priority = planner_pb2.EVALUATION if evaluation else planner_pb2.EXPLORATION
        request = planner_pb2.ActRequest(
            model=self._model, client_id=self._client_id, priority=priority, slots=[slot.to_proto() for slot in slots])
        if version != (0, 0):
            request.snapshot_version.generation, request.snapshot_version.counter = version
        response = retry(self._timeout if timeout is None else timeout, lambda left: self._call(request, left, stop),
                         _RETRIED if tries else frozenset(), _SHORTEST_TRY if tries else math.inf)
        if len(response.results) != len(slots):
            raise ServiceError(grpc.StatusCode.DATA_LOSS,
                               f"the planner answered {len(response.results)} slots, expected {len(slots)}")
        used = (response.snapshot_version.generation, response.snapshot_version.counter)
        return [Answer(np.array(result.action, np.float32), result.belief, result.predicted_return, used)
                for result in response.results]

    def _call(
        self, request: planner_pb2.ActRequest, timeout: float, stop: threading.Event | None
    ) -> planner_pb2.ActResponse:
        with self._lock:
            if stop is not None and stop.is_set():
                raise ServiceError(grpc.StatusCode.CANCELLED, "stopped")
            call = self._act.future(request, timeout=timeout, metadata=metadata(self._token))
            self._in_flight.add(call)
        try:
            response: planner_pb2.ActResponse = call.result()
            return response
        except grpc.FutureCancelledError as error:
            raise ServiceError(grpc.StatusCode.CANCELLED, "the call was cancelled") from error
        finally:
            with self._lock:
                self._in_flight.discard(call)
