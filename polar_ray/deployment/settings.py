"""Settings of a deployment on Kubernetes: what `polar-ray cluster render` fills its manifests with."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from polar_ray.config.base import Settings, parse_range

LONGEST_NAME = 47
"""Characters. KubeRay (v1.7, utils/constant.go) refuses a RayService or RayJob whose cluster's name would pass 53."""

IMAGE_JOBS = "/opt/polar_ray/jobs"
"""Where cluster/image/Dockerfile puts the folder jobs/."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=LONGEST_NAME)]
ObjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
Namespace = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Address = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$")]
Image = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][-a-zA-Z0-9._/:]*(@sha256:[0-9a-f]{64})?$")]


def _check_count(given: int | str) -> int | str:
    try:
        low, high = parse_range(given)
    except ValueError:
        low, high = 1, 0
    if not 0 <= low <= high:
        raise ValueError("expected a number or MIN:MAX with MIN <= MAX")
    return given


Count = Annotated[int | str, AfterValidator(_check_count)]


class HeadConfig(Settings):
    """The node that runs Ray's own services and a job's driver, and no engine. Never on spot capacity."""

    cpus: int = Field(4, ge=1)
    """CPUs."""

    memory_gib: int = Field(16, ge=4)
    """Memory. A job's driver hashes the weights here, a file at a time."""

    disk_gib: int = Field(64, ge=10)
    """Disk: logs, and the weights where `model_cache` names no claim."""


class WorkersConfig(Settings):
    """The nodes with the engines."""

    spot: Count = "0:8"
    """Nodes that tolerate spot capacity, and are asked for first: a number, MIN:MAX, or 0 for none."""

    steady: Count = 0
    """Nodes that do not: what must not be preempted."""

    gpus: int = Field(1, ge=0)
    """GPUs of one node; 0: engines on CPUs."""

    cpus: int = Field(8, ge=1)
    """CPUs of one node."""

    memory_gib: int = Field(64, ge=4)
    """Memory of one node, shared memory included."""

    shared_memory_gib: int = Field(8, ge=1)
    """/dev/shm: three quarters are Ray's object store, the rest is for ranks of one engine."""

    disk_gib: int = Field(100, ge=10)
    """Disk of one node: logs, spilled objects, and the weights where `model_cache` names no claim."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have, such as {"nvidia.com/gpu.product" = "NVIDIA-H200"}."""

    idle_timeout_s: int = Field(300, ge=0)
    """How long a node may have nothing to do before it is given back."""

    @property
    def groups(self) -> dict[str, tuple[int, int]]:
        """Group of nodes to (fewest, most), without the empty ones."""
        counts = {"spot": parse_range(self.spot), "steady": parse_range(self.steady)}
        return {name: count for name, count in counts.items() if count[1]}

    @property
    def most(self) -> int:
        """Nodes at most."""
        return sum(most for _, most in self.groups.values())

    @property
    def fewest(self) -> int:
        """Nodes at least."""
        return sum(fewest for fewest, _ in self.groups.values())

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not self.most:
            raise ValueError("spot and steady are both 0; one of them needs a node")
        if self.shared_memory_gib >= self.memory_gib:
            raise ValueError(
                f"shared_memory_gib = {self.shared_memory_gib}: leaves nothing of memory_gib = {self.memory_gib}"
            )
        return self


