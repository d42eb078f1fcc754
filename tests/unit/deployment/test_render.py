"""Rendered manifests: what Kubernetes, KubeRay, Ray and polar_ray would each refuse, and what a setting changes."""

import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from polar_ray.config import ScoreConfig, ServeConfig, TrainConfig, load_config
from polar_ray.deployment.render import SETTINGS, render
from polar_ray.deployment.settings import IMAGE_JOBS
from polar_ray.errors import ConfigError
from tests.support.crds import crd_faults
from tests.support.serve_files import check_serve_config

PROJECT = Path(__file__).parents[3]
KUBERNETES = "1.34"
KINDS = list(SETTINGS)

EVERYTHING = [
    'image="ghcr.io/me/polar-ray@sha256:' + "0" * 64 + '"',
    "image_pull_secret=registry",
    "ray_token_secret=ray-token",
    "service_account=reader",
    "environment_secret=keys",
    "monitoring_namespace=monitoring",
    "storage_class=fast",
    "workers.spot=1:3",
    "workers.steady=8",
    "workers.gpus=4",
    'workers.node_selector={"nvidia.com/gpu.product" = "NVIDIA-H200"}',
    "model_cache.claim=models",
    "model_cache.create_gib=200",
]
FOR_KIND = {
    "serve": [
        "gcs.backend=redis",
        "gcs.redis_address=redis:6379",
        "gcs.redis_secret=redis",
        'callers=[{namespace = "training"}, {namespace = "eval", labels = {app = "judge"}}, {labels = {a = "b"}}]',
        "haproxy=false",
        "serve.engine.tensor_parallel_size=2",
    ],
    "score": ['inputs=["s3://a/*.parquet", "s3://b/it\'s"]', "settings.engine.dtype=bfloat16", "gcs.backend=rocksdb"],
    "train": ["settings.epochs=2", "settings.packs_per_step=44", "retries=0"],
}
CASES = [(kind, []) for kind in KINDS] + [(kind, EVERYTHING + FOR_KIND[kind]) for kind in KINDS]
case_names = [f"{kind}-{'everything' if settings else 'defaults'}" for kind, settings in CASES]


def rendered(kind, *settings):
    return list(yaml.safe_load_all(render(load_config(SETTINGS[kind], None, settings))))


def cluster_of(manifest):
    spec = manifest["spec"]
    return spec["rayClusterConfig"] if manifest["kind"] == "RayService" else spec["rayClusterSpec"]


def pod_specs(manifest):
    """Every pod's spec that is written in a manifest, by what the pod is."""
    cluster = cluster_of(manifest)
    found = {"head": cluster["headGroupSpec"]["template"]["spec"]}
    found |= {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    if submitter := manifest["spec"].get("submitterPodTemplate"):
        found["submitter"] = submitter["spec"]
    return found


def settings_in(entrypoint):
    """(positional words, options) of a rendered command."""
    words = shlex.split(entrypoint)
    named = [(word, words[n + 1]) for n, word in enumerate(words) if word.startswith("--")]
    positional = words[: min(n for n, word in enumerate(words) if word.startswith("--"))]
    return positional, named


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_repository_shows_is_what_the_verb_renders(kind):
    shown = (PROJECT / "cluster" / "kuberay" / f"{kind}.yaml").read_text()
    assert shown == render(SETTINGS[kind]()), f"polar-ray cluster render {kind} --output cluster/kuberay/{kind}.yaml"


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=case_names)
def test_kuberays_definitions_know_every_key(kind, settings):
    assert crd_faults(rendered(kind, *settings)[0]) == []


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("serve", ()),
        ("serve", ("rayClusterConfig",)),
        ("serve", ("rayClusterConfig", "autoscalerOptions")),
        ("score", ("rayClusterSpec", "workerGroupSpecs", 0)),
        ("score", ("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "livenessProbe")),
        ("train", ("submitterPodTemplate", "spec")),
    ],
    ids=str,
)
def test_a_misspelt_key_is_found(kind, place):
    manifest = rendered(kind)[0]
    section = manifest["spec"]
    for step in place:
        section = section[step]
    section["misspelt"] = 1
    (fault,) = crd_faults(manifest)
    assert "misspelt" in fault


def test_a_value_of_the_wrong_type_is_found():
    manifest = rendered("serve")[0]
    cluster_of(manifest)["workerGroupSpecs"][0]["maxReplicas"] = "7"
    assert crd_faults(manifest)


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=case_names)
def test_kubernetes_knows_every_key_of_its_own_objects(kind, settings):
    own = [manifest for manifest in rendered(kind, *settings) if not manifest["apiVersion"].startswith("ray.io")]
    claims = ["PersistentVolumeClaim"] if settings else []
    assert [manifest["kind"] for manifest in own] == ["NetworkPolicy", *claims]
    for manifest in own:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_misspelt_key_of_a_policy_is_found():
    policy = rendered("serve")[1]
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    with pytest.raises(kubernetes_validate.ValidationError, match="ingres"):
        kubernetes_validate.validate(policy, KUBERNETES, strict=True)


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=case_names)
def test_every_pod_is_what_kubernetes_calls_restricted(kind, settings):
    pods = pod_specs(rendered(kind, *settings)[0])
    assert len(pods) >= 2
    for pod in pods.values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all({"emptyDir", "persistentVolumeClaim", "secret"} & volume.keys() for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=case_names)
