"""Files on local disks and object stores, through pyarrow's filesystems, or fsspec's where pyarrow has none.

A commit is one atomic step on either: a rename on a filesystem, the end of one upload on an object store.

Object stores slow down and go away for minutes, and the work of hundreds of GPUs must not end with that: what actors
read and write is tried again for a while. Local disks are not waited for: a full one does not empty itself.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from polar_ray.errors import InputError, OutputError

T = TypeVar("T")

UPLOAD_CHUNK_BYTES = 16 << 20

PATIENCE_SECONDS = 300.0
"""For which an object store is asked again; pyarrow itself gives up on S3 after 31 requests in about six seconds."""

LONGEST_PAUSE_SECONDS = 20.0

FINAL = re.compile(r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_|SIGNATURE|NOT_IMPLEMENTED|EXPIRED|UNRECOGNIZED|CREDENTIALS")
"""In errors of pyarrow's S3: what no waiting mends."""

log = logging.getLogger(__name__)

URI_MARKS = ":/?@!$&'()*+,;=%~"
"""What stays as it is when a URL is given to pyarrow, which refuses one with a space or a letter beyond ASCII in it."""


SECRETS = re.compile(r"(^|[?&])(access_key|secret_key|session_token|sig|[^&=]*signature)=", re.IGNORECASE)
"""Parameters of an address that grant access by themselves."""


@dataclass(frozen=True)
class Location:
    """A path or URL, with the filesystem it lies on. Only the text travels between processes."""

    url: str

    def __post_init__(self) -> None:
        authority = self.url.partition("://")[2].partition("/")[0]
        is_signed = "://" in self.url and SECRETS.search(self.url.partition("?")[2])
        if is_signed or ":" in authority.rpartition("@")[0]:  # abfs://container@account has none
            raise InputError(
                "an address with credentials in it would end up in manifests and logs; give them in the environment"
            )

    def __reduce__(self) -> tuple[type[Location], tuple[str]]:
        return Location, (self.url,)

    @cached_property
    def _resolved(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.url:
            return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(self.url))
        try:
            filesystem, path = fs.FileSystem.from_uri(quote(self.url, safe=URI_MARKS))
            return filesystem, path
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            if "Unrecognized filesystem type" not in str(error):
                raise InputError(f"{self.url}: not a usable address ({error})") from None
            return self._through_fsspec(error)
        except OSError as error:
            raise InputError(f"{self.url}: cannot be reached ({error})") from None

    def _through_fsspec(self, arrow_error: Exception) -> tuple[fs.FileSystem, str]:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise InputError(f"{self.url}: no filesystem for this address ({error}; pyarrow: {arrow_error})") from None
        return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._resolved[0]

    @property
    def path(self) -> str:
        """The path as its filesystem wants it."""
        return self._resolved[1].rstrip("/") or "/"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def absolute(self) -> Location:
        """The same place by a name that holds in any working directory."""
        return Location(self.path) if "://" not in self.url or self.url.startswith("file://") else self

    def join(self, *parts: str) -> Location:
        """The place below this one; a URL's query (an endpoint, say) stays at its end.

        `parts` are names as they are on the storage; pyarrow unquotes URLs, so in its URLs they are quoted.
        """
        base, question, query = self.url.partition("?") if "://" in self.url else (self.url, "", "")
        if "://" in self.url and not isinstance(self.filesystem, fs.PyFileSystem):
            parts = tuple(quote(part, safe="=") for part in parts)
        return Location("/".join([base.rstrip("/"), *parts]) + question + query)

    def info(self) -> fs.FileInfo:
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        return bool(self.info().type != fs.FileType.NotFound)

    def walk(self) -> list[fs.FileInfo]:
        """Every file below, sorted by path; hidden ones (a part beginning with `_` or `.`) left out. [] if absent."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        files = [info for info in self.filesystem.get_file_info(selector) if info.is_file]
        return sorted((info for info in files if not self._is_hidden(info.path)), key=lambda info: info.path)

    def _is_hidden(self, path: str) -> bool:
        return any(part.startswith(("_", ".")) for part in path.removeprefix(self.path).split("/"))

    def read_bytes(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            content: bytes = stream.read()
        return content

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def delete(self) -> None:
        """Remove a file or a folder with all in it. Nothing happens if it is not there."""
        info = self.info()
        if info.type == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif info.type == fs.FileType.File:
            self.filesystem.delete_file(self.path)

    def patiently(self, ask: Callable[[], T]) -> T:
        """What `ask` gives; on an object store it is asked again while its error may pass, for `PATIENCE_SECONDS`.

        `ask` may have had its effect although it raised: a reply can get lost.
        """
        if self.is_local:
            return ask()
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_random_exponential(max=LONGEST_PAUSE_SECONDS),
            stop=stop_after_delay(PATIENCE_SECONDS),
            before_sleep=self._log_retry,
            reraise=True,
        )
        return retrying(ask)

    def _log_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s: attempt %d failed, trying again (%s)", self.url, state.attempt_number, error)

    def commit(self, content: pa.Buffer | bytes) -> None:
        """As `write_atomically`, patiently. Raises `OutputError` when the storage refuses; then there is no such file.

        When an object store only lost its reply there may be one, and it is whole.
        """
        try:
            self.patiently(lambda: self.write_atomically(content))
        except (OSError, pa.ArrowException) as error:
            raise OutputError(
                f"{self.url}: cannot be written ({error}); mend that and run the same command again"
            ) from None

    def write_atomically(self, content: pa.Buffer | bytes, *, exclusively: bool = False) -> None:
        """Put `content` here so that nobody ever sees a part of it, whatever dies when. An existing file is replaced.

        With `exclusively` it is not, and `FileExistsError` raised: exactly on local disks, as far as looking first
        can tell on object stores.

        The file's folder must exist. Object stores show an upload only once it is complete; elsewhere a hidden file
        beside it is written, synced and renamed.
        """
        if exclusively and self.exists():
            raise FileExistsError(self.path)
        if self._uploads_atomically():
            self._write(self.path, content)
            return
        try:
            self._write_and_rename(content, exclusively)
        except FileNotFoundError:  # a second run of the same job sweeps away what looks left behind by a killed one
            self._write_and_rename(content, exclusively)

    def _write_and_rename(self, content: pa.Buffer | bytes, exclusively: bool) -> None:
        folder, name = os.path.split(self.path)
        aside = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        try:
            self._write(aside, content)
            if self.is_local:
                _sync(aside)
            if self.is_local and exclusively:
                os.link(aside, self.path)
                os.unlink(aside)
            else:
                self.filesystem.move(aside, self.path)
        except BaseException:
            if self.filesystem.get_file_info(aside).type != fs.FileType.NotFound:
                self.filesystem.delete_file(aside)
            raise

    def _uploads_atomically(self) -> bool:
        return self.filesystem.type_name in ("s3", "gcs", "abfs")

    def _write(self, path: str, content: pa.Buffer | bytes) -> None:
        view = memoryview(content)
        with self.filesystem.open_output_stream(path) as stream:
            for start in range(0, len(view), UPLOAD_CHUNK_BYTES):
                stream.write(view[start : start + UPLOAD_CHUNK_BYTES])


def _may_pass(error: BaseException) -> bool:
    """Whether an error of an object store may be gone in a minute."""
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, final) and not FINAL.search(str(error).upper())


def _sync(path: str) -> None:
    """The bytes must be on the disk before the name is: after a power cut a name means a whole file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
