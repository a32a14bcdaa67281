#!/usr/bin/env python3
"""The part of gpu_check.sh that compares: losses, gradients and plans of both devices, then times beside PyTorch's.

Prints one JSON object per line. {"check": …}: the largest difference over the largest magnitude of any tensor on one device
from its golden value (tests/golden). {"what": "plan" | "update", …}: seconds of Orrery and of PyTorch, and their ratio.
"""
import argparse
import json
import os
import pathlib
import shlex
import struct
import subprocess
import sys
import tempfile
from array import array

MODEL = """deterministic_size: {D} stochastic_size: {S} hidden_size: {U}
activation: {activation} conv_activation: {conv_activation} min_std: {min_std} action {{ continuous {{ size: {A} }} }}
modalities {{ name: "image" image {{ height: 64 width: 64 channels: 3 depth: {depth} }} }}
reward {{ layers: {reward_layers} hidden_size: {reward_hidden} }}
objective {{ free_nats: {free_nats} reward_scale: {reward_scale} kl_scale: {kl_scale}
  overshooting {{ distance: {distance} }} }}"""
PLANNER = "cem {{ horizon: {H} iterations: {I} candidates: {J} elites: {top} }}"
# TensorFloat-32 is off while devices are compared; what is left is the order of sums.
TOLERANCE = 1e-3


def load(path):
    """Tensors (dtype, shape, bytes) by name, and the metadata of a safetensors file."""
    data = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    metadata = header.pop("__metadata__", {})
    begin = 8 + size
    return {name: (entry["dtype"], entry["shape"], data[begin + entry["data_offsets"][0]:begin + entry["data_offsets"][1]])
            for name, entry in header.items()}, metadata


def save(path, tensors, metadata=None):
    header, offset = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def part(tensors, prefix, names=None):
    """Tensors under a prefix, without it."""
    found = {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: found[name] for name in names} if names else found


def difference(actual, expected):
    """Largest difference over the largest magnitude expected."""
    if actual[0] != "F32" or actual[1] != expected[1]:
        return float("inf")
    ours, theirs = array("f", actual[2]), array("f", expected[2])
    scale = max(map(abs, theirs), default=0) or 1
    worst = max((abs(x - y) for x, y in zip(ours, theirs)), default=0)
    return worst / scale if worst == worst else float("inf")


def output(run, *arguments, **environment):
    command = [*run, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        sys.exit(f"gpu_check: error: {shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def takes(run, command, flag):
    return flag in output(run, "orrery", *command, "--help")


def compare_devices(run, golden):
    """Whether both devices give the golden losses, gradients and plans."""
    tensors, sizes = load(golden)
    sizes = {**sizes, "activation": sizes["activation"].upper(), "conv_activation": sizes["conv_activation"].upper()}
    agrees = True
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        save(path("snapshot"), part(tensors, "weight/"),
             {"orrery.model": MODEL.format(**sizes), "orrery.planner": PLANNER.format(**sizes)})
        save(path("batch"), part(tensors, "batch/"))
        save(path("noise"), part(tensors, "noise/", ["posterior", "overshooting"]))
        save(path("plan_noise"), part(tensors, "noise/", ["plan_action", "plan_state"]))
        save(path("state"), part(tensors, "plan/", ["deter", "stoch"]))
        for device in ("cpu", "cuda"):
            common = ["--snapshot", path("snapshot"), "--out", path("out"), "--device", device]
            output(run, "orrery", "inspect", "loss", *common, "--batch", path("batch"), "--noise", path("noise"), "--gradients",
                   NVIDIA_TF32_OVERRIDE="0")
            found = load(path("out"))[0]
            output(run, "orrery", "inspect", "plan", *common, "--state", path("state"), "--noise", path("plan_noise"),
                   NVIDIA_TF32_OVERRIDE="0")
            found.update(load(path("out"))[0])
            expected = {**part(tensors, "expect/"),
                        **{"grad." + name: value for name, value in part(tensors, "expect_grad/").items()}}
            worst = {name: difference(found[name], value) if name in found else float("inf")
                     for name, value in expected.items()}
            name = max(worst, key=worst.get)
            ok = worst[name] <= TOLERANCE
            agrees = agrees and ok
            print(json.dumps({"check": "golden", "device": device, "tensors": len(worst), "worst": name,
                              "difference": worst[name], "tolerance": TOLERANCE, "ok": ok}), flush=True)
    return agrees


def results(command):
    return [json.loads(line) for line in command.splitlines() if line.startswith("{")]


def measure(run, args, precision):
    """Seconds by (side, what, batch)."""
    repeats = [f"--repeats={args.repeats}", "--warm_up=5", "--device=cuda", "--json", f"--precision={precision}"]
    ours = results(output(run, "orrery", "bench", "planner", *repeats, f"--batch={args.batches}"))
    if takes(run, ["bench", "learner"], "--precision"):
        ours += results(output(run, "orrery", "bench", "learner", *repeats))
    elif precision == "float32":
        ours += results(output(run, "orrery", "bench", "learner", *repeats[:-1]))
    theirs = []
    if args.reference:
        theirs = results(output([sys.executable], args.reference, "--device=cuda", f"--dtype={precision}",
                                f"--plans={args.batches}", f"--repeats={args.repeats}"))
    return {(side, result["what"], result["batch"]): result["seconds"]
            for side, found in (("orrery", ours), ("pytorch", theirs)) for result in found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="what starts a program: a command before its name")
    parser.add_argument("--golden", required=True)
    parser.add_argument("--reference")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    run = shlex.split(args.run)
    agrees = True
    if takes(run, ["inspect", "loss"], "--device"):
        agrees = compare_devices(run, args.golden)
    else:
        print("gpu_check: this build's inspect has no --device: golden values were not compared", file=sys.stderr)
    for precision in ("float32", "bfloat16"):
        seconds = measure(run, args, precision)
        for (side, what, batch), ours in seconds.items():
            if side != "orrery":
                continue
            line = {"what": what, "batch": batch, "device": "cuda", "precision": precision, "seconds": ours}
            peer = seconds.get(("pytorch", what, batch))
            if peer is not None:
                line.update(pytorch_seconds=peer, ratio=round(peer / ours, 2))
            print(json.dumps(line), flush=True)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
