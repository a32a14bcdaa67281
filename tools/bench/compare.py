#!/usr/bin/env python3
"""Runs Orrery's benchmarks and other programs' in turns on one machine, and prints the ratios: above 1, Orrery is faster.

    tools/bench/compare.py [PEER …] [--orrery=BINARY] [--rounds=3]

PEER (default: pytorch):
  pytorch     plans and updates of SCRIPT (--reference=SCRIPT), plain PyTorch at PlaNet's sizes with 6 actions. SCRIPT takes
              --dtype, --plans and --skip-update and prints one object per line as `orrery bench --json` does:
              {"what": "plan", "batch": 1, "dtype": "float32", "seconds": 0.96}.
  torchrl     plans of TorchRL's CEMPlanner with a model of the same sizes (peer_torchrl.py says what differs).
  reverb      rows into and batches out of dm-reverb, against orrery-replay; both servers are processes of their own
              (peer_reverb.py says what differs).
  dm_control  steps and pictures of dm_control's Python, against the same tasks of `orrery bench env`.

Each round runs every side once; a figure is the median over the rounds. All use every processor, but for --env_threads. Each
peer has a virtual environment of its own, for their dependencies contradict each other:

    python3.11 -m venv torch-env      && torch-env/bin/pip install torch==2.11.0 numpy torchrl==0.14.1
    python3.11 -m venv reverb-env     && reverb-env/bin/pip install 'dm-reverb[tensorflow]==0.14.0' 'numpy<2'
    python3.11 -m venv dm_control-env && dm_control-env/bin/pip install dm_control==1.0.50 mujoco==3.17.0
    tools/bench/compare.py torchrl reverb dm_control --python-torch=torch-env/bin/python \\
        --python-reverb=reverb-env/bin/python --python-dm_control=dm_control-env/bin/python
"""
import argparse
import contextlib
import json
import os
import pathlib
import random
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent

# What both sides of the replay comparison hold: 64x64x3 pictures of this task, 50 rows a chunk, batches of 50 x 50 rows.
REPLAY_TASK = "cartpole_swingup"
REPLAY_ROWS_KEPT = 100_000
REPLAY_RUN = f"compare-{os.getpid()}"
REPLAY_CONFIG = f"""
name: "{REPLAY_RUN}"
environment {{ task: "{REPLAY_TASK}" }}
collection {{ seed_episodes: 100000 }}
learning {{ schedule: CONCURRENT batch_size: 50 sequence_length: 50 }}
replay {{ chunk_rows: 50 max_rows: {REPLAY_ROWS_KEPT} limiter {{ tolerance: 1e12 }} }}
"""


