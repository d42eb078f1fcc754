"""The same job against a real S3 server: listing, reading, atomic commits, resuming."""

import time

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from polar_ray import score_parquet
from polar_ray.config import ScoreConfig
from polar_ray.errors import InputError, ManifestConflict
from tests.ray.conftest import make_table
from tests.serve.conftest import free_port
from tests.support.flaky_s3 import flaky_s3

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.usefixtures("cluster")]

CONFIG = ScoreConfig.model_validate({"engine": {"kind": "fake"}, "unit_rows": 8, "actors": 2})


@pytest.fixture(scope="module")
def server():
    """The address of an S3 server on the loopback."""
    with flaky_s3(free_port()) as server:
        yield server.address


@pytest.fixture
def bucket(server):
    """(URL of a place in a fresh bucket, the query that leads there, a filesystem to look with)."""
    query = f"?scheme=http&endpoint_override={server.replace(':', '%3A')}"
    name = f"corpus{time.monotonic_ns()}"
    look = fs.S3FileSystem(scheme="http", endpoint_override=server, allow_bucket_creation=True)
    look.create_dir(name)
    return f"s3://{name}", query, look


def test_a_corpus_on_s3_is_scored_and_resumed(bucket):
    url, query, look = bucket
    name = url.removeprefix("s3://")
    for part in range(3):
        with look.open_output_stream(f"{name}/in/language=en/{part}.parquet") as sink:
            pq.write_table(make_table(4, first=part), sink, row_group_size=8)
    summary = score_parquet(f"{url}/in{query}", f"{url}/out{query}", CONFIG)
    assert (summary.rows, summary.units) == (48, 6)
    files = [info.path for info in look.get_file_info(fs.FileSelector(f"{name}/out", recursive=True)) if info.is_file]
    parts = sorted(path for path in files if path.endswith(".parquet"))
    assert [path.removeprefix(f"{name}/out/") for path in parts] == [
        f"language=en/part-{index:06d}.parquet" for index in range(6)
    ]
    assert not [path for path in files if path.endswith(".tmp")]
    look.delete_file(parts[2])
    again = score_parquet(f"{url}/in{query}", f"{url}/out{query}", CONFIG)
    assert again.resumed_units == 5
    with look.open_input_file(parts[2]) as source:
        assert pq.read_table(source)["reward"].null_count == 0
    globbed = score_parquet(f"{url}/in/**/[01].parquet{query}", f"{url}/globbed{query}", CONFIG)
    assert globbed.rows == 32
    with pytest.raises(ManifestConflict, match="is no longer among the inputs"):
        score_parquet(f"{url}/in/**/[01].parquet{query}", f"{url}/out{query}", CONFIG)


def test_a_bucket_that_is_not_there_is_one_clear_sentence(bucket):
    url, query, _ = bucket
    with pytest.raises(InputError, match=r"no such file or folder|cannot be listed"):
        score_parquet(f"{url}-absent/in{query}", "/tmp/never-written", CONFIG)
