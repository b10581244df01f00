"""Writes kubernetes.json: Kubernetes' own definitions that ray.io_rayjobs.yaml names, and those that they name, without
descriptions. They are what the package kubernetes-validate 1.37.0 has of Kubernetes 1.34.0, "strict": other fields than
those listed are errors, as for `kubectl apply --validate=strict`. To make it again, where that package is installed:

    python tests/infra/kubernetes_definitions.py
"""

import json
from importlib.resources import files
from pathlib import Path

import yaml

HERE = Path(__file__).parent
SCHEMAS = "kubernetes-json-schema/v1.34.0-local-strict/_definitions.json"


def references(schema):
    """The names of the definitions that a schema refers to."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].removeprefix("#/$defs/")
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def bare(schema):
    """The same without descriptions; a field may have that name too."""
    if isinstance(schema, list):
        return [bare(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: bare(v) for k, v in schema.items() if k != "description" or not isinstance(v, str)}


if __name__ == "__main__":
    everything = json.loads(files("kubernetes_validate").joinpath(SCHEMAS).read_text())["$defs"]
    left = set(references(yaml.safe_load((HERE / "ray.io_rayjobs.yaml").read_text())))
    taken = {}
    while left:
        name = left.pop()
        taken[name] = bare(everything[name])
        left |= set(references(taken[name])) - taken.keys()
    lines = (f"{json.dumps(name)}: {json.dumps(taken[name], sort_keys=True)}" for name in sorted(taken))
    (HERE / "kubernetes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
