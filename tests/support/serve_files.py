"""Serve config files, checked for what Ray lets pass."""

from importlib import import_module
from typing import Any, get_args

from pydantic import BaseModel

from polar_ray.config import ServeConfig, config_from_arguments


def check_serve_config(given: dict[str, Any]) -> None:
    """Every key is known to whoever reads it, and every value is allowed."""
    from ray.serve.schema import ServeDeploySchema

    assert unknown_keys(ServeDeploySchema, given) == []
    ServeDeploySchema.model_validate(given)
    for application in given["applications"]:
        module, _, name = application["import_path"].partition(":")
        assert callable(getattr(import_module(module), name))
        config_from_arguments(ServeConfig, application["args"])


def unknown_keys(kind: Any, value: Any, path: str = "") -> list[str]:
    """Keys of `value` that the model in the annotation `kind` does not have; Ray's own models let them pass."""
    if isinstance(value, list):
        return [key for item in value for key in unknown_keys(kind, item, path)]
    model = find_model(kind)
    if model is None or not isinstance(value, dict):
        return []
    fields = {**model.model_fields, **{field.alias: field for field in model.model_fields.values() if field.alias}}
    strays = [f"{path}{key}" for key in value if key not in fields]
    known = {key: inner for key, inner in value.items() if key in fields}
    return strays + [
        key for name, inner in known.items() for key in unknown_keys(fields[name].annotation, inner, f"{path}{name}.")
    ]


def find_model(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for found in map(find_model, get_args(kind)) if found is not None), None)
