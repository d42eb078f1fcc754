"""`ray up`'s files: what Ray and the cloud know, the head out of the work, nothing open."""

from pathlib import Path

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from polar_ray.deployment.settings import ScoreDeploymentConfig

FOLDER = Path(__file__).parents[3] / "cluster" / "ray-up"
FILES = sorted(FOLDER.glob("*.yaml"))


def given(file):
    return yaml.safe_load(file.read_text())


def test_there_is_a_file_for_either_cloud():
    assert [file.name for file in FILES] == ["aws.yaml", "gcp.yaml"]
    assert [given(file)["provider"]["type"] for file in FILES] == ["aws", "gcp"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ray_knows_every_key(file):
    validate_config(prepare_config(given(file)))


@pytest.mark.parametrize("place", [(), ("auth",), ("docker",), ("available_node_types", "head")], ids=str)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_misspelt_key_is_found(file, place):
    config = given(file)
    section = config
    for step in place:
        section = section[step]
    section["misspelt"] = 1
    with pytest.raises(ValidationError, match="misspelt"):
        validate_config(prepare_config(config))


def faults_of(node_config):
    ec2 = botocore.session.get_session().get_service_model("ec2")
    numbers = {"MinCount": 1, "MaxCount": 1}  # Ray's to add
    return ParamValidator().validate(node_config | numbers, ec2.operation_model("RunInstances").input_shape)


def test_ec2_knows_every_key_of_its_nodes():
    for node in given(FOLDER / "aws.yaml")["available_node_types"].values():
        assert not faults_of(node["node_config"]).has_errors()
        assert faults_of(node["node_config"] | {"ImageID": "ami-0"}).has_errors()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_heads_are_steady_and_idle_and_workers_come_from_none_on_spot_capacity(file):
    config = given(file)
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["gpu_spot"]
    assert config["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert (worker["min_workers"], worker["max_workers"]) == (0, config["max_workers"])
    spot = [
        node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        or {"preemptible": True} in node["node_config"].get("scheduling", [])
        for node in (head, worker)
    ]
    assert spot == [False, True]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_image_is_the_manifests(file):
    assert given(file)["docker"]["image"] == ScoreDeploymentConfig().image


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_token_is_asked_for_and_the_dashboard_is_not_open(file):
    config = given(file)
    (mounted,) = config["file_mounts"]
    assert config["docker"]["run_options"][:2] == [
        "--env RAY_AUTH_MODE=token",
        f"--env RAY_AUTH_TOKEN_PATH={mounted}",
    ]
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "--num-cpus=0" in start.split()
