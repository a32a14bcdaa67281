#!/usr/bin/env python3
"""Writes the Grafana dashboards. The JSON files are committed: to change a dashboard, change this script and run it.

    deploy/grafana/make_dashboards.py            writes dashboards/*.json
    deploy/grafana/make_dashboards.py --check    exit status 1 and the names of the files that it would change
"""
import dataclasses
import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of Grafana's grid
HEIGHT = 7
OURS = 'run=~"$run",job=~"$job",instance=~"$instance"'
REDIS = 'run=~"$run|"'  # a Redis that serves several runs carries the label of none

# Every query must have an answer in a healthy system: tests/dashboards_test.py.


@dataclasses.dataclass
class Query:
    expression: str
    legend: str


@dataclasses.dataclass
class Panel:
    title: str
    unit: str
    description: str
    queries: list
    kind: str
    width: int
    height: int = HEIGHT
    options: dict = dataclasses.field(default_factory=dict)
    custom: dict = dataclasses.field(default_factory=dict)
    low: float = None  # where the axis begins; None: at the smallest value
    high: float = None


# Expressions.


def metric(name, labels=""):
    return f"orrery_{name}{{{OURS}{',' + labels if labels else ''}}}"


def rate(name, by="run", labels="", function="sum"):
    return f"{function} by ({by}) (rate({metric(name, labels)}[$__rate_interval]))"


def rate_of_ranks(name):
    """Of what all ranks of a learner do together."""
    return rate(name, function="max")


def across(function, name, by="run", labels=""):
    return f"{function} by ({by}) ({metric(name, labels)})"


def mean(name, by="run"):
    """Of what a histogram observed."""
    return f"{rate(name + '_sum', by)} / {rate(name + '_count', by)}"


def quantile(share, name, by="run"):
    return f"histogram_quantile({share}, {rate(name + '_bucket', by + ', le')})"


def quantiles(name):
    return [Query(quantile(share, name), f"{{{{run}}}} {label}")
            for share, label in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))]


# Panels.


def lines(title, unit, description, *queries, width=8, low=0, high=None, stacked=False):
    custom = {"lineWidth": 1, "fillOpacity": 25 if stacked else 8, "showPoints": "never", "spanNulls": False}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    options = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
               "tooltip": {"mode": "multi", "sort": "desc"}}
    return Panel(title, unit, description, list(queries), "timeseries", width, options=options, custom=custom, low=low,
                 high=high)


def durations(title, description, name, width=8):
    return lines(title, "s", description, *quantiles(name), width=width)


def number(title, unit, description, the_query, width=4):
    options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "none",
               "graphMode": "area", "textMode": "auto", "orientation": "auto", "justifyMode": "auto"}
    return Panel(title, unit, description, [the_query], "stat", width, 4, options)


def heatmap(title, unit, description, name, width=8):
    increase = f"sum by (le) (increase({metric(name + '_bucket')}[$__rate_interval]))"
    options = {"calculate": False, "cellGap": 1, "color": {"mode": "scheme", "scheme": "Blues", "steps": 64},
               "yAxis": {"unit": unit}, "tooltip": {"mode": "single", "yHistogram": True}, "legend": {"show": True}}
    return Panel(title, unit, description, [Query(increase, "{{le}}")], "heatmap", width, options=options)


# The four dashboards: uid, title and rows of panels.


