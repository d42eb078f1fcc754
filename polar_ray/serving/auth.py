"""Who may ask: bearer tokens from a file or the environment, several at a time, rotatable while serving."""

from __future__ import annotations

import base64
import binascii
import hmac
from contextlib import suppress
from pathlib import Path

from polar_ray.config import AuthConfig, tokens_from_environment
from polar_ray.errors import ConfigError, Unauthorized

SHORTEST_TOKEN = 16
"""Characters; what is shorter can be guessed over a network."""


class Gate:
    """Lets a request pass that shows one of the tokens, or every request where none are needed.

    A token comes as `Authorization: Bearer TOKEN`, or as the password of HTTP Basic, which is what clients without a
    header setting send for an address like `x:TOKEN@host:port`. Tokens are compared in constant time.
    """

    def __init__(self, config: AuthConfig) -> None:
        """Raises `ConfigError` where tokens are required and there are none, or one is too short."""
        self.is_open = False
        """Whether callers need no token. Settled at the start: a file that is emptied later locks everybody out."""

        self._file = config.tokens_file
        self._from_environment = tokens_from_environment()
        self._from_file: tuple[str, ...] = ()
        if config.mode == "none":
            self.is_open = True
            return
        if self._file is not None:
            self._modified_ns, self._from_file = _read_tokens(self._file)
        tokens = self._from_environment + self._from_file
        if not tokens and (config.mode == "required" or self._file is not None):
            raise ConfigError(
                "a token is required and there are none; set POLAR_RAY_TOKENS where replicas run, or write one into "
                "the file that auth.tokens_file names"
            )
        if any(len(token) < SHORTEST_TOKEN for token in tokens):
            raise ConfigError(
                f"a token is shorter than {SHORTEST_TOKEN} characters; make one with: openssl rand -hex 32"
            )
        self.is_open = not tokens

    def check(self, authorization: str | None) -> None:
        """Raise `Unauthorized` unless `authorization`, the header's value, shows a token."""
        if self.is_open:
            return
        given = _given_token(authorization or "")
        if given is None:
            raise Unauthorized("a token is needed: send Authorization: Bearer TOKEN")
        self._reread()
        matches = [hmac.compare_digest(given, token.encode()) for token in self._from_environment + self._from_file]
        if not any(matches):
            raise Unauthorized("this token is not one of the endpoint's")

    def _reread(self) -> None:
        """The file, if it has changed; one that cannot be read, as while it is being replaced, changes nothing."""
        if self._file is None:
            return
        with suppress(ConfigError, OSError):
            if self._file.stat().st_mtime_ns != self._modified_ns:
                self._modified_ns, tokens = _read_tokens(self._file)
                self._from_file = tuple(token for token in tokens if len(token) >= SHORTEST_TOKEN)


def _read_tokens(file: Path) -> tuple[int, tuple[str, ...]]:
    """When the file was last written, in nanoseconds, and its tokens. Raises `ConfigError`."""
    try:
        modified_ns = file.stat().st_mtime_ns
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"auth.tokens_file = {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"auth.tokens_file = {file}: is not UTF-8 text; write one token a line") from None
    return modified_ns, tuple(line for line in lines if line and not line.startswith("#"))


def _given_token(authorization: str) -> bytes | None:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip().encode()
    if scheme.lower() != "basic":
        return None
    try:
        _, colon, password = base64.b64decode(value.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    return password if colon else None
