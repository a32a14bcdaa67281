#!/usr/bin/env python3
"""Facts about rendered manifests of deploy/k8s that no schema knows. tools/k8s_check.sh renders them and calls this.

    tests/k8s_test.py [--bin_dir=build/bin] MANIFESTS.yaml…      checks each file by itself, then what is common to all
    tests/k8s_test.py --cluster                                  the scripts of the Redis Cluster, with real servers
    tests/k8s_test.py --print=namespace|pods MANIFESTS.yaml      its namespace, or pods made from its templates, as JSON

Exit status 0; 1 with the reasons. Needs PyYAML, promtool, redis-server, redis-cli and the built services. Every container's
flags are read by the real program, its experiment by the real replay service, Redis' configuration by a real Redis.
"""
import argparse
import binascii
import collections
import contextlib
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import yaml

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parents[1]
K8S = ROOT / "deploy" / "k8s"
PROMETHEUS = ROOT / "deploy" / "prometheus"
NAME = "app.kubernetes.io/name"
PASSWORD = "s3cret \"$(id)\\x é"
# Who may call whom at which port: the arrows of docs/architecture.md.
ARROWS = {
    ("orrery-actor", "orrery-planner", 7103),
    ("orrery-actor", "orrery-replay", 7101),
    ("orrery-planner", "orrery-learner", 7102),
    ("orrery-planner", "orrery-replay", 7101),
    ("orrery-learner", "orrery-replay", 7101),
    ("orrery-replay", "redis", 6379),
}
RANK_ARROWS = {("orrery-learner", "orrery-learner", 1024)}  # from there on: Gloo and NCCL choose ports
CLUSTER_ARROWS = {("redis", "redis", 6379), ("redis", "redis", 16379), ("redis-create", "redis", 6379)}
METRICS_PORTS = {"orrery-replay": 9101, "orrery-learner": 9102, "orrery-planner": 9103, "orrery-actor": 9104, "redis": 9121}
HEALTH_PORTS = {"orrery-replay": 7201, "orrery-learner": 7202, "orrery-planner": 7203}
GRACE = 10  # seconds that a service waits for running calls after SIGTERM (libs/telemetry/service_main.h); an actor needs less
REDIS_BYTES_PER_BYTE = 1.3  # of memory, for a byte of chunks: docs/kubernetes.md, sizing
UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "mb": 2**20, "gb": 2**30}


class Failure(Exception):
    pass


def require(condition, message):
    if not condition:
        raise Failure(message)


def amount(text):
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", str(text)).groups()
    require(unit in UNITS, f"amount {text}: expected a unit of {sorted(UNITS)}")
    return int(number) * UNITS[unit]


class Manifests:
    """The objects of one file."""

    def __init__(self, path):
        self.objects = [o for o in yaml.safe_load_all(pathlib.Path(path).read_text()) if o]
        names = [(o["kind"], o["metadata"]["name"]) for o in self.objects]
        require(len(names) == len(set(names)), f"two objects of one kind have one name: {sorted(names)}")

    def of(self, *kinds):
        return [o for o in self.objects if o["kind"] in kinds]

    def one(self, kind, name):
        found = [o for o in self.of(kind) if o["metadata"]["name"] == name]
        require(len(found) == 1, f"{kind} {name}: {len(found)} of them, expected 1")
        return found[0]

    def workloads(self):
        return self.of("Deployment", "StatefulSet")

    def templates(self):
        """Pod templates by the name of their program."""
        return {t["metadata"]["labels"][NAME]: t for t in (w["spec"]["template"] for w in self.workloads() + self.of("Job"))}

    def containers(self):
        return [(name, c) for name, t in self.templates().items() for c in t["spec"]["containers"]]

    def files(self, name):
        return self.one("ConfigMap", name)["data"]


def expand(text, environment):
    """As Kubernetes does in command, args and env: what is not known stays."""
    return re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), text)


def environment_of(container):
    """In order: a variable sees only those before it."""
    environment = {}
    for variable in container.get("env", []):
        if "valueFrom" in variable:
            require(set(variable["valueFrom"]) == {"fieldRef"}, f"container {container['name']}: {variable}: secrets are files")
            environment[variable["name"]] = "10.0.0.1"
        else:
            environment[variable["name"]] = expand(variable["value"], environment)
    return environment


def command_of(container):
    environment = environment_of(container)
    words = [expand(w, environment) for w in container.get("command", []) + container.get("args", [])]
    for word in words:
        require("$(" not in word, f"container {container['name']}: {word} names a variable that is not set before it")
    return words