def overview():
    flow = "From left to right the path of experience: a stage that lags behind the one before it is where to look."
    return "orrery-overview", "Orrery: overview", [
        ("State", [
            number("Services up", "none", "Processes that answer scrapes.", Query(f"sum(up{{{OURS}}})", "up")),
            number("Alerts firing", "none",
                   "Alerts of deploy/prometheus/rules that fire now; docs/operations.md says what to do.",
                   Query(f'sum(ALERTS{{alertstate="firing",{REDIS}}}) or vector(0)', "firing")),
            number("Updates", "none", "Updates behind the newest published snapshot.",
                   Query(across("max", "learner_snapshot_version"), "{{run}}")),
            number("Episodes stored", "none", "Episodes of which at least a chunk is stored.",
                   Query(across("max", "replay_episodes"), "{{run}}")),
            number("Rows stored", "none", "Rows (decisions of an agent) stored, evaluation included.",
                   Query(across("max", "replay_steps"), "{{run}}")),
            number("Snapshot age", "s", "Since the oldest snapshot that a planner serves was taken into use.",
                   Query(f"max by (run) (time() - ({metric('planner_snapshot_timestamp_seconds')} > 0))", "{{run}}")),
        ]),
        ("Is it learning?", [
            lines("Return of evaluations", "none",
                  "Return of the last episode without exploration noise, by task; the mean over actors that played one.",
                  Query(across("avg", "actor_episode_return", "run, task", 'mode="evaluate"'), "{{run}} {{task}}"), low=None),
            lines("Return while collecting", "none",
                  "Return of the last episode with random actions or exploration noise, by task; the mean over actors.",
                  Query(across("avg", "actor_episode_return", "run, task, mode", 'mode!="evaluate"'),
                        "{{run}} {{task}} {{mode}}"), low=None),
            lines("Loss", "none", "Terms of the loss of the last update, unweighted, and their weighted sum: total.",
                  Query(across("avg", "learner_loss", "run, term"), "{{run}} {{term}}"), low=None),
        ]),
        ("Data flow", [
            lines("1. Environment steps", "cps", "Simulator steps of all actors, action repeat counted. " + flow,
                  Query(rate("actor_env_steps_total", "run, task"), "{{run}} {{task}}"), width=6, stacked=True),
            lines("2. Rows stored", "rowsps", "Rows that replay acknowledged: environment steps / action repeat. " + flow,
                  Query(rate("replay_steps_appended_total"), "{{run}}"), width=6),
            lines("3. Updates", "cps", "Updates that the learner made. " + flow,
                  Query(rate_of_ranks("learner_updates_total"), "{{run}}"), width=6),
            lines("4. Snapshots published", "cpm", "Snapshots that the learner published, per minute. " + flow,
                  Query(f"60 * {rate('learner_snapshot_publish_seconds_count')}", "{{run}}"), width=6),
            lines("Updates per environment step", "none",
                  "Since the run began. Under CONCURRENT replay.limiter holds it in a band.",
                  Query(across("max", "learner_updates_per_env_step"), "{{run}}"), width=6),
            lines("Waiting for the schedule", "none",
                  "Actors, and learners, that wait on average because the other side is behind.",
                  Query(rate("replay_limiter_blocked_seconds_total", "run, side"), "{{run}} {{side}}"), width=6),
            lines("Episodes", "cpm", "Episodes that were played to their end, per minute.",
                  Query(f"60 * {rate('actor_episodes_total', 'run, task')}", "{{run}} {{task}}"), width=6, stacked=True),
            lines("Snapshot age", "s", "Since a planner took the snapshot that it serves into use.",
                  Query(f"time() - ({metric('planner_snapshot_timestamp_seconds')} > 0)", "{{run}} {{instance}}"), width=6),
        ]),
    ]