def lines(command, **environment):
    """The JSON objects that a command prints."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        sys.exit(f"compare.py: {' '.join(str(word) for word in command)}: exit code {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def medians(rounds, sides, figure):
    """Medians by (side, key). `sides`: functions that return objects, by name; `figure` makes (key, value) of an object."""
    values = defaultdict(list)
    for _ in range(rounds):
        for side, run in sides.items():
            for result in run():
                key, value = figure(result)
                values[(side, key)].append(value)
    return {key: statistics.median(measured) for key, measured in values.items()}


def say(**result):
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    print(json.dumps(rounded), flush=True)


def pytorch(args):
    """Plans and updates in float32 and bfloat16, each of ours against each of theirs."""
    measured = {}
    for precision in ("float32", "bfloat16"):
        skip = ["--skip-update"] if args.skip_update else []
        with_update = not args.skip_update and precision == "float32"

        def ours():
            results = lines([args.orrery, "bench", "planner", "--json", f"--batch={args.batches}", f"--precision={precision}"])
            if with_update:
                results += lines([args.orrery, "bench", "learner", "--json", "--warm_up=1", "--repeats=3"])
            return results

        def theirs():
            return lines([args.python_torch, args.reference, f"--dtype={precision}", f"--plans={args.batches}"] + skip)

        measured[precision] = medians(args.rounds, {"pytorch": theirs, "orrery": ours},
                                      lambda result: ((result["what"], result["batch"]), result["seconds"]))
    for precision, seconds in measured.items():
        for (side, (what, batch)), value in seconds.items():
            for peer_precision, peers in measured.items():
                peer = peers.get(("pytorch", (what, batch)))
                if side == "orrery" and peer is not None:
                    say(what=what, batch=batch, orrery=precision, seconds=value, pytorch=peer_precision, pytorch_seconds=peer,
                        ratio=peer / value)


def torchrl(args):
    """Plans in float32."""
    sides = {
        "torchrl": lambda: lines([args.python_torch, HERE / "peer_torchrl.py", f"--plans={args.batches}"]),
        "orrery": lambda: lines([args.orrery, "bench", "planner", "--json", f"--batch={args.batches}", "--precision=float32"]),
    }
    measured = medians(args.rounds, sides, lambda result: ((result["what"], result["batch"]), result["seconds"]))
    for (side, (what, batch)), value in measured.items():
        if side == "orrery":
            peer = measured[("torchrl", (what, batch))]
            say(what=what, batch=batch, seconds=value, torchrl_seconds=peer, ratio=peer / value)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(command, port, **environment):
    """A server process, from when its port takes connections."""
    server = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    try:
        for _ in range(600):
            if server.poll() is not None:
                sys.exit(f"compare.py: {command[0]} ended with exit code {server.returncode}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            sys.exit(f"compare.py: {command[0]} does not listen on port {port}")
        yield
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def write_frames(orrery, folder):
    """500 rendered pictures of the replay task under random actions, [500, 64, 64, 3] uint8, as a raw file."""
    steps = 499
    header = json.dumps({"action": {"dtype": "F64", "shape": [steps, 1], "data_offsets": [0, steps * 8]}}).encode()
    actions = struct.pack(f"<{steps}d", *(random.Random(1).uniform(-1, 1) for _ in range(steps)))
    (folder / "actions.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + actions)
    subprocess.run([str(orrery), "inspect", "rollout", f"--env={REPLAY_TASK}", f"--input={folder / 'actions.safetensors'}",
                    f"--out={folder / 'rollout.safetensors'}", "--quality=fast"], check=True, stdout=subprocess.DEVNULL)
    file = (folder / "rollout.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", file)
    image = json.loads(file[8:8 + size])["image"]
    if image["dtype"] != "U8" or image["shape"] != [steps + 1, 64, 64, 3]:
        sys.exit(f"compare.py: image of the rollout is {image['dtype']} {image['shape']}: expected U8 [{steps + 1}, 64, 64, 3]")
    begin, end = image["data_offsets"]
    (folder / "frames.bin").write_bytes(file[8 + size + begin:8 + size + end])
    return folder / "frames.bin"


def reverb(args):
    """Rows and batches per second; ours mirrored by the learner, and sampled on the server as chunks and as decoded rows."""
    pairs = {"append": "append", "append_encoded": "append", "sample_mirrored": "sample", "sample_remote": "sample",
             "sample_remote_decoded": "sample"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        frames = write_frames(args.orrery, folder)
        config = folder / "compare.textproto"
        config.write_text(REPLAY_CONFIG)
        sizes = [f"--append_rows={args.append_rows}", f"--batches={args.sample_batches}", "--warm_up=1", "--repeats=3"]

        def ours():
            port = free_port()
            command = [args.orrery.parent / "orrery-replay", f"--config={config}", f"--store={args.store}",
                       f"--listen=127.0.0.1:{port}", f"--health_listen=127.0.0.1:{free_port()}",
                       f"--metrics_listen=127.0.0.1:{free_port()}", "--log_level=warning"]
            with serving(command, port):
                results = lines([args.orrery, "bench", "replay", "--json", f"--replay=127.0.0.1:{port}",
                                 f"--config={config}", f"--only={','.join(pairs)}", *sizes])
            if args.store != "memory:":
                lines([args.orrery, "replay", "delete", f"--store={args.store}", f"--run={REPLAY_RUN}", "--yes"])
            return results

        def theirs():
            port = free_port()
            script = [args.python_reverb, HERE / "peer_reverb.py", f"--port={port}", f"--max_rows={REPLAY_ROWS_KEPT}"]
            quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
            with serving(script + ["--serve"], port, **quiet):
                return lines(script + [f"--frames={frames}"] + sizes, **quiet)

        def figure(result):
            return result["what"], result.get("rows_per_second") or result.get("batches_per_second")

        measured = medians(args.rounds, {"reverb": theirs, "orrery": ours}, figure)
    for what, peer in pairs.items():
        ours, theirs = measured[("orrery", what)], measured[("reverb", peer)]
        unit = "rows_per_second" if peer == "append" else "batches_per_second"
        say(what=what, store=args.store.split(":")[0], **{unit: ours, f"reverb_{unit}": theirs}, ratio=ours / theirs)


def dm_control(args):
    """Steps and pictures per second on --env_threads threads of Mesa's (a step takes one)."""
    mesa = {"LP_NUM_THREADS": "0" if args.env_threads == 1 else str(args.env_threads), "MUJOCO_GL": "osmesa"}

    def ours(quality):
        results = lines([args.orrery, "bench", "env", "--json", f"--task={args.tasks}", f"--quality={quality}",
                         f"--threads={args.env_threads}"])
        return [result for result in results if result["what"] == "render" or result["threads"] == 1]

    sides = {
        "dm_control": lambda: lines([args.python_dm_control, HERE / "peer_dm_control.py", f"--tasks={args.tasks}"], **mesa),
        "fast": lambda: ours("fast"),
        "reference": lambda: ours("reference"),
    }
    measured = medians(args.rounds, sides, lambda result: (
        (result["what"], result["task"]), result.get("frames_per_second") or result.get("steps_per_second")))
    for (side, (what, task)), value in measured.items():
        if side == "dm_control" or (what == "step" and side == "reference"):  # a step draws nothing
            continue
        peer = measured[("dm_control", (what, task))]
        quality = {"quality": side} if what == "render" else {}
        say(what=what, task=task, **quality, threads=args.env_threads if what == "render" else 1, per_second=value,
            dm_control_per_second=peer, ratio=value / peer)


