#!/usr/bin/env python3
"""Rules, alerts and dashboards, against a real Prometheus that scrapes a real run.

    tests/dashboards_test.py [--bin_dir=build/bin] [--render=FOLDER [--seconds=N]]

First the files alone: dashboards are what their script makes, every alert has cases and a runbook section, promtool accepts
everything. Then Redis, its exporter, the four services and Prometheus with deploy/prometheus/prometheus.yml run on free ports
of 127.0.0.1, and every query of every panel must have an answer. Exit status 0; 1 with the reason; 77 (skipped) where one of
the distribution's packages prometheus, prometheus-redis-exporter and redis-server is missing.

--render draws the dashboards' data as FOLDER/NAME.png; it needs matplotlib. --seconds: for how long it collects before (180).
"""
import argparse
import contextlib
import itertools
import json
import math
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RUNBOOK = ROOT / "docs" / "operations.md"
SKIPPED = 77
PROGRAMS = ("prometheus", "promtool", "prometheus-redis-exporter", "redis-server")  # of others
PATIENCE = 300  # seconds until something that must happen is said not to
RATE_INTERVAL = "10s"
# All alerts but those that judge the machine: a slow one may well answer late.
ALERTS = 'ALERTS{alertname!~"OrreryPlannerLatency.*"}'
ACTOR_DOWN = 'ALERTS{alertname="OrreryActorDown",job="orrery-actor",severity="warning"}'


class Failure(Exception):
    pass


def require(condition, message):
    if not condition:
        raise Failure(message)


def load_dashboards():
    dashboards = {path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}
    require(set(dashboards) == {"overview", "planner", "replay", "learner"}, f"dashboards are {sorted(dashboards)}")
    return dashboards


def panels_of(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


# Files.


def check_dashboard(name, dashboard):
    require(dashboard["uid"] == f"orrery-{name}", f"{name}: uid is {dashboard['uid']}")
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    require(variables == ["datasource", "run", "job", "instance"], f"{name}: variables are {variables}")
    for one in dashboard["templating"]["list"][1:]:
        require(one["multi"] and one["allValue"] == ".+", f"{name}: variable {one['name']} is not several values or all")
    require(dashboard["editable"] is False, f"{name}: can be edited, but it is made by make_dashboards.py")
    ids = [panel["id"] for panel in dashboard["panels"]]
    require(len(set(ids)) == len(ids), f"{name}: ids of panels are not unique")
    for panel in panels_of(dashboard):
        where = f"{name} / {panel['title']}"
        require(panel["title"] and panel["description"].endswith("."), f"{where}: expected a title and a sentence about it")
        require(panel["fieldConfig"]["defaults"]["unit"], f"{where}: expected a unit")
        require(panel["targets"], f"{where}: expected a query")
        for target in panel["targets"]:
            check_expression(where, target)
    for one, other in itertools.combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        apart = (one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"] or
                 one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"])
        require(apart and one["x"] + one["w"] <= 24, f"{name}: panels overlap at {one} and {other}")


def check_expression(where, target):
    """The variables choose what is shown, and rates look as far back as Grafana finds right."""
    expression = target["expr"]
    require(target["datasource"]["uid"] == "${datasource}", f"{where}: data source {target['datasource']}")
    ranges = set(re.findall(r"\[(.+?)\]", expression))
    require(ranges <= {"$__rate_interval"}, f"{where}: ranges {ranges}")
    for name, labels in re.findall(r"\b(orrery_\w+|up)\{(.*?)\}", expression):
        chosen = [f'{label}=~"${label}"' for label in ("run", "job", "instance")]
        require(set(chosen) <= set(labels.split(",")), f"{where}: {name} of {labels}, expected {chosen}")


def check_alerts():
    text = (PROMETHEUS / "rules" / "alerts.yml").read_text()
    cases = re.split(r"alertname: ", (PROMETHEUS / "rules_test.yml").read_text())[1:]
    firing = {case.split(",")[0].split("\n")[0] for case in cases if "exp_alerts" in case}
    silent = {case.split(",")[0].split("\n")[0] for case in cases if "exp_alerts" not in case}
    sections = set(re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE))
    alerts = re.split(r"- alert: ", text)[1:]
    require(len(alerts) > 10, f"{len(alerts)} alerts found in alerts.yml")
    names = [alert.split("\n")[0] for alert in alerts]
    for name, alert in zip(names, alerts):
        require(name in firing, f"{name}: no case in rules_test.yml where it fires")
        require(name in silent, f"{name}: no case in rules_test.yml where it is silent")
        require(name in sections, f"{name}: no section in {RUNBOOK.name}")
        require(f"runbook_url: docs/operations.md#{name.lower()}\n" in alert, f"{name}: runbook_url is not its section")
        require(re.search(r"severity: (critical|warning)}", alert), f"{name}: expected severity critical or warning")
        require("summary: " in alert and "{{ $value" in alert, f"{name}: expected a summary and a description with the value")
    stale = {section for section in sections if section.startswith("Orrery")} - set(names)
    require(not stale, f"{RUNBOOK.name} has sections of alerts that are not there: {sorted(stale)}")


def promtool(*arguments):
    done = subprocess.run(["promtool", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    require(done.returncode == 0, f"promtool {' '.join(map(str, arguments))}:\n{done.stdout}")


def check_files():
    done = subprocess.run([sys.executable, GRAFANA / "make_dashboards.py", "--check"])
    require(done.returncode == 0, "deploy/grafana/dashboards are not up to date")
    for name, dashboard in load_dashboards().items():
        check_dashboard(name, dashboard)
    check_alerts()
    source = (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text()
    require("uid: orrery-prometheus\n" in source, "the provisioned data source is not the one that dashboards begin with")


def check_with_promtool():
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", *sorted((PROMETHEUS / "rules").glob("*.yml")))
    promtool("test", "rules", PROMETHEUS / "rules_test.yml")


# A running system.


class Processes:
    """Child processes with a log each. Leaving the context ends them, the newest first, and nothing else."""

    def __init__(self, folder):
        self.folder = folder
        self.running = {}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            for name in self.running:
                print(f"---- {name}\n{self.tail(name)}", file=sys.stderr)
        for name in reversed(list(self.running)):
            self.stop(name)

    def log(self, name):
        return self.folder / f"{name}.log"

    def tail(self, name):
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-15:])

    def start(self, name, *command):
        with open(self.log(name), "wb") as log:
            self.running[name] = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log,
                                                  stderr=subprocess.STDOUT, cwd=self.folder)

    def stop(self, name):
        process = self.running.pop(name)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def check(self):
        for name, process in self.running.items():
            require(process.poll() is None, f"{name} ended with status {process.returncode}:\n{self.tail(name)}")

    def wait_for(self, what, condition):
        """Until `condition` returns something true. `what` is said when it does not; a function says the newest state."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.check()
            require(time.monotonic() < deadline, f"after {PATIENCE} s still: {what() if callable(what) else what}")
            time.sleep(0.5)


class Api:
    """Prometheus' HTTP API."""

    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}"

    def ready(self):
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.base}/-/ready", timeout=5).status == 200
        return False

    def get(self, path, **parameters):
        url = f"{self.base}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise Failure(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression):
        """Samples that are numbers: [(labels, value)]."""
        samples = [(one["metric"], float(one["value"][1])) for one in self.get("query", query=expand(expression))["result"]]
        return [(labels, value) for labels, value in samples if math.isfinite(value)]

    def query_range(self, expression, start, end, step):
        return self.get("query_range", query=expand(expression), start=start, end=end, step=step)["result"]


