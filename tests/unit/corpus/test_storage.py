"""Places on local disks and behind URLs, and commits that nobody ever sees a part of."""

import os
import pickle
import resource
import threading

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from polar_ray.corpus import storage
from polar_ray.corpus.storage import Location
from polar_ray.errors import InputError

AWKWARD_NAMES = ["a b", "at=10%3A30", "no.1#2", "数据", "a+b&c", "é"]
REALLY_AWKWARD_NAMES = {"": ["100%", "what?", "x[1]"], "file://": ["100%", "what?", "x[1]"], "memory://": []}


def names_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_relative_path_becomes_absolute_and_normal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Location("./a/../b.parquet").absolute().url == str(tmp_path / "b.parquet")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Location("~/corpus/").path == str(tmp_path / "corpus")


def test_a_file_url_and_its_path_are_one_place(tmp_path):
    assert Location(f"file://{tmp_path}/a%20b").absolute() == Location(f"{tmp_path}/a b").absolute()


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (scheme, name)
        for scheme in ("", "file://", "memory://")
        for name in AWKWARD_NAMES + REALLY_AWKWARD_NAMES[scheme]
    ],
)
def test_any_name_can_be_joined_written_listed_and_read(tmp_path, scheme, name):
    folder = Location(f"{scheme}{tmp_path}").join(name)
    folder.make_folder()
    folder.join("f " + name).write_atomically(b"here")
    (found,) = folder.walk()
    assert found.path == f"{folder.path}/f {name}"
    assert folder.join("f " + name).read_bytes() == b"here"
    assert folder.path.endswith(f"/{name}")


def test_names_in_an_object_store_are_quoted_on_the_way_and_whole_on_arrival():
    place = Location("s3://bucket/in?region=us-east-1").join("city=New York", "at=10%3A30", "数#1?.parquet")
    assert place.path == "bucket/in/city=New York/at=10%3A30/数#1?.parquet"
    assert place.url.endswith(".parquet?region=us-east-1")


def test_a_url_may_be_typed_with_spaces_and_letters_beyond_ascii():
    assert Location("s3://bucket/我的 数据?region=us-east-1").path == "bucket/我的 数据"


def test_the_query_of_a_url_stays_at_its_end():
    joined = Location("memory://corpus/?endpoint=x").join("a", "b.parquet")
    assert joined.url == "memory://corpus/a/b.parquet?endpoint=x"


def test_an_unknown_scheme_is_an_input_error():
    with pytest.raises(InputError, match="nosuch://x: no filesystem for this address"):
        Location("nosuch://x").info()


def test_an_address_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(InputError, match="credentials") as refusal:
        Location("s3://key:secret@bucket/corpus")
    assert "secret" not in str(refusal.value)


def test_a_container_of_azure_is_no_credential():
    assert Location("abfs://corpus@account.dfs.core.windows.net/in").join("x").url.endswith("/in/x")


def test_a_place_travels_as_its_text(tmp_path):
    place = Location(str(tmp_path))
    assert place.exists()  # resolved: the filesystem itself could not travel
    assert pickle.loads(pickle.dumps(place)) == place


def test_a_walk_is_sorted_and_leaves_hidden_names_out(tmp_path):
    for name in ["b/2", "b/10", "a", "_polar_ray/x", ".git/x", "b/_SUCCESS", "b/.a.crc", "c/_d/e"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    below = [info.path.removeprefix(f"{tmp_path}/") for info in Location(str(tmp_path)).walk()]
    assert below == ["a", "b/10", "b/2"]


def test_a_folder_below_a_hidden_one_is_not_hidden_to_a_walk_that_starts_there(tmp_path):
    (tmp_path / ".cache/in").mkdir(parents=True)
    (tmp_path / ".cache/in/a").touch()
    assert len(Location(str(tmp_path / ".cache/in")).walk()) == 1


def test_a_walk_of_nothing_is_empty(tmp_path):
    assert Location(str(tmp_path / "absent")).walk() == []


def test_deleting_takes_files_and_folders_and_forgives_absence(tmp_path):
    (tmp_path / "folder/inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "absent"):
        Location(str(tmp_path / name)).delete()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"new", pa.py_buffer(b"new"), b"x" * (storage.UPLOAD_CHUNK_BYTES + 1)])
def test_a_write_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path, content):
    (tmp_path / "f").write_bytes(b"old and longer")
    Location(str(tmp_path / "f")).write_atomically(content)
    assert (tmp_path / "f").read_bytes() == bytes(content)
    assert names_below(tmp_path) == ["f"]


