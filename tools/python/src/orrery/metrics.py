"""What an actor counts, in Prometheus' text format, with /healthz and /readyz beside it."""

from __future__ import annotations

import bisect
import http.server
import threading
from collections.abc import Sequence

from orrery.errors import ConfigError

# As libs/telemetry/metrics.h, so that quantiles over C++ and Python actors are right.
SECONDS_BUCKETS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters, gauges and histograms by name and labels; the prefix orrery_ is added. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # There from the start: who counts actors by it counts those that have sent nothing yet, too.
        self._values: dict[str, dict[_Labels, float]] = {"actor_unacknowledged_bytes": {(): 0.0}}
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        self._help: dict[str, tuple[str, str]] = {
            "actor_env_steps_total": ("counter", "Simulator steps, action repeat counted"),
            "actor_episodes_total": ("counter", "Episodes played to their end"),
            "actor_episode_return": ("gauge", "Return of the last episode"),
            "actor_environment_failures_total": ("counter", "Episodes that ended because the environment failed"),
            "actor_unacknowledged_bytes": ("gauge", "Bytes of chunks sent and not yet acknowledged"),
            "actor_env_step_seconds": ("histogram", "Seconds of one environment step with its action repeat"),
            "actor_action_wait_seconds": ("histogram", "Seconds waited for one answer of the planner"),
        }

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        with self._lock:
            series = self._values.setdefault(name, {})
            key = tuple(sorted(labels.items()))
            series[key] = series.get(key, 0.0) + value

    def set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._values.setdefault(name, {})[tuple(sorted(labels.items()))] = value

    def observe(self, name: str, seconds: float) -> None:
        with self._lock:
            buckets = self._buckets.setdefault(name, [0] * (len(SECONDS_BUCKETS) + 1))
            buckets[bisect.bisect_left(SECONDS_BUCKETS, seconds)] += 1
            self._sums[name] = self._sums.get(name, 0.0) + seconds

    def text(self) -> str:
        with self._lock:
            lines: list[str] = []
            for name, (kind, help_text) in self._help.items():
                lines += [f"# HELP orrery_{name} {help_text}", f"# TYPE orrery_{name} {kind}"]
                for labels, value in self._values.get(name, {}).items():
                    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels)
                    lines.append(f"orrery_{name}{'{' + inside + '}' if inside else ''} {value!r}")
                if name in self._buckets:
                    lines += self._histogram(name)
            return "\n".join(lines) + "\n"

    def _histogram(self, name: str) -> Sequence[str]:
        lines = []
        total = 0
        for bound, count in zip([*(f"{bound:g}" for bound in SECONDS_BUCKETS), "+Inf"], self._buckets[name], strict=True):
            total += count
            lines.append(f'orrery_{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"orrery_{name}_sum {self._sums[name]!r}", f"orrery_{name}_count {total}"]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class MetricsServer:
    """HTTP /metrics, /healthz and /readyz until `close`. `port` says where; `ready` may be set at any time. ConfigError when
    the address cannot be had."""

    def __init__(self, address: str, metrics: Metrics):
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdigit():
            raise ConfigError(f"metrics address {address!r}: expected HOST:PORT")
        self.ready = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name that http.server wants
                pages = {"/metrics": (200, metrics.text()), "/healthz": (200, "ok\n"),
                         "/readyz": (200, "ok\n") if outer.ready else (503, "not ready\n")}
                code, text = pages.get(self.path, (404, "not found\n"))
                body = text.encode()
                self.send_response(code)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        try:
            self._server = http.server.ThreadingHTTPServer((host.strip("[]"), int(port)), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"metrics address {address!r}: {error}") from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="orrery-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
