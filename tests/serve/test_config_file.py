"""The Serve config files that ship: every key is known to whoever reads it."""

from pathlib import Path

import pytest
import yaml

from polar_ray.config import ServeConfig, config_from_arguments
from polar_ray.errors import ConfigError
from tests.support.serve_files import check_serve_config, unknown_keys

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = sorted((CLUSTER / "serve").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_config_file_says_only_what_ray_and_polar_ray_know(file):
    check_serve_config(yaml.safe_load(file.read_text()))


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
