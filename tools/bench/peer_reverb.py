#!/usr/bin/env python3
"""Measures dm-reverb for compare.py: the server with --serve, else a client of it that prints one object per line.

The same as in `orrery bench replay --replay=…`: pictures of 64 x 64 x 3 of one task, chunks of 50 rows, batches of 50
sequences of 50 rows, rows kept, one writer that waits for the last confirmation, the server in a process of its own, gRPC.
Different: an item is a whole chunk, so a sequence begins at every 50th row only and needs one chunk, where Orrery draws from
all starts and mostly needs two; Reverb's client decodes and puts batches together on TensorFlow's threads (TrajectoryDataset).
"""
import argparse
import json

from timing import median_seconds

ROWS = 50  # of a chunk and of a sequence
BATCH = 50
TABLE = "rows"


def serve(args):
    import reverb
    import tensorflow as tf
    signature = {"image": tf.TensorSpec([ROWS, 64, 64, 3], tf.uint8), "action": tf.TensorSpec([ROWS, 1], tf.float32),
                 "reward": tf.TensorSpec([ROWS], tf.float32)}
    table = reverb.Table(TABLE, sampler=reverb.selectors.Uniform(), remover=reverb.selectors.Fifo(),
                         max_size=args.max_rows // ROWS, rate_limiter=reverb.rate_limiters.MinSize(1), signature=signature)
    reverb.Server([table], port=args.port).wait()


def append(client, frames, rows):
    """Appends whole chunks of at least `rows` rows; returns how many."""
    import numpy as np
    action, reward = np.zeros([1], np.float32), np.zeros([], np.float32)
    columns = ("image", "action", "reward")
    chunks = -(-rows // ROWS)
    with client.trajectory_writer(num_keep_alive_refs=ROWS) as writer:
        for column in columns:
            writer.configure((column,), num_keep_alive_refs=ROWS, max_chunk_length=ROWS)
        for row in range(chunks * ROWS):
            writer.append({"image": frames[row % len(frames)], "action": action, "reward": reward})
            if row % ROWS == ROWS - 1:
                writer.create_item(TABLE, priority=1.0, trajectory={key: writer.history[key][-ROWS:] for key in columns})
        writer.flush()
    return chunks * ROWS


def bench(args):
    import numpy as np
    import reverb
    address = f"localhost:{args.port}"
    client = reverb.Client(address)
    frames = np.fromfile(args.frames, np.uint8).reshape(-1, 64, 64, 3)
    rows = append(client, frames, ROWS)  # also waits for the server
    rows = -(-args.append_rows // ROWS) * ROWS
    seconds = median_seconds(args, lambda: append(client, frames, args.append_rows))
    print(json.dumps({"what": "append", "chunk_rows": ROWS, "rows_per_second": rows / seconds}), flush=True)
    dataset = reverb.TrajectoryDataset.from_table_signature(address, TABLE, max_in_flight_samples_per_worker=2 * BATCH)
    batches = iter(dataset.batch(BATCH, drop_remainder=True).prefetch(2))

    def draw():
        for _ in range(args.batches):
            images = next(batches).data["image"]
            assert images.shape == (BATCH, ROWS, 64, 64, 3), images.shape

    seconds = median_seconds(args, draw)
    print(json.dumps({"what": "sample", "batch": BATCH, "length": ROWS, "batches_per_second": args.batches / seconds}),
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--max_rows", type=int, default=100_000)
    parser.add_argument("--frames", help="raw pictures, [N, 64, 64, 3] uint8")
    parser.add_argument("--append_rows", type=int, default=20000)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.serve:
        serve(args)
    else:
        bench(args)


if __name__ == "__main__":
    main()
