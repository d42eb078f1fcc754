"""Who may ask: bearer tokens from a file or the environment, several at a time, rotatable while serving."""

from __future__ import annotations

import base64
import binascii
import hmac
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
        self._file = config.tokens_file
        self._from_environment = tokens_from_environment()
        self._modified_ns = -1
        self._from_file: tuple[str, ...] = ()
        self._reread()
        tokens = self._tokens()
        if config.mode == "required" and not tokens:
            raise ConfigError(
                "auth.mode = 'required' and there are no tokens; set POLAR_RAY_TOKENS where replicas run, or "
                "auth.tokens_file to a file that is there"
            )
        if config.mode != "none" and any(len(token) < SHORTEST_TOKEN for token in tokens):
            raise ConfigError(
                f"a token is shorter than {SHORTEST_TOKEN} characters; make one with: openssl rand -hex 32"
            )
        self.is_open = config.mode == "none" or not tokens
        """Whether callers need no token. Settled at the start: a file that is emptied later locks everybody out."""

    def check(self, authorization: str | None) -> None:
        """Raise `Unauthorized` unless `authorization`, the header's value, shows a token."""
        if self.is_open:
            return
        given = _given_token(authorization or "")
        if given is None:
            raise Unauthorized("a token is needed: send Authorization: Bearer TOKEN")
        self._reread()
        matches = [hmac.compare_digest(given, token.encode()) for token in self._tokens()]
        if not any(matches):
            raise Unauthorized("this token is not one of the endpoint's")

    def _tokens(self) -> tuple[str, ...]:
        return self._from_environment + self._from_file

    def _reread(self) -> None:
        if self._file is None:
            return
        try:
            modified_ns = self._file.stat().st_mtime_ns
            if modified_ns != self._modified_ns:
                self._from_file = _read_tokens(self._file)
                self._modified_ns = modified_ns
        except OSError as error:
            if self._modified_ns < 0:
                raise ConfigError(f"auth.tokens_file = {self._file}: cannot be read ({error.strerror})") from None
            # While a secret is being replaced its file can be gone for a moment: what was read last still holds.


def _read_tokens(file: Path) -> tuple[str, ...]:
    lines = (line.strip() for line in file.read_text().splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


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
