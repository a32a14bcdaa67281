#!/usr/bin/env python3
"""Writes JSON schemas for kubeconform: KIND-GROUP-VERSION.json, each complete by itself and without unknown fields.

    tools/k8s_schemas.py --out=FOLDER --schemas=FOLDER [--crd=FILE …] MANIFESTS.yaml…

For every kind in the manifests. --schemas: a version's strict schemas, as the Python package kubernetes-validate carries them;
--crd: a CustomResourceDefinition (YAML). A kind of which there is no schema is left out: kubeconform then says so.
"""
import argparse
import json
import pathlib

import yaml


def inlined(node, definitions, within=()):
    """References replaced by what they name; one that is within itself (JSONSchemaProps) allows anything."""
    if isinstance(node, list):
        return [inlined(n, definitions, within) for n in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[1]
        return {} if name in within else inlined(definitions[name], definitions, (*within, name))
    return {key: inlined(value, definitions, within) for key, value in node.items() if key not in ("$id", "$schema")}


def strict(node):
    """Of a CustomResourceDefinition's schema: objects with known properties have no others."""
    if isinstance(node, list):
        return [strict(n) for n in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
    return node


def file_name(kind, api_version):
    group, _, version = api_version.rpartition("/")
    return "-".join([kind.lower(), *filter(None, [group.split(".")[0]]), version]) + ".json"


def custom_schemas(files):
    for file in files:
        definition = yaml.safe_load(file.read_text())["spec"]
        for version in definition["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            yield file_name(definition["names"]["kind"], f"{definition['group']}/{version['name']}"), schema


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--schemas", type=pathlib.Path, required=True)
    parser.add_argument("--crd", type=pathlib.Path, action="append", default=[])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    definitions = json.loads((arguments.schemas / "_definitions.json").read_text())["$defs"]
    custom = dict(custom_schemas(arguments.crd))
    objects = [o for f in arguments.files for o in yaml.safe_load_all(f.read_text()) if o]
    for name in {file_name(o["kind"], o["apiVersion"]) for o in objects}:
        source = arguments.schemas / name
        if source.is_file():
            schema = inlined(json.loads(source.read_text()), definitions)
        elif name in custom:
            schema = custom[name]
        else:
            continue
        (arguments.out / name).write_text(json.dumps(schema))


if __name__ == "__main__":
    main()
