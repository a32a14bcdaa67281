#!/usr/bin/env python3
"""Clients of an earlier release against today's services.

    tests/compatibility_test.py [--bin_dir=build/bin] [--ref=COMMIT | --present]

Takes proto/ of the newest tag vX.Y.Z before this commit (of --ref; with --present the working tree's own) and speaks by those
files alone with today's replay, learner and planner: health, episodes, chunks, samples, snapshots, actions. Before that it
compares the files with today's: nothing may be gone or mean something else on the wire. --present also changes the files in
ways that must be found.

Exit status 0; 1 with the reason; 77 (skipped) where there is no such tag, no history, or no Python package of this repository
(tools/python/test.sh makes .cache/python, whose interpreter is taken).
"""
import argparse
import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
SKIPPED = 77
PATIENCE = 120  # seconds until something that must happen is said not to
RUN = "compatibility"
ROWS = 24
CONFIG = f"""
name: "{RUN}"
environment {{ task: "point_pixels" image_size: 32 }}
model {{
  deterministic_size: 16 stochastic_size: 4 hidden_size: 16
  modalities {{ name: "image" image {{ height: 32 width: 32 channels: 3 depth: 4 }} }}
  reward {{ layers: 1 hidden_size: 16 }}
}}
planner {{ cem {{ horizon: 4 iterations: 2 candidates: 32 elites: 4 }} }}
learning {{ schedule: CONCURRENT batch_size: 4 sequence_length: 8 }}
replay {{ limiter {{ updates_per_row: 1e-9 }} }}
"""


class Failure(Exception):
    pass


class Skip(Exception):
    pass


def require(condition, message):
    if not condition:
        raise Failure(message)


def import_packages():
    """Starts this script anew with the package's interpreter where that of the caller lacks it."""
    global grpc, numpy, orrery, descriptor_pb2, descriptor_pool, message_factory
    try:
        import grpc
        import numpy
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

        import orrery
    except ImportError as error:
        venv = pathlib.Path(os.environ.get("ORRERY_PYTHON_VENV", ROOT / ".cache" / "python"))
        if pathlib.Path(sys.prefix) == venv or not (venv / "bin" / "python").exists():
            raise Skip(f"{sys.executable}: {error}; run tools/python/test.sh first") from error
        os.execv(venv / "bin" / "python", [str(venv / "bin" / "python"), *sys.argv])


# The files of a release.