def expand(expression):
    """What Grafana does with the variables when everything is chosen."""
    expression = expression.replace("$__rate_interval", RATE_INTERVAL)
    for name in ("run", "job", "instance"):
        expression = expression.replace(f"${name}", ".+")
    require("$" not in expression, f"a variable that is not known: {expression}")
    return expression


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def write_prometheus_config(folder, ports):
    """Our own, with other ports and a quick pace."""
    text = (PROMETHEUS / "prometheus.yml").read_text()
    changes = {"scrape_interval: 15s": "scrape_interval: 1s", "scrape_timeout: 10s": "scrape_timeout: 1s",
               "evaluation_interval: 15s": "evaluation_interval: 1s", "rules/*.yml": f"{PROMETHEUS}/rules/*.yml"}
    defaults = {"replay": 9101, "learner": 9102, "planner": 9103, "actor": 9104, "redis": 9121}
    for name, port in defaults.items():
        changes[f"127.0.0.1:{port}"] = f"127.0.0.1:{ports[name]}"
    for old, new in changes.items():
        require(text.count(old) == 1, f"prometheus.yml has \"{old}\" {text.count(old)} times, expected once")
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text)


def start_services(processes, bin_dir, ports):
    redis = free_port()
    processes.start("redis", "redis-server", "--port", redis, "--bind", "127.0.0.1", "--dir", processes.folder, "--save", "",
                    "--maxmemory", "512mb", "--maxmemory-policy", "noeviction")
    processes.start("exporter", "prometheus-redis-exporter", "-redis.addr", f"redis://127.0.0.1:{redis}",
                    "-web.listen-address", f"127.0.0.1:{ports['redis']}")
    # Much to plan and few updates, so that all of them are busy on a slow machine too.
    experiment = ["--config", ROOT / "configs" / "point_pixels_distributed.textproto", "--set", "evaluation.every_episodes=2",
                  "--set", "replay.limiter.updates_per_row=0.1"]
    address = {name: f"127.0.0.1:{free_port()}" for name in ("replay", "learner", "planner")}
    more = {"replay": ["--store", f"redis://127.0.0.1:{redis}"],
            "learner": ["--replay", address["replay"], "--threads", 1],
            "planner": ["--learner", address["learner"], "--replay", address["replay"], "--threads", 1],
            "actor": ["--replay", address["replay"], "--planner", address["planner"]]}
    for name, flags in more.items():
        if name in address:
            flags += ["--listen", address[name], "--health_listen", f"127.0.0.1:{free_port()}"]
        processes.start(name, bin_dir / f"orrery-{name}", *experiment, "--metrics_listen", f"127.0.0.1:{ports[name]}", *flags)
    # A learner that does not mirror the data, as ours does.
    processes.start("sampler", bin_dir / "orrery", "bench", "replay", "--replay", address["replay"], *experiment,
                    "--only=sample_remote", "--append_rows=1", "--batches=1", "--repeats=1000000")