PEERS = {"pytorch": pytorch, "torchrl": torchrl, "reverb": reverb, "dm_control": dm_control}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", metavar="PEER", nargs="*", help="of " + ", ".join(PEERS))
    parser.add_argument("--orrery", type=pathlib.Path, default=ROOT / "build/bin/orrery",
                        help="binary; orrery-replay lies beside it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", metavar="SCRIPT", help="for pytorch")
    parser.add_argument("--python-torch", metavar="PYTHON", default=sys.executable, help="interpreter with torch (and torchrl)")
    parser.add_argument("--python-reverb", metavar="PYTHON", help="interpreter with dm-reverb")
    parser.add_argument("--python-dm_control", metavar="PYTHON", help="interpreter with dm_control")
    parser.add_argument("--batches", default="1,8", help="agents planned for together (pytorch, torchrl)")
    parser.add_argument("--skip-update", action="store_true", help="plans only (pytorch)")
    parser.add_argument("--store", default="memory:",
                        help="where orrery-replay keeps its data (reverb), for example redis://127.0.0.1:6379")
    parser.add_argument("--append_rows", type=int, default=20000, help="rows of one measured call (reverb)")
    parser.add_argument("--sample_batches", type=int, default=20, help="batches of one measured call (reverb)")
    parser.add_argument("--tasks", default=REPLAY_TASK, help="separated by commas (dm_control)")
    parser.add_argument("--env_threads", type=int, default=1, help="threads of Mesa's that draw (dm_control)")
    args = parser.parse_args()
    peers = args.peers or ["pytorch"]
    needed = {"pytorch": ("reference",), "torchrl": (), "reverb": ("python_reverb",), "dm_control": ("python_dm_control",)}
    flags = {"reference": "--reference", "python_reverb": "--python-reverb", "python_dm_control": "--python-dm_control"}
    for peer in peers:
        if peer not in PEERS:
            parser.error(f"unknown peer {peer}: expected {', '.join(PEERS)}")
        for name in needed[peer]:
            if getattr(args, name) is None:
                parser.error(f"{peer} needs {flags[name]}")
    for peer in peers:
        PEERS[peer](args)


if __name__ == "__main__":
    main()
