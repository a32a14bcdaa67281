"""Replay and planner services that do what a test says, over real gRPC on this machine."""

import collections
import concurrent.futures
import threading

import grpc

from orrery.planner.v1 import planner_pb2
from orrery.replay.v1 import replay_pb2


class FakeReplay:
    """Hands out `script`, then says that the run is complete; keeps what is appended. `refuse`: the episode whose chunks are
    refused. `break_after`: numbers of chunks after which streams break, one entry a stream; None: it lives. `answer_begin`:
    answers instead of the script, unless None."""

    def __init__(self):
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.script = collections.deque()
        self.task = "counting"
        self.begun = []
        self.begun_traceparents = []
        self.begin_errors = collections.deque()
        self.answer_begin = None
        self.chunks = []
        self.traceparents = []  # of the chunks
        self.alive = []
        self.refuse = 0
        self.break_after = collections.deque()
        self.hold_acknowledgements = False

    def begin_episode(self, request, context):
        if self.answer_begin is not None:
            return self.answer_begin(request, context)
        with self.lock:
            self.begun.append(request)
            self.begun_traceparents.append(dict(context.invocation_metadata()).get("traceparent", ""))
            if self.begin_errors:
                code, text = self.begin_errors.popleft()
                if code != grpc.StatusCode.OK:
                    context.abort(code, text)
            if not self.script:
                return replay_pb2.BeginEpisodeResponse(run_id="run-id", run_complete=True)
            episode_id, mode, seed, *task = self.script.popleft()
            return replay_pb2.BeginEpisodeResponse(run_id="run-id", episode_id=episode_id, mode=mode, seed=seed,
                                                   task=task[0] if task else self.task, lease_seconds=60)

    def append_chunks(self, requests, context):
        with self.lock:
            left = self.break_after.popleft() if self.break_after else None
        for request in requests:
            with self.lock:
                self.alive.append(tuple(request.alive_episode_ids))
                self.changed.notify_all()
                if not request.HasField("chunk"):
                    continue
                if left == 0:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
                if request.chunk.episode_id == self.refuse:
                    context.abort(grpc.StatusCode.ALREADY_EXISTS, "other contents")
                self.chunks.append(request.chunk)
                self.traceparents.append(request.traceparent)
                while self.hold_acknowledgements and context.is_active():
                    self.changed.wait(0.05)
            left = None if left is None else left - 1
            yield replay_pb2.AppendChunksResponse(episode_id=request.chunk.episode_id, first_row=request.chunk.first_row)

    def of(self, episode_id):
        with self.lock:
            return [chunk for chunk in self.chunks if chunk.episode_id == episode_id]


class FakePlanner:
    """Answers with `action` and the belief "belief-N" for the N-th request, or with queued errors first (OK entries let a
    request pass). The first `hangs` requests get no answer."""

    def __init__(self):
        self.lock = threading.Lock()
        self.action = (0.25, -0.5)
        self.errors = collections.deque()
        self.requests = []
        self.metadata = []
        self.model = planner_pb2.GetModelResponse(model="test")
        self.hold = threading.Event()
        self.hold.set()
        self.hangs = 0
        self.asked = threading.Event()

    def act(self, request, context):
        with self.lock:
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            number = len(self.requests)
            error = self.errors.popleft() if self.errors else (grpc.StatusCode.OK, "")
        self.asked.set()
        if number <= self.hangs:
            gone = threading.Event()
            if context.add_callback(gone.set):
                gone.wait()
        self.hold.wait()
        if error[0] != grpc.StatusCode.OK:
            context.abort(*error)
        response = planner_pb2.ActResponse()
        response.snapshot_version.generation = 1
        response.snapshot_version.counter = number
        if request.HasField("snapshot_version"):
            response.snapshot_version.CopyFrom(request.snapshot_version)
        for _ in request.slots:
            response.results.add(action=self.action, belief=f"belief-{number}".encode(), predicted_return=2.0)
        return response

    def get_model(self, request, context):
        return self.model


def start(replay, planner, port=0):
    """Serves both; the server and its port."""
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((
        grpc.method_handlers_generic_handler("orrery.replay.v1.ReplayService", {
            "BeginEpisode": grpc.unary_unary_rpc_method_handler(
                replay.begin_episode, replay_pb2.BeginEpisodeRequest.FromString,
                replay_pb2.BeginEpisodeResponse.SerializeToString),
            "AppendChunks": grpc.stream_stream_rpc_method_handler(
                replay.append_chunks, replay_pb2.AppendChunksRequest.FromString,
                replay_pb2.AppendChunksResponse.SerializeToString),
        }),
        grpc.method_handlers_generic_handler("orrery.planner.v1.PlannerService", {
            "Act": grpc.unary_unary_rpc_method_handler(
                planner.act, planner_pb2.ActRequest.FromString, planner_pb2.ActResponse.SerializeToString),
            "GetModel": grpc.unary_unary_rpc_method_handler(
                planner.get_model, planner_pb2.GetModelRequest.FromString, planner_pb2.GetModelResponse.SerializeToString),
        }),
    ))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, bound