# Checks of the running system.


def check_queries(processes, api, dashboards):
    """Each query has an answer at some time, and none is refused."""
    where = {}
    for name, dashboard in dashboards.items():
        for panel in panels_of(dashboard):
            for target in panel["targets"]:
                where.setdefault(target["expr"], f"{name} / {panel['title']}")
    missing = set(where)

    def answered():
        missing.difference_update([expression for expression in missing if api.query(expression)])
        return not missing

    def state():
        return "no answer to\n" + "\n".join(f"{where[one]}: {expand(one)}" for one in sorted(missing))

    processes.wait_for(state, answered)
    print(f"dashboards_test: all {len(where)} queries have an answer")


def check_variables(api, dashboards):
    for name, dashboard in dashboards.items():
        for variable in dashboard["templating"]["list"][1:]:
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()
            values = api.get(f"label/{label}/values", **{"match[]": expand(selector)})
            require(values, f"{name}: variable {variable['name']} has no values")


def check_rules(processes, api):
    groups = api.get("rules")["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        require(rule["health"] == "ok", f"rule {rule['name']}: {rule.get('lastError', rule['health'])}")
    text = "".join(path.read_text() for path in (PROMETHEUS / "rules").glob("*.yml"))
    used = {re.sub(r"_(bucket|sum|count)$", "_count", name) for name in re.findall(r"(?<![:\w])orrery_\w+(?=[{\[) ])", text)}
    there = set(api.get("label/__name__/values"))
    require(len(used) > 10, f"rules ask for {sorted(used)} only")
    require(used <= there, f"rules ask for metrics that are not there: {used - there}")
    processes.wait_for(lambda: f"alerts in a healthy system: {api.query(ALERTS)}", lambda: not api.query(ALERTS))
    processes.stop("actor")
    processes.wait_for("no alert for an actor that is down", lambda: api.query(ACTOR_DOWN))


def run_live(folder, arguments):
    dashboards = load_dashboards()
    ports = {name: free_port() for name in ("replay", "learner", "planner", "actor", "redis", "prometheus")}
    write_prometheus_config(folder, ports)
    api = Api(ports["prometheus"])
    with Processes(folder) as processes:
        start_services(processes, arguments.bin_dir.resolve(), ports)
        processes.start("prometheus", "prometheus", f"--config.file={folder}/prometheus.yml", "--log.level=warn",
                        f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{ports['prometheus']}")
        processes.wait_for("Prometheus is not ready", api.ready)
        begin = time.time()
        check_queries(processes, api, dashboards)
        check_variables(api, dashboards)
        if arguments.render:
            time.sleep(max(0.0, begin + arguments.seconds - time.time()))
            import dashboards_test_render
            dashboards_test_render.render(dashboards, api, begin, time.time(), arguments.render)
            for name in dashboards:
                require((arguments.render / f"{name}.png").stat().st_size > 10000, f"{name}.png is as good as empty")
        processes.stop("sampler")
        check_rules(processes, api)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin_dir", type=pathlib.Path, default=ROOT / "build" / "bin")
    parser.add_argument("--render", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=180)
    arguments = parser.parse_args()
    try:
        check_files()
        missing = [program for program in PROGRAMS if not shutil.which(program)]
        if missing:
            print(f"dashboards_test: SKIPPED: {', '.join(missing)} missing: apt-get install prometheus prometheus-redis-exporter "
                  "redis-server; only the files alone were checked")
            return SKIPPED
        check_with_promtool()
        with tempfile.TemporaryDirectory(prefix="dashboards_test.") as folder:
            run_live(pathlib.Path(folder), arguments)
    except Failure as failure:
        print(f"dashboards_test: {failure}", file=sys.stderr)
        return 1
    print("dashboards_test: passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
