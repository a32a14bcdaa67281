"""W3C trace context (level 1): which call of which client a line in the services' logs belongs to."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import re
import secrets
from collections.abc import Iterator, Sequence

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII | re.DOTALL)
_MAX_LINKS = 64


@dataclasses.dataclass(frozen=True)
class Trace:
    """A place in a trace. trace_id: 32 hexadecimal digits, `trace_id=…` in the logs. span_id: 16, a call as its caller saw it.
    sampled: the caller may have recorded the trace; passed on as it came."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @staticmethod
    def new() -> Trace:
        return Trace(_random_id(16), _random_id(8))

    @staticmethod
    def parse(traceparent: str) -> Trace | None:
        """None: it is not one, such as ids of zeros or uppercase digits. Later versions are taken by what they have in common
        with 00."""
        match = _FORM.fullmatch(traceparent)
        if match is None:
            return None
        version, trace_id, span_id, flags, more = match.groups()
        if version == "ff" or (version == "00" and more is not None) or not (int(trace_id, 16) and int(span_id, 16)):
            return None
        return Trace(trace_id, span_id, bool(int(flags, 16) & 1))

    def child(self) -> Trace:
        """A new span in the same trace: what the next call sends."""
        return dataclasses.replace(self, span_id=_random_id(8))

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def _random_id(size: int) -> str:
    while not int(digits := secrets.token_hex(size), 16):
        pass
    return digits


@dataclasses.dataclass(frozen=True)
class _Scope:
    trace: Trace
    others: tuple[str, ...] = ()  # ids of the other traces that a call is about


_scope: contextvars.ContextVar[_Scope | None] = contextvars.ContextVar("orrery_trace", default=None)


@contextlib.contextmanager
def trace(traceparent: str | None = None) -> Iterator[Trace]:
    """Calls of clients inside the block, on the same thread, belong to one trace: that of `traceparent`, such as a request of
    your own callers came with; a new one where that is None or not valid. Outside of all blocks every call has its own.

        with orrery.trace() as context:
            action = planner.act(observation)
        print(context.trace_id)  # to look for in the logs of the services
    """
    with use((Trace.parse(traceparent) if traceparent is not None else None) or Trace.new()) as context:
        yield context


@contextlib.contextmanager
def use(context: Trace | None, others: Sequence[Trace] = ()) -> Iterator[Trace]:
    """The same with a Trace; None: the one around, or a new one. `others`: which a call is about, too."""
    scope = _scope.get()
    if context is not None or scope is None:
        scope = _Scope(context or Trace.new(), tuple(other.trace_id for other in others[:_MAX_LINKS]))
    token = _scope.set(scope)
    try:
        yield scope.trace
    finally:
        _scope.reset(token)


def current() -> Trace | None:
    """Of the innermost block."""
    scope = _scope.get()
    return None if scope is None else scope.trace


def metadata() -> tuple[tuple[str, str], ...]:
    """What a call sends: a span of its own."""
    scope = _scope.get() or _Scope(Trace.new())
    sent = (("traceparent", scope.trace.child().traceparent),)
    return sent if not scope.others else (*sent, ("orrery-trace-links", ",".join(scope.others)))


def add_field(record: logging.LogRecord) -> bool:
    """A filter for handlers: `%(trace)s` in their format becomes ` trace_id=…`, or nothing outside of all blocks."""
    context = current()
    record.__dict__["trace"] = "" if context is None else f" trace_id={context.trace_id}"
    return True
