#!/usr/bin/env python3
"""Writes rules.yaml, the rule files of deploy/prometheus as PrometheusRules. It is committed, as kustomize reads no files
outside of its folder: after a change of the rules run this.

    deploy/k8s/components/monitoring/make_rules.py            writes rules.yaml
    deploy/k8s/components/monitoring/make_rules.py --check    exit status 1 when it would change
"""
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
RULES = HERE.parents[2] / "prometheus" / "rules"


def prometheus_rule(file):
    lines = file.read_text().splitlines()
    spec = "\n".join(f"  {line}" if line else "" for line in lines)
    return (f"apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n"
            f"metadata:\n  name: orrery-{file.stem}\nspec:\n{spec}\n")


def main():
    files = sorted(RULES.glob("*.yml"))
    if not files:
        sys.exit(f"make_rules: error: no *.yml in {RULES}")
    text = "# Made by make_rules.py of deploy/prometheus/rules: do not edit.\n" + "---\n".join(map(prometheus_rule, files))
    out = HERE / "rules.yaml"
    if sys.argv[1:] == ["--check"]:
        if not out.is_file() or out.read_text() != text:
            sys.exit(f"make_rules: {out} is not what the rules make: run {pathlib.Path(__file__).name}")
    elif sys.argv[1:]:
        sys.exit(f"make_rules: error: unknown arguments {sys.argv[1:]}: expected --check or none")
    else:
        out.write_text(text)


if __name__ == "__main__":
    main()
