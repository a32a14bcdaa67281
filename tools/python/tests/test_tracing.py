import logging
import re
import threading

import grpc
import numpy as np
import pytest

from orrery import Chunk, EpisodeEnd, EpisodeMode, PlannerClient, ReplayClient, ReplayWriter, Trace, trace, tracing

# The examples of the recommendation.
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
SENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
JOINTS = {"joints": np.array([1, 2], np.float32)}


def test_reads_and_writes_the_examples():
    assert Trace.parse(SENT) == Trace(TRACE_ID, SPAN_ID, sampled=True)
    assert Trace.parse(SENT).traceparent == SENT
    assert Trace.parse(f"00-{TRACE_ID}-{SPAN_ID}-00").traceparent == f"00-{TRACE_ID}-{SPAN_ID}-00"
    assert Trace.parse(f"00-{TRACE_ID}-{SPAN_ID}-fe") == Trace(TRACE_ID, SPAN_ID, sampled=False)
    for later in (f"cc-{TRACE_ID}-{SPAN_ID}-01", f"cc-{TRACE_ID}-{SPAN_ID}-01-what-the-future-will-be-like"):
        assert Trace.parse(later).traceparent == SENT


@pytest.mark.parametrize("text", [
    "", "00", f"ff-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-01-more", f"cc-{TRACE_ID}-{SPAN_ID}-01.more",
    f"00-{'0' * 32}-{SPAN_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01", SENT.upper(), f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
    f"00-{TRACE_ID[1:]}-{SPAN_ID}-01", f" {SENT}", f"{SENT}\n", f"00-{TRACE_ID}-{SPAN_ID}-0g", "a" * 10_000, "\x00" * 55])
def test_what_is_not_one_begins_a_new_trace(text):
    assert Trace.parse(text) is None
    with trace(text) as context:
        assert re.fullmatch("[0-9a-f]{32}", context.trace_id) and context.trace_id != TRACE_ID


def test_calls_inside_a_block_belong_to_its_trace(fakes):
    with PlannerClient(fakes.address, client_id="me", timeout=10) as planner:
        with trace(SENT) as context:
            planner.act(JOINTS)
            planner.act(JOINTS)
        assert context == Trace.parse(SENT)
        with trace() as other:
            planner.act(JOINTS)
        planner.act(JOINTS)
        planner.act(JOINTS)
    sent = [Trace.parse(metadata["traceparent"]) for metadata in fakes.planner.metadata]
    assert [one.trace_id for one in sent[:3]] == [TRACE_ID, TRACE_ID, other.trace_id]
    assert len({one.trace_id for one in sent}) == 4  # the calls outside have their own
    assert len({one.span_id for one in sent} | {SPAN_ID}) == 6  # and each is a span
    assert tracing.current() is None


def test_all_tries_of_a_call_belong_to_one_trace(fakes):
    fakes.planner.errors.extend([(grpc.StatusCode.UNAVAILABLE, "away")] * 2)
    with PlannerClient(fakes.address, client_id="me", timeout=10) as planner:
        planner.act(JOINTS)
    sent = [Trace.parse(metadata["traceparent"]) for metadata in fakes.planner.metadata]
    assert len(sent) == 3 and len({one.trace_id for one in sent}) == 1 and len({one.span_id for one in sent}) == 3


def test_threads_have_blocks_of_their_own():
    seen = []
    with trace():
        thread = threading.Thread(target=lambda: seen.append(tracing.current()))
        thread.start()
        thread.join()
    assert seen == [None]


def chunk(episode):
    return Chunk("run-id", episode, 0, 5, EpisodeMode.TRAIN, EpisodeEnd.CONTINUES, 77, (1, 2), 0.5, b"x")


def test_chunks_carry_the_trace_they_were_queued_in(fakes):
    with ReplayClient(fakes.address, "test") as replay, ReplayWriter(replay) as writer:
        with trace(SENT):
            writer.append(chunk(1))
        with trace() as other:
            writer.append(chunk(2))
        writer.append(chunk(3))
        writer.flush(10)
    assert [Trace.parse(sent).trace_id if sent else "" for sent in fakes.replay.traceparents] == [TRACE_ID, other.trace_id, ""]


def test_log_lines_name_the_trace():
    handler = logging.Handler()
    handler.addFilter(tracing.add_field)
    handler.setFormatter(logging.Formatter("%(message)s%(trace)s"))
    lines = []
    handler.emit = lambda record: lines.append(handler.format(record))
    log = logging.getLogger("test_tracing")
    log.addHandler(handler)
    try:
        log.warning("before")
        with trace(SENT):
            log.warning("within")
    finally:
        log.removeHandler(handler)
    assert lines == ["before", f"within trace_id={TRACE_ID}"]