def test_a_full_disk_leaves_neither_a_part_nor_the_old_file_changed(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Location(str(tmp_path / "f")).write_atomically(os.urandom(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_below(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_rename_that_fails_leaves_nothing_aside(tmp_path):
    (tmp_path / "f/inner").mkdir(parents=True)
    with pytest.raises(OSError, match=r"rename|move|directory"):
        Location(str(tmp_path / "f")).write_atomically(b"new")
    assert names_below(tmp_path) == []


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    place, contents = Location(str(tmp_path / "f")), {bytes([letter]) * 100_000 for letter in b"abc"}
    place.write_atomically(min(contents))
    done = threading.Event()

    def write() -> None:
        for _ in range(20):
            for content in contents:
                place.write_atomically(content)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add((tmp_path / "f").read_bytes())
    writer.join()
    assert seen <= contents


class BreakingFileSystem(MemoryFileSystem):
    """Storage that gives out in the middle of a write, or at the rename."""

    protocol = "breaking"
    breaks_at = "write"

    def open(self, path, mode="rb", **options):
        file = super().open(path, mode, **options)
        if "w" in mode and self.breaks_at == "write":
            whole = file.write

            def write(content):
                whole(bytes(content)[: len(content) // 2])
                raise OSError("the connection broke")

            file.write = write
        return file

    def mv(self, *arguments, **options):
        if self.breaks_at == "move":
            raise OSError("the connection broke")
        super().mv(*arguments, **options)


@pytest.mark.parametrize("breaks_at", ["write", "move"])
def test_storage_that_gives_out_midway_shows_no_part_of_the_file(monkeypatch, breaks_at):
    fsspec.register_implementation("breaking", BreakingFileSystem, clobber=True)
    monkeypatch.setattr(BreakingFileSystem, "breaks_at", breaks_at)
    monkeypatch.setattr(BreakingFileSystem, "store", {})
    folder = Location("breaking://out")
    folder.make_folder()
    with pytest.raises(OSError, match="the connection broke"):
        folder.join("part.parquet").write_atomically(b"0123456789")
    assert BreakingFileSystem.store == {}


def test_storage_without_renames_of_its_own_commits_through_fsspec(monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    folder = Location("memory://out")
    folder.make_folder()
    folder.join("part.parquet").write_atomically(b"whole")
    assert [info.base_name for info in folder.walk()] == ["part.parquet"]
    assert list(MemoryFileSystem.store) == ["/out/part.parquet"]


def test_a_sweep_by_a_second_run_in_the_middle_of_a_write_costs_nothing(tmp_path, monkeypatch):
    place = Location(str(tmp_path / "part.parquet"))
    write, swept = Location._write, []

    def write_then_be_swept(self, path, content):
        write(self, path, content)
        if not swept:
            swept.append(path)
            os.unlink(path)

    monkeypatch.setattr(Location, "_write", write_then_be_swept)
    place.write_atomically(b"whole")
    assert (tmp_path / "part.parquet").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["part.parquet"]


@pytest.mark.parametrize("query", ["X-Amz-Signature=abc", "a=1&sig=abc", "secret_key=abc"])
def test_an_address_that_grants_access_by_itself_is_refused_unseen(query):
    with pytest.raises(InputError, match="credentials") as refusal:
        Location(f"https://bucket.example/x.parquet?{query}")
    assert "abc" not in str(refusal.value)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(storage, "LONGEST_PAUSE_SECONDS", 0.01)


class Moody:
    """Fails so many times, then gives what it was asked for."""

    def __init__(self, error, times):
        self.error, self.left, self.asked = error, times, 0

    def __call__(self):
        self.asked += 1
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return "content"


@pytest.mark.parametrize(
    "message",
    [
        "When reading 'x': AWS Error SLOW_DOWN during HeadObject operation: m",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "AWS Error NETWORK_CONNECTION during CreateMultipartUpload operation: curlCode: 52",
        "google::cloud::Status(UNAVAILABLE: )",
    ],
)
@pytest.mark.usefixtures("hasty")
def test_an_object_store_that_is_out_for_a_while_is_asked_again(message, monkeypatch):
    said = []
    monkeypatch.setattr(storage.log, "warning", lambda text, *values: said.append(text % values))
    moody = Moody(OSError(message), 5)
    assert Location("memory://corpus").patiently(moody) == "content"
    assert moody.asked == 6
    assert len(said) == 5
    assert "attempt 5 failed" in said[-1]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("x"),
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: m"),
        ValueError("no error of a storage"),
    ],
)
@pytest.mark.usefixtures("hasty")
def test_what_waiting_does_not_mend_is_raised_at_once(error):
    moody = Moody(error, 1)
    with pytest.raises(type(error)):
        Location("memory://corpus").patiently(moody)
    assert moody.asked == 1


@pytest.mark.usefixtures("hasty")
def test_patience_has_an_end():
    moody = Moody(OSError("AWS Error SLOW_DOWN"), 10**9)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        Location("memory://corpus").patiently(moody)
    assert moody.asked > 3


@pytest.mark.usefixtures("hasty")
def test_a_local_disk_is_not_waited_for(tmp_path):
    moody = Moody(OSError(28, "No space left on device"), 1)
    with pytest.raises(OSError, match="No space left"):
        Location(str(tmp_path)).patiently(moody)
    assert moody.asked == 1
