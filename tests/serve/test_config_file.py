"""The Serve config files that ship: every key is known to whoever reads it."""

from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from polar_ray.config import ServeConfig, config_from_arguments
from polar_ray.errors import ConfigError

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = sorted((CLUSTER / "serve").glob("*.yaml"))


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_config_file_says_only_what_ray_and_polar_ray_know(file):
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(file.read_text())
    assert unknown_keys(ServeDeploySchema, given) == []
    ServeDeploySchema.model_validate(given)
    for application in given["applications"]:
        module, _, name = application["import_path"].partition(":")
        assert callable(getattr(import_module(module), name))
        config_from_arguments(ServeConfig, application["args"])


def test_there_is_a_config_file():
    assert [file.name for file in FILES] == ["polar.yaml"]
    assert "serve/polar.yaml" in (CLUSTER / "README.md").read_text()


@pytest.mark.parametrize(
    "place",
    [(), ("http_options",), ("logging_config",), ("applications", 0)],
    ids=lambda place: ".".join(map(str, place)),
)
def test_a_misspelt_key_of_rays_is_found(place):
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(FILES[0].read_text())
    section = given
    for step in place:
        section = section[step]
    section["misspelt"] = 1
    assert [key.rpartition(".")[2] for key in unknown_keys(ServeDeploySchema, given)] == ["misspelt"]


def test_a_misspelt_setting_is_refused():
    args = yaml.safe_load(FILES[0].read_text())["applications"][0]["args"]
    args["queue"]["bulk_shares"] = 0.5
    with pytest.raises(ConfigError, match=r"queue\.bulk_shares"):
        config_from_arguments(ServeConfig, args)
