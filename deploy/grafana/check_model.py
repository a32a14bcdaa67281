#!/usr/bin/env python3
"""Reads the dashboards with Grafana's own classes: what these do not know, Grafana would ignore.

    deploy/grafana/check_model.py      exit status 1 and the fields; needs grafana-foundation-sdk of the version in deploy/.env
"""
import json
import pathlib
import re
import sys

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

FOLDER = pathlib.Path(__file__).resolve().parent / "dashboards"
# Known to Grafana, not to its classes: what its editor shows of a variable's query.
OTHERS = r"/templating/list/\d+/definition"


def differences(ours, theirs, path=""):
    """Paths of what is in `ours` and not the same in `theirs`, which may have more."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from differences(value, theirs[key], f"{path}/{key}") if key in theirs else [f"{path}/{key}"]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs)):
            yield from differences(*pair, f"{path}/{i}")
    elif ours != theirs:
        yield path


def main():
    plugins.register_default_plugins()  # the options of each kind of panel, and Prometheus' queries
    files = sorted(FOLDER.glob("*.json"))
    found = []
    for file in files:
        ours = json.loads(file.read_text())
        theirs = json.loads(json.dumps(Dashboard.from_json(ours), cls=JSONEncoder))
        found += [f"{file.name}{path}" for path in differences(ours, theirs) if not re.fullmatch(OTHERS, path)]
    if found or not files:
        sys.exit("check_model: error: Grafana does not know\n" + "\n".join(found) if files else f"no dashboards in {FOLDER}")
    print(f"check_model: {len(files)} dashboards")


if __name__ == "__main__":
    main()