def planner():
    failed = rate("planner_requests_total", labels='code!="OK"')
    actors = across("count", "actor_unacknowledged_bytes")
    return "orrery-planner", "Orrery: planner", [
        ("Requests", [
            lines("Rate", "reqps", "Answered Act requests by status code. One request may hold several slots.",
                  Query(rate("planner_requests_total", "run, code") + " > 0", "{{run}} {{code}}"), stacked=True),
            lines("Errors", "percentunit", "Share of the requests that were answered with another code than OK; Rate shows which.",
                  Query(f"{failed} / ({rate('planner_requests_total')} > 0)", "{{run}}")),
            durations("Duration", "From the arrival of a request to its answer.", "planner_act_seconds"),
            heatmap("Durations", "s", "Requests by the time from arrival to answer.", "planner_act_seconds", width=12),
            lines("Later than 1 s", "percentunit",
                  "Share of the requests that took over 1 s; the goal is at most 1 % of 30 days.",
                  Query('run:orrery_planner_act_slow:ratio_rate5m{run=~"$run"}', "{{run}} 5 minutes"),
                  Query('run:orrery_planner_act_slow:ratio_rate1h{run=~"$run"}', "{{run}} 1 hour"),
                  Query('run:orrery_planner_act_slow:ratio_rate6h{run=~"$run"}', "{{run}} 6 hours"), width=12),
        ]),
        ("Batches", [
            lines("Slots per batch", "none", "Slots that were computed together. More is better use of the device.",
                  Query(mean("planner_batch_size"), "{{run}} mean"),
                  Query(quantile(0.95, "planner_batch_size"), "{{run}} 95 %")),
            lines("Slots", "ops", "Actions planned, by planner.",
                  Query(rate("planner_batch_size_sum", "run, instance"), "{{run}} {{instance}}"), stacked=True),
            lines("Queue", "none",
                  "Slots that wait. At planner_service.max_queue requests are refused with RESOURCE_EXHAUSTED.",
                  Query(across("sum", "planner_queue_depth", "run, instance"), "{{run}} {{instance}}")),
            durations("Queue time", "From the arrival of a request until its batch begins.", "planner_queue_seconds"),
            durations("Compute time", "Of a batch, on a CPU of a request: encoding, belief, plan.", "planner_compute_seconds"),
            lines("Busy", "percentunit",
                  "Share of the time in which a batch is computed, by planner. Near 1: start another planner.",
                  Query(rate("planner_busy_seconds_total", "run, instance"), "{{run}} {{instance}}"), high=1),
        ]),
        ("Snapshots and beliefs", [
            lines("Snapshot served", "none", "Updates behind the snapshot, by planner, and behind the newest published one.",
                  Query(across("max", "planner_snapshot_version", "run, instance"), "{{run}} {{instance}}"),
                  Query(across("max", "learner_snapshot_version"), "{{run}} published"), low=None, width=6),
            lines("Snapshots refused", "cpm", "Damaged or not fitting, per minute.",
                  Query(f"60 * {rate('planner_snapshots_refused_total', 'run, instance')}", "{{run}} {{instance}}"), width=6),
            lines("Belief lag", "none", "Updates between the snapshot that made a belief and the one that goes on from it.",
                  Query(mean("planner_belief_lag"), "{{run}} mean"),
                  Query(quantile(0.99, "planner_belief_lag"), "{{run}} 99 %"), width=6),
            lines("Plans that are not finite", "cps", "Plans with a predicted return that is infinite or no number.",
                  Query(rate("planner_non_finite_plans_total"), "{{run}}"), width=6),
        ]),
        ("What actors see", [
            durations("Wait for an action", "Time an actor waits for one answer, network included.",
                      "actor_action_wait_seconds", width=12),
            lines("Share of time", "percentunit",
                  "Of the actors' time: waiting for actions, stepping environments. In the rest they wait for replay.",
                  Query(f"{rate('actor_action_wait_seconds_sum')} / {actors}", "{{run}} waiting for actions"),
                  Query(f"{rate('actor_env_step_seconds_sum')} / {actors}", "{{run}} stepping"), width=12),
        ]),
    ]