def git(*arguments, failure=Skip):
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise Skip("git is not installed") from error
    if done.returncode != 0:
        raise failure(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def previous_release():
    # Not this commit's own tag: on the day of a release it is compared with the one before.
    tags = git("tag", "--list", "v*", "--no-contains", "HEAD", "--sort=-v:refname").decode().split()
    releases = [tag for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    if not releases:
        raise Skip("there is no tag vX.Y.Z before this commit (a shallow clone has none: fetch with --tags --unshallow)")
    return releases[0]


def checked_out(ref, folder):
    """proto/ of that commit, in `folder`."""
    archive = git("archive", "--format=tar", ref, "proto", failure=Failure)
    subprocess.run(["tar", "--extract", f"--directory={folder}"], input=archive, check=True)
    return folder / "proto"


def compiled(protos):
    """The files of a folder as one FileDescriptorSet, each after those it imports."""
    files = sorted(protos.glob("orrery/**/*.proto"))
    require(files, f"{protos}: no .proto files in orrery/")
    protoc = shutil.which("protoc")
    require(protoc is not None, "protoc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "descriptors"
        done = subprocess.run([protoc, f"-I{protos}", "--include_imports", f"--descriptor_set_out={out}", *files], check=False)
        require(done.returncode == 0, f"protoc failed on {protos}")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())


# What must not change. Numbers, types and presence are the wire; names are JSON and text, in which configurations are kept.


def messages_of(scope, prefix):
    for message in scope:
        yield f"{prefix}.{message.name}", message
        yield from messages_of(message.nested_type, f"{prefix}.{message.name}")


def enums_of(file):
    yield from ((f"{file.package}.{enum.name}", enum) for enum in file.enum_type)
    for name, message in messages_of(file.message_type, file.package):
        yield from ((f"{name}.{enum.name}", enum) for enum in message.enum_type)


def field_shape(field):
    return field.name, field.type, field.label, field.type_name, field.HasField("oneof_index")


def gone(old, new, name, number):
    """Whether an element was taken away without leaving its name and number reserved."""
    numbers = any(span.start <= number < span.end + isinstance(new, descriptor_pb2.EnumDescriptorProto)
                  for span in new.reserved_range)
    return not (numbers and name in new.reserved_name)


def broken_elements(kind, old, new, elements, shape):
    """`elements` of two messages or enums, by number."""
    now = {element.number: element for element in getattr(new, elements)}
    for element in getattr(old, elements):
        if element.number not in now:
            if gone(old, new, element.name, element.number):
                yield f"{kind}: {element.name} = {element.number} is gone, and not reserved"
        elif shape(element) != shape(now[element.number]):
            yield f"{kind}: {element.name} = {element.number} was {shape(element)}, now it is {shape(now[element.number])}"


def breaking_changes(old, new):
    """What clients made from the FileDescriptorSet `old` cannot know about services made from `new`."""
    new_messages = {name: m for file in new.file for name, m in messages_of(file.message_type, file.package)}
    new_enums = {name: enum for file in new.file for name, enum in enums_of(file)}
    new_services = {f"{file.package}.{service.name}": {m.name: m for m in service.method}
                    for file in new.file for service in file.service}
    for file in old.file:
        for name, message in messages_of(file.message_type, file.package):
            if name not in new_messages:
                yield f"message {name} is gone"
            else:
                yield from broken_elements(f"message {name}", message, new_messages[name], "field", field_shape)
        for name, enum in enums_of(file):
            if name not in new_enums:
                yield f"enum {name} is gone"
            else:
                yield from broken_elements(f"enum {name}", enum, new_enums[name], "value", lambda value: (value.name,))
        for service in file.service:
            methods = new_services.get(f"{file.package}.{service.name}", {})
            for method in service.method:
                if methods.get(method.name) != method:
                    yield f"service {file.package}.{service.name}: {method.name} is gone, or takes or gives something else"


def check_that_changes_are_found(present):
    """Each of these must be found, and alone."""
    def change(edit):
        changed = descriptor_pb2.FileDescriptorSet()
        changed.CopyFrom(present)
        file = next(file for file in changed.file if file.name == "orrery/planner/v1/planner.proto")
        edit(file, next(message for message in file.message_type if message.name == "Slot"))
        return list(breaking_changes(present, changed))

    def drop(elements, index):
        del elements[index]

    def reserve(slot):
        slot.reserved_name.append(slot.field[0].name)
        slot.reserved_range.add(start=slot.field[0].number, end=slot.field[0].number + 1)
        del slot.field[0]

    require(change(lambda file, slot: None) == [], "a change was found where there is none")
    require(change(lambda file, slot: reserve(slot)) == [], "a field whose name and number are reserved is said to be broken")
    require(change(lambda file, slot: slot.field.add(name="new", number=99, type=5, label=1)) == [], "a new field breaks")
    expected = {
        "belief = 3 is gone": lambda file, slot: drop(slot.field, 2),
        "belief = 3 was": lambda file, slot: setattr(slot.field[2], "type", descriptor_pb2.FieldDescriptorProto.TYPE_STRING),
        "now it is ('faith'": lambda file, slot: setattr(slot.field[2], "name", "faith"),
        "observations = 1 was": lambda file, slot: setattr(slot.field[0], "label", 1),
        "seed = 5 was": lambda file, slot: slot.field[4].ClearField("oneof_index"),
        "EVALUATION = 2 is gone": lambda file, slot: drop(file.enum_type[0].value, 2),
        "message orrery.planner.v1.ResumeRequest is gone": lambda file, slot: drop(file.message_type, [
            message.name for message in file.message_type].index("ResumeRequest")),
        "Act is gone": lambda file, slot: drop(file.service[0].method, 0),
        "Act is gone, or takes": lambda file, slot: setattr(file.service[0].method[0], "server_streaming", True),
    }
    for what, edit in expected.items():
        found = change(edit)
        require(len(found) == 1 and what in found[0], f"a change that must be found as '{what}' gave {found}")


# The session.


class Client:
    """Calls one service by the descriptors of a release."""

    def __init__(self, pool, service, channel):
        self._service = pool.FindServiceByName(service)
        self._channel = channel

    def __call__(self, name, *requests, **fields):
        """The answer, or the answers of a stream as an iterator. Requests of a stream: an iterator, or dictionaries."""
        method = self._service.methods_by_name.get(name)
        require(method is not None, f"{self._service.full_name} of that release has no {name}, which this test calls")
        take, give = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        kind = (f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}")
        stub = getattr(self._channel, kind)(f"/{self._service.full_name}/{name}", request_serializer=take.SerializeToString,
                                            response_deserializer=give.FromString)
        if not method.client_streaming:
            return stub(take(**fields), timeout=PATIENCE)
        return stub((take(**request) for request in requests[0]), timeout=PATIENCE)


def eventually(what, attempt):
    """The first result of `attempt` that is true; NOT_FOUND and UNAVAILABLE are waited out."""
    deadline = time.monotonic() + PATIENCE
    last = None
    while time.monotonic() < deadline:
        try:
            last = attempt()
            if last:
                return last
        except grpc.RpcError as error:
            last = error
            require(error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE), f"{what}: {error}")
        time.sleep(0.05)
    raise Failure(f"{what}: not within {PATIENCE} s, last {last}")


def assembled(parts):
    """Version and bytes of a snapshot from its parts."""
    data = b""
    for part in parts:
        require(part.offset == len(data), f"part of a snapshot at {part.offset}, expected {len(data)}")
        data += part.data
        if len(data) >= part.total_bytes:
            break
    require(len(data) == part.total_bytes and zlib.crc32(data) == part.checksum, "a snapshot is damaged")
    return (part.version.generation, part.version.counter), data


def play_an_episode(replay, specification):
    begun = replay("BeginEpisode", run=RUN, actor_id="old", specification_hash=specification.hash())
    require(begun.run_id and begun.mode == 1 and begun.task == "point_pixels", f"BeginEpisode gave {begun}")
    flags = numpy.zeros(ROWS, numpy.uint8)
    first = flags.copy()
    first[0] = 1
    images = numpy.random.default_rng(1).integers(0, 256, (ROWS, 32, 32, 3), numpy.uint8)
    payload = orrery.encode_rows({
        "image": images, "action": numpy.zeros((ROWS, 2), numpy.float32), "reward": numpy.ones(ROWS, numpy.float32),
        "is_first": first, "is_terminal": flags})
    chunk = {"run_id": begun.run_id, "episode_id": begun.episode_id, "rows": ROWS, "mode": 1, "end": 3,
             "specification_hash": specification.hash(), "reward_sum": float(ROWS), "payload": payload}
    kept = list(replay("AppendChunks", iter([{"run": RUN, "chunk": chunk}])))
    require([(k.episode_id, k.first_row) for k in kept] == [(begun.episode_id, 0)], f"AppendChunks acknowledged {kept}")
    return begun.episode_id, payload, images


def check_replay(replay, specification):
    episode_id, payload, images = play_an_episode(replay, specification)
    listed = eventually("ListEpisodes", lambda: replay("ListEpisodes", run=RUN).episodes)
    require([(e.episode_id, e.rows, e.end) for e in listed] == [(episode_id, ROWS, 3)], f"ListEpisodes gave {listed}")
    require(listed[0].reward_sum == ROWS, f"the return of the episode is {listed[0].reward_sum}")
    chunks = [answer.chunk for answer in replay("GetEpisode", run=RUN, episode_id=episode_id)]
    require([chunk.payload for chunk in chunks] == [payload], "GetEpisode gave other rows than were sent")
    watch = replay("WatchChunks", run=RUN)
    seen = next(answer.appended for answer in watch if answer.HasField("appended"))
    watch.cancel()
    require(seen.payload == payload, "WatchChunks gave other rows than were sent")
    require(replay("GetStats", run=RUN).rows == ROWS, "GetStats counts other rows than were sent")
    fields = {}
    for answer in replay("SampleSequences", run=RUN, batch_size=2, sequence_length=ROWS, batches=1, seed=1):
        fields.setdefault(answer.field.name, b"")
        fields[answer.field.name] += answer.field.tensor.data
    # Batches lie as [time, batch, …]; the only sequence of so many rows is the whole episode.
    sampled = numpy.frombuffer(fields["image"], numpy.uint8).size
    require(sampled == 2 * images.size, f"SampleSequences gave {sampled} bytes of pictures, expected {2 * images.size}")


def check_learner(learner, replay):
    stored = eventually("GetSnapshot", lambda: assembled(a.part for a in replay("GetSnapshot", run=RUN)))
    done = threading.Event()

    def subscription():
        yield {"run": RUN, "planner_id": "old"}
        done.wait(PATIENCE)

    stream = learner("SubscribeSnapshots", subscription())
    pushed = assembled(answer.part for answer in stream)
    done.set()
    stream.cancel()
    require(pushed == stored, f"the learner pushed snapshot {pushed[0]}, replay keeps {stored[0]}")
    require(learner("GetStatus").run == RUN, "GetStatus names another run")
    return stored[0]


def check_planner(planner, version):
    model = eventually("GetModel", lambda: planner("GetModel"))
    require(model.model == RUN and "32" in model.model_config, f"GetModel gave {model}")
    picture = {"data_type": 1, "shape": [32, 32, 3], "data": bytes(32 * 32 * 3)}
    slot = {"observations": [{"name": "image", "tensor": picture}], "seed": 7}
    answers = []
    for _ in range(2):
        answer = planner("Act", client_id="old", priority=2, slots=[slot])
        answers.append(answer.results[0])
        require((answer.snapshot_version.generation, answer.snapshot_version.counter) == version,
                f"snapshot {answer.snapshot_version} answered, expected {version}")
        require(len(answers[-1].action) == 2 and all(-1 <= a <= 1 for a in answers[-1].action), f"Act gave {answer}")
        slot = {**slot, "belief": answer.results[0].belief, "previous_action": answer.results[0].action}
    require(answers[0].belief != answers[1].belief, "the belief did not change")


def speak(descriptors):
    """A client of that release with today's services."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptors.file:
        pool.Add(file)
    specification = orrery.EnvironmentSpec((orrery.TensorSpec("image", "uint8", (32, 32, 3)),), orrery.ActionSpec(2))
    with contextlib.ExitStack() as stack:
        services = stack.enter_context(orrery.Services(orrery.Experiment.parse(CONFIG), threads=1))
        clients = []
        for name, address in (("replay", services.replay), ("learner", services.learner), ("planner", services.planner)):
            channel = stack.enter_context(grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]))
            health = channel.unary_unary("/grpc.health.v1.Health/Check")
            eventually(f"health of {name}", lambda health=health: health(b"", timeout=PATIENCE) == b"\x08\x01")
            clients.append(Client(pool, f"orrery.{name}.v1.{name.capitalize()}Service", channel))
        replay, learner, planner = clients
        try:
            check_replay(replay, specification)
            check_planner(planner, check_learner(learner, replay))
        except grpc.RpcError as error:
            raise Failure(f"a call failed: {error}") from error
        services.check()


def run(flags):
    import_packages()
    os.environ["ORRERY_BIN_DIR"] = str(flags.bin_dir)
    present = compiled(ROOT / "proto")
    if flags.present:
        check_that_changes_are_found(present)
        speak(present)
        print("a client of the working tree's own protos works, and changes are found")
        return
    ref = flags.ref or previous_release()
    with tempfile.TemporaryDirectory() as folder:
        old = compiled(checked_out(ref, pathlib.Path(folder)))
    changes = list(breaking_changes(old, present))
    require(not changes, f"since {ref}:\n  " + "\n  ".join(changes))
    speak(old)
    print(f"a client of {ref} works with today's services, and nothing of its {len(old.file)} files is gone")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin_dir", type=pathlib.Path, default=ROOT / "build" / "bin", help="where the programs are")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ref", help="commit or tag whose protos are taken instead of the newest release's")
    which.add_argument("--present", action="store_true", help="the working tree's own protos")
    try:
        run(parser.parse_args())
    except Skip as reason:
        print(f"COMPATIBILITY WAS NOT TESTED: {reason}")
        return SKIPPED
    except Failure as failure:
        print(f"compatibility_test: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