def flag(container, name):
    found = [w.split("=", 1)[1] for w in command_of(container) if w.startswith(f"--{name}=")]
    require(len(found) <= 1, f"container {container['name']}: --{name} is given {len(found)} times")
    return found[0] if found else None


def is_ours(container):
    return container.get("command", [""])[0].startswith("/usr/local/bin/orrery-")


@functools.cache  # many files run the same
def run_program(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def check_flags(manifests, bin_dir):
    """The program itself reads them: with a log level that it does not know it ends after that."""
    ours = [c for _, c in manifests.containers() if is_ours(c)]
    require(len(ours) == 4, f"{len(ours)} containers run programs of ours, expected 4")
    for container in ours:
        command = command_of(container)
        program = bin_dir / pathlib.Path(command[0]).name
        run = run_program(program, *command[1:], "--log_level=nonsense")
        require(run.returncode == 2 and 'log level "nonsense"' in run.stderr, f"{program.name}: {run.stderr.strip()}")


def experiment_of(manifests, template):
    mounted = [v["configMap"]["name"] for v in template["spec"]["volumes"] if v["name"] == "experiment"]
    require(len(mounted) == 1, f"{len(mounted)} volumes hold an experiment, expected 1")
    return manifests.files(mounted[0])["experiment.textproto"]


@functools.cache
def load_experiment(experiment, bin_dir):
    """Replay reads it before it looks for its store."""
    with tempfile.NamedTemporaryFile("w", suffix=".textproto") as file:
        file.write(experiment)
        file.flush()
        run = run_program(bin_dir / "orrery-replay", f"--config={file.name}", "--store=nowhere:")
    require(run.returncode == 1 and "location of the store is 'nowhere:'" in run.stderr, f"experiment: {run.stderr.strip()}")


def check_experiment(manifests, bin_dir):
    templates = {n: t for n, t in manifests.templates().items() if n.startswith("orrery-")}
    for name, template in templates.items():
        container = template["spec"]["containers"][0]
        config = pathlib.Path(flag(container, "config"))
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        require(mounts.get(str(config.parent)) == "experiment", f"{name}: --config={config} is not in the volume experiment")
        require(config.name == "experiment.textproto", f"{name}: --config={config}")
        experiment = experiment_of(manifests, template)
    load_experiment(experiment, bin_dir)
    run_name = re.search(r'^name: "(.*)"', experiment, re.M)[1]
    for service in manifests.of("Service"):
        label = service["metadata"]["labels"].get("run")
        require(label == run_name, f"Service {service['metadata']['name']}: label run is {label}, the experiment is {run_name}")


def number_in(experiment, field, default):
    found = re.search(rf"\b{field}: (\d+)", experiment)
    return int(found[1]) if found else default


def check_sizes(manifests):
    """What the experiment keeps fits in the memory of Redis and learner."""
    templates = manifests.templates()
    experiment = experiment_of(manifests, templates["orrery-replay"])
    redis = templates["redis"]["spec"]["containers"][0]
    replicas = manifests.one("StatefulSet", "redis")["spec"]["replicas"]
    primaries = replicas // 2 if is_cluster(manifests) else replicas
    each = amount(environment_of(redis)["MAXMEMORY"])
    bytes_of_one = number_in(experiment, "max_bytes", 2**36) * largest_share(experiment, primaries)
    require(each >= REDIS_BYTES_PER_BYTE * bytes_of_one, f"Redis: {bytes_of_one} bytes of chunks need more than maxmemory {each}")
    limit = amount(redis["resources"]["limits"]["memory"])
    require(each <= 0.6 * limit, f"Redis: maxmemory {each} is above 60 % of its memory limit {limit}")
    claim = manifests.one("StatefulSet", "redis")["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]
    require(amount(claim) >= 3 * each, f"Redis: a volume of {claim} is below three times maxmemory {each}")
    row = number_in(experiment, "image_size", 64) ** 2 * 3
    mirror = min(number_in(experiment, "mirror_bytes", 2**33), number_in(experiment, "max_rows", 10**6) * row)
    limit = amount(templates["orrery-learner"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
    require(mirror + 2**30 <= limit, f"learner: a mirror of {mirror} bytes and 1 GiB are above its memory limit {limit}")


def largest_share(experiment, primaries):
    """Of a run's partitions, at one primary: slots are dealt in equal ranges, and {RUN:P} is what a key is hashed by."""
    if primaries == 1:
        return 1
    run = re.search(r'^name: "(.*)"', experiment, re.M)[1]
    partitions = number_in(experiment, "partitions", 4)
    slots = [binascii.crc_hqx(f"{run}:{p}".encode(), 0) % 16384 for p in range(partitions)]
    return max(collections.Counter(slot * primaries // 16384 for slot in slots).values()) / partitions


def is_cluster(manifests):
    return "redis-create" in manifests.templates()


def selects(selector, labels):
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        require(expression["operator"] == "In", f"operator {expression['operator']} is not known here")
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def allowed(policies, labels, direction, side, other):
    """Ports that policies allow pods with `labels` towards pods of this namespace with the labels `other`."""
    ports = set()
    for policy in policies:
        if not selects(policy["podSelector"], labels):
            continue
        for rule in policy.get(direction, []):
            peers = rule.get(side, [])
            require(peers and rule.get("ports"), f"a rule without peers or ports allows all: {rule}")
            for peer in peers:
                if "namespaceSelector" not in peer and selects(peer["podSelector"], other):
                    ports |= {p["port"] for p in rule["ports"]}
    return ports


def check_arrows(manifests):
    policies = [p["spec"] for p in manifests.of("NetworkPolicy")]
    labels = {name: t["metadata"]["labels"] for name, t in manifests.templates().items()}
    for name, own in labels.items():
        isolated = {t for p in policies if selects(p["podSelector"], own) for t in p["policyTypes"]}
        require(isolated == {"Ingress", "Egress"}, f"{name}: is isolated for {isolated}, expected Ingress and Egress")
    ranks = any(w["metadata"]["name"] == "learner" and w["spec"]["replicas"] > 1 for w in manifests.of("StatefulSet"))
    arrows = ARROWS | (CLUSTER_ARROWS if is_cluster(manifests) else set()) | (RANK_ARROWS if ranks else set())
    out = {(a, b, port) for a in labels for b in labels for port in allowed(policies, labels[a], "egress", "to", labels[b])}
    into = {(a, b, port) for a in labels for b in labels for port in allowed(policies, labels[b], "ingress", "from", labels[a])}
    require(out == arrows, f"egress differs from the arrows by {sorted(out ^ arrows)}")
    require(into == arrows, f"ingress differs from the arrows by {sorted(into ^ arrows)}")
    check_outside(manifests, policies, labels)
    check_addresses(manifests, arrows)


def check_outside(manifests, policies, labels):
    """Other namespaces: names for all, and Prometheus where it scrapes."""
    monitored = bool(manifests.of("ServiceMonitor"))
    for name, own in labels.items():
        found = set()
        for policy in policies:
            if not selects(policy["podSelector"], own):
                continue
            for direction, side in (("egress", "to"), ("ingress", "from")):
                for rule in policy.get(direction, []):
                    for peer in rule[side]:
                        require(not set(peer) - {"namespaceSelector", "podSelector"}, f"peer {peer} is not known here")
                        if "namespaceSelector" in peer:
                            space = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
                            found |= {(direction, space, p) for port in rule["ports"]
                                      for p in range(port["port"], port.get("endPort", port["port"]) + 1)}
        require(("egress", "kube-system", 53) in found, f"{name}: may not ask for names")
        rest = found - {("egress", "kube-system", 53)}
        scraped = {("ingress", "monitoring", p) for p in METRICS_PORTS.values()} if monitored else set()
        require(rest == scraped, f"{name}: outside it may talk to {sorted(rest)}, expected {sorted(scraped)}")


def check_addresses(manifests, arrows):
    """Every address that a program is given is a Service's, and an arrow leads there."""
    targets = {s["metadata"]["name"]: s for s in manifests.of("Service")}
    for name, container in manifests.containers():
        given = [flag(container, f) for f in ("replay", "learner", "planner")] if is_ours(container) else []
        store = flag(container, "store") if is_ours(container) else None
        given += re.sub(r"^redis(-cluster)?://.*@", "", store).split(",") if store else []
        given += [w for w in command_of(container) if re.fullmatch(r"redis-\d\.redis:\d+", w)]
        for address in filter(None, given):
            host, port = address.rsplit(":", 1)
            service = targets.get(host.split(".")[-1])
            require(service, f"{name}: {address} is no Service")
            require(int(port) in [p["port"] for p in service["spec"]["ports"]], f"{name}: {address}: no such port")
            target = service["spec"]["selector"][NAME]
            require((name, target, int(port)) in arrows, f"{name}: no policy allows {address}")


def check_ports(manifests):
    for name, container in manifests.containers():
        if not is_ours(container):
            continue
        declared = {p["name"]: p["containerPort"] for p in container["ports"]}
        for flag_name, port_name in (("listen", "grpc"), ("health_listen", "health"), ("metrics_listen", "metrics")):
            listens = flag(container, flag_name)
            require(listens == (f"0.0.0.0:{declared[port_name]}" if port_name in declared else None),
                    f"{name}: --{flag_name} is {listens}, the container's ports {declared}")
        require(declared["metrics"] == METRICS_PORTS[name], f"{name}: metrics at {declared['metrics']}")
        for probe, service in (("startupProbe", "liveness"), ("livenessProbe", "liveness"), ("readinessProbe", "readiness")):
            if name == "orrery-actor":
                path = "/readyz" if service == "readiness" else "/healthz"
                require(container[probe].get("httpGet") == {"path": path, "port": METRICS_PORTS[name]}, f"{name}: {probe}")
            else:
                require(container[probe].get("grpc") == {"port": HEALTH_PORTS[name], "service": service}, f"{name}: {probe}")
    templates = manifests.templates()
    for service in manifests.of("Service"):
        target = templates[service["spec"]["selector"][NAME]]
        opened = {p["containerPort"] for c in target["spec"]["containers"] for p in c["ports"]}
        for port in service["spec"]["ports"]:
            require(port.get("targetPort", port["port"]) in opened, f"{service['metadata']['name']}: {port} is not open")


def check_shutdown(manifests):
    for name, template in manifests.templates().items():
        if not name.startswith("orrery-"):
            continue
        spec = template["spec"]
        sleep = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        behind_names = name in ("orrery-replay", "orrery-planner")
        require((sleep > 0) == behind_names, f"{name}: preStop sleeps {sleep} s")
        need = sleep + GRACE + 5
        require(spec["terminationGracePeriodSeconds"] >= need, f"{name}: terminationGracePeriodSeconds is below {need}")


def check_spread(manifests):
    """Pods of one program prefer different nodes, where there may be several."""
    scaled = {s["spec"]["scaleTargetRef"]["name"] for s in manifests.of("HorizontalPodAutoscaler")}
    for workload in manifests.workloads():
        spec = workload["spec"]["template"]["spec"]
        if workload["spec"].get("replicas", 1) > 1 or workload["metadata"]["name"] in scaled:
            hosts = [c for c in spec.get("topologySpreadConstraints", []) if c["topologyKey"] == "kubernetes.io/hostname"]
            labels = workload["spec"]["template"]["metadata"]["labels"]
            fits = len(hosts) == 1 and selects(hosts[0]["labelSelector"], labels)
            require(fits, f"{workload['metadata']['name']}: is not spread over nodes")


def check_security(manifests, versions):
    for name, template in manifests.templates().items():
        spec = template["spec"]
        pod = spec["securityContext"]
        require(pod["runAsNonRoot"] is True and pod["runAsUser"] == 65532, f"{name}: runs as {pod}")
        require(pod["seccompProfile"] == {"type": "RuntimeDefault"}, f"{name}: seccomp {pod['seccompProfile']}")
        require(spec["automountServiceAccountToken"] is False, f"{name}: gets a token of the API server")
        manifests.one("ServiceAccount", spec["serviceAccountName"])
        for container in spec["containers"]:
            expected = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            require(container["securityContext"] == expected, f"{name}: {container['securityContext']}")
            for side in ("requests", "limits"):
                given = set(container["resources"][side])
                require({"cpu", "memory", "ephemeral-storage"} <= given, f"{name}: {side} of {given} only")
            repository, tag = container["image"].split(":")
            require(tag in versions[repository], f"{name}: {container['image']}, expected {versions[repository]}")
            check_written(name, container)


def check_secrets(manifests):
    """Who talks to Redis has its password as a file, which only the pod's group may read."""
    wanted = {"secretName": "redis", "defaultMode": 0o440}
    for name, template in manifests.templates().items():
        volumes = {v["name"]: v["secret"] for v in template["spec"].get("volumes", []) if "secret" in v}
        for container in template["spec"]["containers"]:
            where = f"{name}, container {container['name']}"
            file = environment_of(container).get("PASSWORD_FILE") or (is_ours(container) and flag(container, "store_password_file"))
            require(bool(file) == (name in ("redis", "redis-create", "orrery-replay")), f"{where}: password file {file}")
            if not file:
                continue
            file = pathlib.Path(file)
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"] if m.get("readOnly")}
            volume = volumes.get(mounts.get(str(file.parent)))
            require(volume == {**wanted, "items": [{"key": "password", "path": file.name}]}, f"{where}: {file} is of {volume}")
            require(template["spec"]["securityContext"]["fsGroup"] == 65532, f"{where}: another group cannot read {file}")


def check_written(name, container):
    """Folders that a program writes are volumes."""
    writable = [m["mountPath"] for m in container.get("volumeMounts", []) if not m.get("readOnly")]
    folders = [flag(container, f) for f in ("checkpoint_dir", "log_dir")] if is_ours(container) else []
    folders.append(environment_of(container).get("CUDA_CACHE_PATH"))
    if container["name"] == "redis":
        folders.append("/data")
    for folder in filter(None, folders):
        require(any(folder == w or folder.startswith(w + "/") for w in writable), f"{name}: {folder} cannot be written")


def check_budgets(manifests):
    for workload in manifests.workloads():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        require(selects(workload["spec"]["selector"], labels), f"{workload['metadata']['name']}: does not select its own pods")
        found = [b["spec"] for b in manifests.of("PodDisruptionBudget") if selects(b["spec"]["selector"], labels)]
        require(len(found) == 1, f"{workload['metadata']['name']}: {len(found)} disruption budgets, expected 1")
        require(found[0]["maxUnavailable"] in (1, "50%"), f"{workload['metadata']['name']}: {found[0]} would block drains")
        require(found[0]["unhealthyPodEvictionPolicy"] == "AlwaysAllow", f"{workload['metadata']['name']}: {found[0]}")


def check_monitoring(manifests):
    if not manifests.of("ServiceMonitor"):
        require(not manifests.of("HorizontalPodAutoscaler", "PrometheusRule"), "autoscalers or rules, but nothing is scraped")
        return
    spec = manifests.one("ServiceMonitor", "orrery")["spec"]
    require([e["port"] for e in spec["endpoints"]] == ["metrics"], f"ServiceMonitor: {spec['endpoints']}")
    require(spec["targetLabels"] == ["run"], f"ServiceMonitor: targetLabels are {spec['targetLabels']}")
    scraped = [s for s in manifests.of("Service") if selects(spec["selector"], s["metadata"]["labels"])]
    ports = {s["metadata"]["labels"][spec["jobLabel"]]: p["port"] for s in scraped for p in s["spec"]["ports"]
             if p["name"] == "metrics"}
    require(ports == METRICS_PORTS, f"scraped are {ports}, expected {METRICS_PORTS}")
    jobs = {c["job_name"] for c in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]}
    require(set(ports) == jobs, f"jobs are {sorted(ports)}, those of deploy/prometheus {sorted(jobs)}")
    for file in (PROMETHEUS / "rules").glob("*.yml"):
        rule = manifests.one("PrometheusRule", f"orrery-{file.stem}")["spec"]
        require(rule == yaml.safe_load(file.read_text()), f"PrometheusRule orrery-{file.stem}: run make_rules.py")


def check_autoscaling(manifests):
    scalers = manifests.of("HorizontalPodAutoscaler")
    rules = yaml.safe_load((K8S / "components" / "autoscaling" / "adapter.yaml").read_text())["rules"]
    served = {r["name"]["as"] for kind in ("custom", "external") for r in rules[kind]}
    asked = set()
    for workload in manifests.of("Deployment"):
        name = workload["metadata"]["name"]
        scaler = [s["spec"] for s in scalers if s["spec"]["scaleTargetRef"] ==
                  {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}]
        require(("replicas" in workload["spec"]) == (not scaler), f"{name}: replicas are set by both or by none")
        asked |= {m[m["type"].lower()]["metric"]["name"] for s in scaler for m in s["metrics"]}
    require(asked in (set(), served), f"autoscalers ask for {asked}, prometheus-adapter serves {served}")


def check_queries():
    """The queries of prometheus-adapter are PromQL, about metrics that the services have."""
    rules = yaml.safe_load((K8S / "components" / "autoscaling" / "adapter.yaml").read_text())["rules"]
    sources = "".join(f.read_text() for folder in ("libs", "services") for f in (ROOT / folder).rglob("*.cc"))
    groups = []
    for rule in rules["custom"] + rules["external"]:
        series = re.match(r"\w+", rule["seriesQuery"])[0]
        metric = re.sub(r"^orrery_|_sum$", "", series)
        require(f'"{metric}"' in sources, f"prometheus-adapter asks for {series}: the services have no {metric}")
        query = rule["metricsQuery"]
        for template, value in (("<<.Series>>", series), ("<<.LabelMatchers>>", 'namespace="a"'), ("<<.GroupBy>>", "pod")):
            query = query.replace(template, value)
        groups += [{"record": "a:b:c", "expr": query}, {"record": "a:b:d", "expr": rule["seriesQuery"]}]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump({"groups": [{"name": "adapter", "rules": groups}]}, file)
        run = subprocess.run(["promtool", "check", "rules", file.name], capture_output=True, text=True)
    require(run.returncode == 0, f"prometheus-adapter's queries: {run.stdout}{run.stderr}")


class RedisServer:
    """A real Redis with the configuration, the scripts and the command of a container, and a socket of its own."""

    def __init__(self, folder, command, files):
        self.folder, self.socket = pathlib.Path(folder), f"{folder}/socket"
        for name, text in files:
            text = text.replace("/etc/redis", folder).replace("dir /data", f"dir {folder}").replace("/data/", folder + "/")
            (self.folder / name).write_text(text)
        start = command.index("/etc/redis/server.sh") - 1
        words = [w.replace("/etc/redis", folder) for w in command[start:]]
        self.process = subprocess.Popen([*words, "--port", "0", "--unixsocket", self.socket, "--cluster-enabled", "no"],
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env=self.environment(PASSWORD))

    def environment(self, password):
        file = self.folder / f"password-{password.encode().hex()}"
        if not file.exists():
            file.write_text(password + "\n")
        return {**os.environ, "PASSWORD_FILE": str(file)}

    def cli(self, *arguments, password=PASSWORD, **options):
        return subprocess.run(["sh", self.folder / "with_password.sh", "REDISCLI_AUTH", "redis-cli", "-s", self.socket, *arguments],
                              env=self.environment(password), capture_output=True, text=True, timeout=30, **options)

    def await_answer(self):
        for _ in range(300):
            if self.process.poll() is not None or self.cli("-e", "ping").returncode == 0:
                break
            time.sleep(0.1)
        code = self.process.poll()
        require(code is None, f"redis-server ended: {code is not None and self.process.stdout.read().strip()}")
        require(self.cli("-e", "ping").stdout == "PONG\n", "redis-cli -e ping does not answer PONG")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate(timeout=60)


def check_redis(manifests):
    container = manifests.templates()["redis"]["spec"]["containers"][0]
    volume = [v for v in manifests.templates()["redis"]["spec"]["volumes"] if v["name"] == "configuration"][0]
    probe = container["readinessProbe"]["exec"]["command"]
    require(probe[:3] == ["sh", "/etc/redis/with_password.sh", "REDISCLI_AUTH"], f"readiness probe: {probe}")
    require(" ".join(probe[3:]).startswith(("redis-cli -e ping", "sh -c redis-cli -e ping &&")), f"readiness probe: {probe}")
    files = tuple(sorted(manifests.files(volume["configMap"]["name"]).items()))
    run_redis(tuple(command_of(container)), files, amount(environment_of(container)["MAXMEMORY"]))


@functools.cache
def run_redis(command, files, maxmemory):
    """What the configuration sets, and who may log in, also while the password changes (docs/kubernetes.md)."""
    with tempfile.TemporaryDirectory() as folder, RedisServer(folder, command, files) as server:
        server.await_answer()
        title = pathlib.Path(f"/proc/{server.process.pid}/comm").read_text()
        require(title == "redis-server\n", f"the container's first process is {title}, which SIGTERM would not reach")
        for key, value in (("maxmemory-policy", "noeviction"), ("appendonly", "yes"), ("appendfsync", "always"),
                           ("maxmemory", str(maxmemory))):
            found = server.cli("config", "get", key).stdout.split()
            require(found == [key, value], f"Redis: {found}, expected {key} {value}")
        for password in ("wrong", "new"):
            require(server.cli("-e", "ping", password=password).returncode != 0, f"the password {password} is accepted")
        change = server.cli(input="acl setuser default >new\nconfig set masterauth new\n")
        require(change.stdout == "OK\nOK\n", f"changing the password: {change.stdout}{change.stderr}")
        for password, code in ((PASSWORD, 0), ("new", 0), ("wrong", 1)):
            found = server.cli("-e", "ping", password=password).returncode
            require(found == code, f"the password {password} while it changes: {found}, expected {code}")


def versions_of_images():
    """Tags that manifests may name, by repository."""
    version = re.search(r"project\(orrery VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    versions = {f"orrery/{n}": {version} for n in ("replay", "actor")}
    versions |= {f"orrery/{n}": {version, f"{version}-cuda"} for n in ("learner", "planner")}
    for line in (ROOT / "deploy" / ".env").read_text().splitlines():
        found = re.match(r"REDIS(?:_EXPORTER)?_IMAGE=(.+):(.+)", line)
        if found:
            versions[found[1]] = {found[2]}
    return versions


def check_restore(versions):
    """The pod that holds Redis' volume runs as Redis does, by the same image."""
    pod = yaml.safe_load((K8S / "restore.yaml").read_text())["spec"]
    redis = next(o for o in yaml.safe_load_all((K8S / "base" / "redis.yaml").read_text()) if o["kind"] == "StatefulSet")["spec"]
    claim = f"{redis['volumeClaimTemplates'][0]['metadata']['name']}-{redis['serviceName']}-0"
    require(pod["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}], f"volumes: {pod['volumes']}")
    repository, tag = pod["containers"][0]["image"].split(":")
    require(tag in versions[repository], f"image {repository}:{tag}, expected {versions[repository]}")
    patch = {p["path"].rsplit("/", 1)[1]: p["value"] for p in yaml.safe_load((K8S / "base" / "restricted.yaml").read_text())
             if not p["path"].endswith("containers/0/securityContext")}
    for key, value in patch.items():
        require(pod[key] == value, f"{key}: {pod[key]}, expected {value}")


def check_gpu(manifests):
    """A program that is told to use a GPU gets one, and the image for it."""
    for name, container in manifests.containers():
        if is_ours(container):
            wants = flag(container, "device") == "cuda"
            has = "nvidia.com/gpu" in container["resources"]["limits"]
            require(wants == has == container["image"].endswith("-cuda"), f"{name}: device, GPU and image differ")


class Node:
    """A node of a Redis Cluster at an address of the loopback network, started by start.sh as in a pod."""

    def __init__(self, folder, name, port):
        self.folder, self.name, self.port = folder / name, name, port
        self.folder.mkdir()
        self.server = None

    def start(self, address, environment):
        configuration = self.folder / "cluster.conf"
        text = (K8S / "components" / "redis-cluster" / "cluster.conf").read_text()
        base = (K8S / "base" / "redis.conf").read_text()
        configuration.write_text((base + text.replace("include /etc/redis/redis.conf", ""))
                                 .replace("dir /data", f"dir {self.folder}").replace("/data/", f"{self.folder}/"))
        password = self.folder / "password"
        password.write_text(PASSWORD)
        script = K8S / "components" / "redis-cluster" / "start.sh"
        self.server = subprocess.Popen(
            ["sh", script, self.folder, "sh", K8S / "base" / "server.sh", "redis-server", configuration, "--port", str(self.port),
             "--bind", address, "--logfile", self.folder / "log"],
            env={**environment, "PASSWORD_FILE": str(password), "POD_IP": address, "HOST_NAME": f"{self.name}.redis"},
            stdout=subprocess.DEVNULL)

    def stop(self):
        """Redis does not heed SIGTERM while it writes its first append-only file after it became a replica: once more then."""
        for _ in range(60):
            self.server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(timeout=1)
                return
        raise Failure(f"{self.name} did not end within 60 s of SIGTERM")

    def kill(self):
        if self.server is not None:
            self.server.kill()
            self.server.wait()


def await_output(command, environment, wanted, what):
    for _ in range(600):
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if wanted in run.stdout:
            return
        time.sleep(0.1)
    raise Failure(f"{what}: {wanted!r} expected, last answer {run.stdout!r} {run.stderr!r}")


def check_cluster():
    """Six nodes become a cluster; all stop, start at new addresses, and are the same cluster with its data."""
    port = 12000 + os.getpid() % 18000  # every node has an address; the bus is 10000 above
    script = K8S / "components" / "redis-cluster" / "create.sh"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        names = folder / "names"
        # What a name service answers.
        getent = folder / "getent"
        getent.write_text(f'#!/bin/sh\ngrep " $2\\$" {names}\n')
        getent.chmod(0o755)
        # redis-cli finds nodes by name, too.
        cli = folder / "redis-cli"
        cli.write_text('#!/bin/sh\nif [ "$1" = -h ]; then shift; set -- -h "$(getent hosts "$1" | cut -d " " -f 1)" "$@"\n'
                       'a="$1 $2"; shift 3; set -- $a "$@"; fi\nexec /usr/bin/redis-cli "$@"\n')
        cli.chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "REDISCLI_AUTH": PASSWORD}
        nodes = [Node(folder, f"redis-{i}", port) for i in range(6)]

        def start(network):
            names.write_text("".join(f"127.77.{network}.{i + 1} {n.name}.redis\n" for i, n in enumerate(nodes)))
            for i, node in enumerate(nodes):
                node.start(f"127.77.{network}.{i + 1}", environment)

        def client(network, node):
            return ["/usr/bin/redis-cli", "-c", "-h", f"127.77.{network}.{node + 1}", "-p", str(port)]

        try:
            start(1)
            create = ["sh", script, *(f"{n.name}.redis:{port}" for n in nodes)]
            first = subprocess.run(create, env=environment, capture_output=True, text=True, timeout=120)
            require(first.returncode == 0, f"create.sh: {first.stdout}{first.stderr}")
            for node in range(6):
                await_output(client(1, node) + ["cluster", "info"], environment, "cluster_state:ok", f"node {node}")
            await_output(client(1, 0) + ["set", "key", "value"], environment, "OK", "writing")
            again = subprocess.run(create, env=environment, capture_output=True, text=True, timeout=120)
            require(again.returncode == 0 and "the cluster is there" in again.stdout, f"create.sh again: {again.stdout}")
            # Host names travel by gossip; a node must know all of them before it stops.
            for node in nodes:
                await_output(["grep", "-c", r",redis-[0-9]\.redis", node.folder / "nodes.conf"], environment, "6", "names")
            for node in nodes:
                node.stop()
            start(2)
            for node in range(6):
                await_output(client(2, node) + ["cluster", "info"], environment, "cluster_state:ok", f"moved node {node}")
                await_output(client(2, node) + ["cluster", "info"], environment, "cluster_known_nodes:6", f"moved node {node}")
                await_output(client(2, node) + ["get", "key"], environment, "value", f"reading at moved node {node}")
        finally:
            for node in nodes:
                node.kill()


def pods_of(manifests):
    """What controllers would make, for admission to judge."""
    for workload in manifests.workloads() + manifests.of("Job"):
        template = workload["spec"]["template"]
        spec = dict(template["spec"])
        claims = [c["metadata"]["name"] for c in workload["spec"].get("volumeClaimTemplates", [])]
        spec["volumes"] = spec.get("volumes", []) + [{"name": c, "persistentVolumeClaim": {"claimName": c}} for c in claims]
        metadata = {**template["metadata"], **{k: workload["metadata"][k] for k in ("name", "namespace")}}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def print_objects(what, manifests):
    items = manifests.of("Namespace") if what == "namespace" else list(pods_of(manifests))
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--print", choices=["namespace", "pods"])
    parser.add_argument("--bin_dir", type=pathlib.Path, default=ROOT / "build" / "bin")
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("files", nargs="*")
    arguments = parser.parse_args()
    if not arguments.files and not arguments.cluster:
        parser.error("no manifests given: tools/k8s_check.sh renders them")
    if arguments.print:
        print_objects(arguments.print, Manifests(arguments.files[0]))
        return
    failed = 0

    def attempt(what, check, *parameters):
        nonlocal failed
        try:
            check(*parameters)
        except Failure as failure:
            failed += 1
            print(f"k8s_test: {what}: {check.__name__}: {failure}", file=sys.stderr)

    for file in arguments.files:
        manifests = Manifests(file)
        for check in (check_sizes, check_arrows, check_ports, check_shutdown, check_spread, check_budgets, check_monitoring,
                      check_autoscaling, check_gpu, check_secrets, check_redis):
            attempt(file, check, manifests)
        attempt(file, check_security, manifests, versions_of_images())
        for check in (check_flags, check_experiment):
            attempt(file, check, manifests, arguments.bin_dir)
    if arguments.files:
        attempt("adapter.yaml", check_queries)
        attempt("restore.yaml", check_restore, versions_of_images())
    if arguments.cluster:
        attempt("redis-cluster", check_cluster)
    if failed:
        sys.exit(f"k8s_test: {failed} checks failed")
    print(f"k8s_test: all passed: {len(arguments.files)} files{', cluster' if arguments.cluster else ''}")


if __name__ == "__main__":
    main()