def replay():
    commands = f"rate(redis_commands_total{{{REDIS}}}[$__rate_interval])"
    seconds = f"rate(redis_commands_duration_seconds_total{{{REDIS}}}[$__rate_interval])"
    return "orrery-replay", "Orrery: replay and Redis", [
        ("What comes in", [
            lines("Rows", "rowsps", "Rows acknowledged, repeats not counted.",
                  Query(rate("replay_steps_appended_total", "run, instance"), "{{run}} {{instance}}"), width=6, stacked=True),
            lines("Bytes", "binBps", "Encoded chunks acknowledged, repeats not counted.",
                  Query(rate("replay_bytes_appended_total", "run, instance"), "{{run}} {{instance}}"), width=6, stacked=True),
            durations("Append time", "From a chunk's arrival to its acknowledgement: it is stored by then.",
                      "replay_append_seconds", width=6),
            lines("Not yet acknowledged", "bytes",
                  "Chunks that actors keep; at collection.max_unacknowledged_bytes an actor waits.",
                  Query(across("sum", "actor_unacknowledged_bytes", "run, instance"), "{{run}} {{instance}}"), width=6),
        ]),
        ("What is there", [
            lines("Rows stored", "none", "Now, evaluation included. At replay.max_rows the oldest chunks go.",
                  Query(across("max", "replay_steps"), "{{run}}"), width=6),
            lines("Episodes stored", "none", "Of which at least a chunk is stored.",
                  Query(across("max", "replay_episodes"), "{{run}}"), width=6),
            lines("Bytes stored", "bytes", "Encoded chunks. At replay.max_bytes the oldest chunks go.",
                  Query(across("max", "replay_bytes"), "{{run}}"), width=6),
            lines("Bytes per row", "bytes", "Encoded, of the chunks that came in.",
                  Query(f"{rate('replay_bytes_appended_total')} / ({rate('replay_steps_appended_total')} > 0)", "{{run}}"),
                  width=6),
        ]),
        ("What holds it up", [
            lines("Errors of the store", "cps",
                  "Operations that failed, by operation. Appends are tried again: no row is lost.",
                  Query(rate("replay_store_errors_total", "run, operation"), "{{run}} {{operation}}"), width=6),
            lines("Appends that wait", "none",
                  "Appends that wait, on average, for a store that is full or away (cannot be reached).",
                  Query(rate("replay_append_blocked_seconds_total", "run, store"), "{{run}} {{store}}"), width=6),
            lines("Actors that wait", "none",
                  "Actors that wait, on average, because collection.max_unacknowledged_bytes are not yet acknowledged.",
                  Query(rate("actor_append_blocked_seconds_total"), "{{run}}"), width=6),
            lines("Waiting for the schedule", "none",
                  "Actors, and learners, that wait on average because the other side is behind.",
                  Query(rate("replay_limiter_blocked_seconds_total", "run, side"), "{{run}} {{side}}"), width=6),
        ]),
        ("Batches for learners that do not mirror the data", [
            lines("Sequences", "cps", "Sequences sent by SampleSequences. Our own learner does not call it.",
                  Query(rate("replay_sequences_sampled_total"), "{{run}}"), width=12),
            durations("Time of a batch", "To draw a batch and find its chunks.", "replay_sample_seconds", width=12),
        ]),
        ("Redis (prometheus-redis-exporter)", [
            lines("Memory", "bytes", "Used and allowed (maxmemory; 0: no limit).",
                  Query(f"redis_memory_used_bytes{{{REDIS}}}", "used"),
                  Query(f"redis_memory_max_bytes{{{REDIS}}}", "maxmemory")),
            lines("Commands", "ops", "Executed commands, the five most frequent.", Query(f"topk(5, {commands})", "{{cmd}}")),
            lines("Time of a command", "s", "Mean time inside Redis of the five slowest commands.",
                  Query(f"topk(5, {seconds} / ({commands} > 0))", "{{cmd}}")),
            lines("Network", "binBps", "Bytes to and from Redis.",
                  Query(f"rate(redis_net_input_bytes_total{{{REDIS}}}[$__rate_interval])", "in"),
                  Query(f"rate(redis_net_output_bytes_total{{{REDIS}}}[$__rate_interval])", "out")),
            lines("Clients", "none", "Connections, and those that wait inside a blocking command.",
                  Query(f"redis_connected_clients{{{REDIS}}}", "connected"),
                  Query(f"redis_blocked_clients{{{REDIS}}}", "blocked")),
            lines("Keys evicted", "cps", "Anything above 0 is lost experience: maxmemory-policy must be noeviction.",
                  Query(f"rate(redis_evicted_keys_total{{{REDIS}}}[$__rate_interval])", "evicted")),
        ]),
    ]


def learner():
    return "orrery-learner", "Orrery: learner", [
        ("Speed", [
            lines("Updates", "cps", "Updates made.", Query(rate_of_ranks("learner_updates_total"), "{{run}}")),
            durations("Time of an update", "Forward, backward and optimizer, without the wait for the batch.",
                      "learner_update_seconds"),
            lines("Share of time", "percentunit", "What the learner does. The rest it waits for the schedule, or for planners.",
                  Query(rate_of_ranks("learner_update_seconds_sum"), "{{run}} updating"),
                  Query(rate_of_ranks("learner_batch_wait_seconds_sum"), "{{run}} waiting for a batch"),
                  Query(rate_of_ranks("learner_snapshot_publish_seconds_sum"), "{{run}} publishing"), stacked=True, high=1),
            durations("Wait for a batch", "To draw and gather one from the mirror.", "learner_batch_wait_seconds"),
            durations("Time of a publication", "To serialise a snapshot, to push it and to keep it in replay.",
                      "learner_snapshot_publish_seconds"),
            lines("Updates per environment step", "none", "Since the run began.",
                  Query(across("max", "learner_updates_per_env_step"), "{{run}}")),
        ]),
        ("Losses", [
            lines("Total", "none", "Weighted sum of the terms, last update.",
                  Query(across("avg", "learner_loss", labels='term="total"'), "{{run}}"), low=None),
            lines("Terms", "none", "Terms of the last update, unweighted. docs/model.md says what they are.",
                  Query(across("avg", "learner_loss", "run, term", 'term!="total"'), "{{run}} {{term}}"), low=None),
            lines("Gradient norm", "none", "Global norm of the last gradient, before clipping.",
                  Query(across("max", "learner_gradient_norm"), "{{run}}")),
        ]),
        ("Trouble", [
            lines("Skipped updates", "percentunit", "Share of the updates with a loss or gradient that is not finite.",
                  Query(f"{rate('learner_skipped_updates_total')} / ({rate('learner_updates_total')} > 0)", "{{run}}"),
                  width=6),
            lines("Chunks refused", "cps", "Damaged or not fitting the model.",
                  Query(rate("learner_chunks_refused_total"), "{{run}}"), width=6),
            lines("Checkpoint errors", "cpm", "Checkpoints that could not be written, per minute.",
                  Query(f"60 * {rate('learner_checkpoint_errors_total')}", "{{run}}"), width=6),
            lines("Environment failures", "cpm", "Episodes that ended because the environment failed, per minute.",
                  Query(f"60 * {rate('actor_environment_failures_total', 'run, task')}", "{{run}} {{task}}"),
                  width=6),
        ]),
    ]


