"""What the peers' scripts share; no more than the standard library, as each runs in an environment of its own."""
import statistics
import time


def median_seconds(args, call):
    """Median seconds of a call over args.repeats, after args.warm_up."""
    seconds = []
    for i in range(args.warm_up + args.repeats):
        begin = time.perf_counter()
        call()
        if i >= args.warm_up:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