class ModelCacheConfig(Settings):
    """Where downloaded models are kept. Left out: on each node's own disk, for as long as the node lives."""

    claim: ObjectName | None = None
    """A PersistentVolumeClaim that all nodes can mount (ReadWriteMany)."""

    create_gib: int | None = Field(None, ge=1)
    """Make the claim too, of this size."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.create_gib is not None and self.claim is None:
            raise ValueError("create_gib: needs claim, the name of what is made")
        return self


class GcsConfig(Settings):
    """Where the cluster's own state is kept, so that it outlives its head."""

    backend: Literal["none", "rocksdb", "redis"] = "none"
    """`rocksdb`: on a volume of the head's, for which KubeRay's operator must be started with
    --feature-gates=GCSFaultToleranceEmbeddedStorage=true. `redis`: a server of yours. `none`: a lost head takes the
    cluster with it."""

    size_gib: int = Field(1, ge=1)
    """Of rocksdb's volume."""

    redis_address: Address | None = None
    """host:port."""

    redis_secret: ObjectName | None = None
    """Secret with the key `password`."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.backend == "redis") != (self.redis_address is not None):
            raise ValueError("redis_address: is for backend = redis, which needs it")
        if self.redis_secret is not None and self.backend != "redis":
            raise ValueError("redis_secret: is for backend = redis")
        return self


class CallerConfig(Settings):
    """Pods that may reach the endpoint."""

    namespace: Namespace | None = None
    """Theirs. Left out: the endpoint's own."""

    labels: dict[str, str] = Field(default_factory=dict)
    """That they have. Left out: any pod of the namespace."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.namespace is None and not self.labels:
            raise ValueError("name a namespace, or labels, or both")
        return self


class DeploymentConfig(Settings):
    """What every deployment has."""

    name: Name
    """Of the object, and of the cluster that KubeRay makes for it."""

    namespace: Namespace = "polar-ray"
    """Where everything is put. It must exist."""

    image: Image = f"registry.example/polar-ray:{version('polar_ray')}-cuda"
    """Made from cluster/image/Dockerfile. Pin a digest (NAME@sha256:...) for work that must be repeatable."""

    image_pull_secret: ObjectName | None = None
    """Secret for a private registry."""

    ray_version: str = Field(version("ray"), pattern=r"^\d+\.\d+\.\d+$")
    """Of Ray in the image. Left out: the one that is installed here."""

    ray_token_secret: ObjectName | None = None
    """Secret with the key `auth_token`, Ray's own token. Left out: KubeRay makes one for each cluster."""

    service_account: ObjectName | None = None
    """Of the pods, for access to object storage by workload identity."""

    environment_secret: ObjectName | None = None
    """Secret whose keys become environment variables of the pods: HF_TOKEN, AWS_ACCESS_KEY_ID and the like."""

    operator_namespace: Namespace = "kuberay-system"
    """Where KubeRay's operator runs, which must reach the dashboard's port."""

    monitoring_namespace: Namespace | None = None
    """Where a Prometheus runs that may scrape the pods."""

    storage_class: ObjectName | None = None
    """Of all claims that are made. Left out: the cluster's default."""

    head: HeadConfig = HeadConfig()
    workers: WorkersConfig = WorkersConfig()
    model_cache: ModelCacheConfig = ModelCacheConfig()
    gcs: GcsConfig = GcsConfig()

    @model_validator(mode="before")
    @classmethod
    def _sections_start_from_this_kinds(cls, values: Any) -> Any:
        """A section that is given in part keeps the rest of this kind's defaults, not of the section's own."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {
            name: {**defaults[name].model_dump(), **given}
            if isinstance(defaults.get(name), Settings) and isinstance(given, dict)
            else given
            for name, given in values.items()
        }


class ServeDeploymentConfig(DeploymentConfig):
    """An endpoint, as a RayService."""

    name: Name = "polar"
    workers: WorkersConfig = WorkersConfig(spot="0:7", steady="1:1")
    gcs: GcsConfig = GcsConfig(backend="rocksdb")

    tokens_secret: ObjectName = "polar-tokens"
    """Secret with the key `tokens`: callers' tokens, one a line. Changed tokens are taken up without a restart."""

    callers: tuple[CallerConfig, ...] = Field((CallerConfig(labels={"polar-ray/caller": "true"}),), min_length=1)
    """Who may reach port 8000; all others are kept away by a NetworkPolicy."""

    haproxy: bool = True
    """Ray Serve's HAProxy before the replicas instead of its Python proxy, which passes fewer requests a second."""

    serve: dict[str, Any] = Field(default_factory=dict)
    """Settings of the endpoint that differ from cluster/serve/polar.yaml, such as serve.model=internlm/POLAR-1_8B."""


class JobDeploymentConfig(DeploymentConfig):
    """A run to its end, as a RayJob. The head of a job's cluster runs its driver, so it keeps no state to outlive it:
    a lost head is a new cluster, on which the same command goes on."""

    inputs: tuple[Address, ...] = Field(min_length=1)
    """As on the command line."""

    output: Address
    """As on the command line; what a second start goes on from, so not a folder of a node's own."""

    config: Address | None
    """TOML file of settings in the image."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ from `config`, such as settings.model=internlm/POLAR-1_8B."""

    retries: int = Field(3, ge=0)
    """Clusters to try again with after a failure; finished units and checkpoints are kept."""

    keep_s: int = Field(600, ge=0)
    """How long the finished job's cluster is kept, for its logs."""


class ScoreDeploymentConfig(JobDeploymentConfig):
    """A corpus job."""

    name: Name = "polar-score"
    inputs: tuple[Address, ...] = Field(("s3://corpus/triples",), min_length=1)
    output: Address = "s3://corpus/scored"
    config: Address | None = f"{IMAGE_JOBS}/score/polar_7b.toml"


class TrainDeploymentConfig(JobDeploymentConfig):
    """A training run."""

    name: Name = "polar-train"
    inputs: tuple[Address, ...] = Field(("s3://corpus/pairs",), min_length=1)
    output: Address = "s3://models/polar-7b-tuned"
    config: Address | None = f"{IMAGE_JOBS}/train/polar_7b.toml"
    workers: WorkersConfig = WorkersConfig(gpus=8, cpus=64, memory_gib=512, shared_memory_gib=64, spot=0, steady="0:1")