def test_no_secret_is_written_out(kind, settings):
    manifests = rendered(kind, *settings)
    assert "Secret" not in [manifest["kind"] for manifest in manifests]
    literal = {
        name["name"]
        for pod in pod_specs(manifests[0]).values()
        for container in pod["containers"]
        for name in container.get("env", [])
        if "value" in name
    }
    assert literal <= {"HF_HOME", "RAY_USAGE_STATS_ENABLED", "RAY_SERVE_ENABLE_HA_PROXY"}


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=case_names)
def test_rays_ports_are_open_to_the_cluster_and_the_operator_alone(kind, settings):
    cluster, policy = rendered(kind, *settings)[:2]
    spec = cluster_of(cluster)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    name = {"polar-ray/cluster": cluster["metadata"]["name"]}
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    assert all(template["metadata"]["labels"].items() >= name.items() for template in templates)
    assert policy["spec"]["podSelector"] == {"matchLabels": name}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    own, operator, *others = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": name}}]}
    (peer,) = operator["from"]
    assert peer["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert peer["namespaceSelector"]
    submitter = {"ray.io/originated-from-cr-name": cluster["metadata"]["name"], "ray.io/originated-from-crd": "RayJob"}
    for rule in others:
        ports = {port["port"] for port in rule["ports"]}
        is_submitter = rule["from"] == [{"podSelector": {"matchLabels": submitter}}]
        assert ports == {8265} if is_submitter else ports <= {8000, 8080}


def test_callers_are_let_in_by_namespace_by_label_or_by_both():
    _, policy, _ = rendered("serve", *EVERYTHING, *FOR_KIND["serve"])
    (rule,) = [rule for rule in policy["spec"]["ingress"] if rule.get("ports") == [{"protocol": "TCP", "port": 8000}]]

    def namespace(name):
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}

    assert rule["from"] == [
        namespace("training"),
        namespace("eval") | {"podSelector": {"matchLabels": {"app": "judge"}}},
        {"podSelector": {"matchLabels": {"a": "b"}}},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_has_no_work_and_no_spot_capacity(kind):
    head = cluster_of(rendered(kind)[0])["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["num-gpus"] == "0"
    assert "tolerations" not in head["template"]["spec"]
    assert "nvidia.com/gpu" not in str(head)


def test_spot_nodes_and_steady_ones_differ_in_what_they_tolerate_and_nothing_else():
    spot, steady = cluster_of(rendered("score", "workers.steady=0:2")[0])["workerGroupSpecs"]
    assert (spot["groupName"], spot["minReplicas"], spot["maxReplicas"]) == ("spot", 0, 8)
    assert (steady["groupName"], steady["minReplicas"], steady["maxReplicas"]) == ("steady", 0, 2)
    assert spot["priority"] > steady["priority"]
    tolerated = [{toleration["key"] for toleration in g["template"]["spec"].pop("tolerations")} for g in (spot, steady)]
    assert tolerated[1] == {"nvidia.com/gpu"}
    assert tolerated[0] - tolerated[1] == {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "spot"}
    assert spot["template"] == steady["template"]
    assert [group["labels"]["ray.io/market-type"] for group in (spot, steady)] == ["spot", "on-demand"]


def test_workers_are_asked_for_as_the_settings_say():
    groups = cluster_of(rendered("score", *EVERYTHING)[0])["workerGroupSpecs"]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
        store = int(group["rayStartParams"]["object-store-memory"])
        (shared,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-mem"]
        assert shared == {"medium": "Memory", "sizeLimit": "8Gi"}
        assert store == 6 << 30


def test_rays_autoscaler_reads_what_is_meant():
    from ray._private.label_utils import parse_node_labels_string
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = cluster_of(rendered("score", "workers.gpus=4", "workers.steady=1:2", "workers.idle_timeout_s=77")[0])
    for template in [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]:
        resources = template["spec"]["containers"][0]["resources"]
        for kind, amounts in resources.items():
            resources[kind] = {name: str(amount) for name, amount in amounts.items()}  # as Kubernetes gives them back
    read = _derive_autoscaling_config_from_ray_cr({"spec": cluster, "metadata": {"name": "a", "namespace": "b"}})
    nodes = read["available_node_types"]
    head = nodes.pop(read["head_node_type"])
    assert (head["resources"]["CPU"], head["resources"]["GPU"]) == (0, 0)
    assert {name: (node["min_workers"], node["max_workers"]) for name, node in nodes.items()} == {
        "spot": (0, 8),
        "steady": (1, 2),
    }
    for name, node in nodes.items():
        assert (node["resources"]["CPU"], node["resources"]["GPU"], node["idle_timeout_s"]) == (8, 4, 77)
        assert node["priority"] == (10 if name == "spot" else 0)
        label = "ray.io/market-type=" + ("spot" if name == "spot" else "on-demand")
        assert parse_node_labels_string(label) == node["labels"]


def test_haproxy_is_a_setting():
    def has_it(*settings):
        pods = pod_specs(rendered("serve", *settings)[0])
        wanted = {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"}
        return {wanted in pod["containers"][0]["env"] for pod in pods.values()}

    assert has_it() == {True}
    assert has_it("haproxy=false") == {False}


def test_the_endpoints_settings_are_those_of_the_serve_config_file():
    shown = yaml.safe_load((PROJECT / "cluster" / "serve" / "polar.yaml").read_text())
    given = yaml.safe_load(rendered("serve")[0]["spec"]["serveConfigV2"])
    check_serve_config(given)
    auth = given["applications"][0]["args"]["auth"]
    assert auth.pop("tokens_file") == "/etc/polar_ray/tokens"
    assert given == shown


@pytest.mark.parametrize("kind", ["head", "spot", "steady"])
def test_tokens_are_where_the_endpoint_looks_for_them(kind):
    pod = pod_specs(rendered("serve", "tokens_secret=callers")[0])[kind]
    (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "tokens"]
    assert mount["mountPath"] == "/etc/polar_ray"
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "tokens"]
    assert volume["secret"] == {"secretName": "callers", "defaultMode": 0o440}


def test_settings_of_the_endpoint_go_over_the_files():
    manifest = rendered("serve", "serve.model=internlm/POLAR-1_8B", "serve.queue.bulk_share=0.5")[0]
    given = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    check_serve_config(given)
    args = given["applications"][0]["args"]
    assert args["model"] == "internlm/POLAR-1_8B"
    assert args["queue"] == {"default_deadline_s": 300, "bulk_share": 0.5}
    assert ServeConfig(**args).replicas == "1:8"


def test_a_jobs_command_survives_the_shell():
    entrypoint = rendered("score", *EVERYTHING, *FOR_KIND["score"])[0]["spec"]["entrypoint"]
    words, options = settings_in(entrypoint)
    assert words == ["polar-ray", "score", "s3://a/*.parquet", "s3://b/it's"]
    assert options == [
        ("--output", "s3://corpus/scored"),
        ("--config", f"{IMAGE_JOBS}/score/polar_7b.toml"),
        ("--set", "engine.dtype=bfloat16"),
        ("--set", "actors=36:44"),
    ]


@pytest.mark.parametrize(("kind", "settings"), [("score", ScoreConfig), ("train", TrainConfig)])
def test_a_jobs_settings_are_settings_of_the_file_in_the_image(kind, settings):
    _, options = settings_in(rendered(kind)[0]["spec"]["entrypoint"])
    (file,) = [value for option, value in options if option == "--config"]
    there = PROJECT / "jobs" / Path(file).relative_to(IMAGE_JOBS)
    config = load_config(settings, there, [value for option, value in options if option == "--set"])
    assert config.model.startswith("internlm/POLAR-7B")
    assert getattr(config, "workers", 8) == 8


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("serve", "serve.queue.bulk_shares=1", "unknown setting 'queue.bulk_shares'"),
        ("serve", "serve.engine.tensor_parallel_size=2", "one engine asks for 2 GPUs and workers.gpus = 1"),
        ("serve", "serve.replica_cpus=9", "asks for 9 CPUs and workers.cpus = 8"),
        ("serve", "serve.replicas=9", "9 engines were asked for and 8 nodes hold 8"),
        ("serve", "serve.auth.mode=none", "wants tokens"),
        ("serve", "callers=[]", "at least 1 item"),
        ("serve", "callers=[{}]", "name a namespace, or labels"),
        ("serve", "gcs.backend=redis", "redis_address"),
        ("serve", "job.output=x", "unknown setting 'job'"),
        ("serve", "name=Polar_7B", "pattern"),
        ("serve", f"name={'p' * 48}", "at most 47 characters"),
        ("serve", 'image="x: y"', "pattern"),
        ("serve", "workers.steady=0:0", "8 engines were asked for and 7 nodes hold 7"),
        ("score", "workers.spot=0", "one of them needs a node"),
        ("score", "workers.spot=3:2", "MIN <= MAX"),
        ("score", "workers.shared_memory_gib=64", "leaves nothing of memory_gib = 64"),
        ("score", "settings.unit_row=3", "unknown setting 'unit_row'"),
        ("score", "settings.engine.tensor_parallel_size=2", "one engine asks for 2 GPUs"),
        ("score", 'output="s3://a\\nb"', "pattern"),
        ("score", "model_cache.create_gib=5", "needs claim"),
        ("train", "settings.workers=16", "16 engines were asked for and 1 nodes hold 8"),
    ],
)
def test_what_could_not_work_is_refused_before_a_node_is_paid_for(kind, setting, said):
    with pytest.raises(ConfigError, match=said):
        rendered(kind, setting)


def test_a_section_that_is_given_in_part_keeps_the_rest_of_its_kinds_defaults():
    train = load_config(SETTINGS["train"], None, ["workers.gpus=4"])
    assert (train.workers.gpus, train.workers.cpus, train.workers.steady) == (4, 64, "0:1")
