"""KubeRay's custom resource definitions as strict JSON schemas, from the folder that this machine may have."""

import copy
import gzip
from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

FOLDER = Path(__file__).parents[3] / "shared" / "crd"
"""v1.7.0's, gzipped; beside a checkout, not in it."""

PLURALS = {"RayCluster": "rayclusters", "RayService": "rayservices", "RayJob": "rayjobs"}


def crd_faults(manifest: dict) -> list[str]:
    """What Kubernetes would refuse in `manifest`, and the keys it would drop in silence."""
    schema = schema_of(manifest["kind"], manifest["apiVersion"])
    filled = with_defaults(schema, copy.deepcopy(manifest))
    return [f"{error.json_path}: {error.message[:200]}" for error in Draft202012Validator(schema).iter_errors(filled)]


@cache
def schema_of(kind: str, api_version: str) -> dict:
    file = FOLDER / f"ray.io_{PLURALS[kind]}.yaml.gz"
    if not file.exists():
        pytest.skip(f"KubeRay's CRDs are not here ({file.name})")
    definition = yaml.load(gzip.decompress(file.read_bytes()), yaml.CSafeLoader)
    group = definition["spec"]["group"]
    (version,) = [v for v in definition["spec"]["versions"] if f"{group}/{v['name']}" == api_version]
    assert not version.get("deprecated"), api_version
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def strict(schema):
    """OpenAPI's dialect as JSON schema, with unknown keys refused wherever Kubernetes would prune them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: {name: strict(part) for name, part in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
    }
    if kept.pop("x-kubernetes-int-or-string", False):
        kept.pop("anyOf", None)
        kept["type"] = ["integer", "string"]
    if kept.pop("nullable", False):
        kept["type"] = [kept["type"], "null"]
    kept.pop("format", None)
    closed = kept.get("type") == "object" and "properties" in kept and "additionalProperties" not in kept
    if closed and not kept.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    return kept


def with_defaults(schema, value):
    """`value` as the API server completes it before it validates."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    parts = schema.get("properties", {})
    missing = {key: part["default"] for key, part in parts.items() if "default" in part and key not in value}
    return {key: with_defaults(parts.get(key, {}), item) for key, item in (value | missing).items()}