# JSON.


def panel_json(panel, number_of_panel, x, y):
    defaults = {"unit": panel.unit, "custom": panel.custom}
    if panel.low is not None:
        defaults["min"] = panel.low
    if panel.high is not None:
        defaults["max"] = panel.high
    targets = []
    for i, one in enumerate(panel.queries):
        target = {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": one.expression, "range": True,
                  "legendFormat": one.legend}
        if panel.kind == "heatmap":
            target["format"] = "heatmap"
        targets.append(target)
    return {"id": number_of_panel, "type": panel.kind, "title": panel.title, "description": panel.description,
            "datasource": DATASOURCE, "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
            "fieldConfig": {"defaults": defaults, "overrides": []}, "options": panel.options, "targets": targets}


def panels_json(rows):
    result = []
    y = 0
    for title, panels in rows:
        result.append({"id": len(result) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})
        y += 1
        x = height = 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            result.append(panel_json(panel, len(result) + 1, x, y))
            x += panel.width
            height = max(height, panel.height)
        y += height
    return result


def variable(name, label, expression):
    return {"name": name, "label": label, "type": "query", "datasource": DATASOURCE, "definition": expression,
            "query": {"query": expression, "refId": name}, "refresh": 2, "sort": 1, "multi": True, "includeAll": True,
            "allValue": ".+", "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}


def dashboard_json(uid, title, rows):
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1,
              "current": {"selected": True, "text": "Prometheus", "value": "orrery-prometheus"}}
    variables = [source, variable("run", "Run", "label_values(orrery_replay_steps, run)"),
                 variable("job", "Job", 'label_values(up{job=~"orrery-.+",run=~"$run"}, job)'),
                 variable("instance", "Instance", 'label_values(up{job=~"$job",run=~"$run"}, instance)')]
    link = {"title": "Orrery", "type": "dashboards", "tags": ["orrery"], "asDropdown": False, "includeVars": True,
            "keepTime": True}
    return {"uid": uid, "title": title, "tags": ["orrery"], "schemaVersion": 38, "version": 1, "editable": False,
            "graphTooltip": 1, "timezone": "browser", "refresh": "30s", "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": variables}, "annotations": {"list": []}, "links": [link], "panels": panels_json(rows)}


def files():
    """Contents by file name."""
    made = {}
    for uid, title, rows in (overview(), planner(), replay(), learner()):
        made[uid.removeprefix("orrery-") + ".json"] = json.dumps(dashboard_json(uid, title, rows), indent=1) + "\n"
    return made


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    made = files()
    there = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    changed = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    if sys.argv[1:] == ["--check"]:
        if changed:
            sys.exit(f"make_dashboards.py: not what it makes: {', '.join(changed)}; run it")
        return
    for name in changed:
        if name in made:
            (FOLDER / name).write_text(made[name])
        else:
            (FOLDER / name).unlink()
    print(f"make_dashboards.py: {len(changed)} of {len(made)} files changed in {FOLDER}")


if __name__ == "__main__":
    main()
