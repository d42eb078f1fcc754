"""The only settings that are read from the environment: addresses and secrets."""

from __future__ import annotations

import os


def tokens_from_environment() -> tuple[str, ...]:
    """The endpoint's tokens in POLAR_RAY_TOKENS, separated by commas."""
    given = os.environ.get("POLAR_RAY_TOKENS", "")
    return tuple(token for token in (part.strip() for part in given.split(",")) if token)


def endpoint_address() -> str | None:
    """The endpoint to ask, from POLAR_RAY_ADDRESS."""
    return os.environ.get("POLAR_RAY_ADDRESS") or None


def endpoint_token() -> str | None:
    """The token to show an endpoint, from POLAR_RAY_TOKEN."""
    return os.environ.get("POLAR_RAY_TOKEN") or None


def engine_token() -> str | None:
    """The token to show a running server of another engine, from POLAR_RAY_ENGINE_TOKEN."""
    return os.environ.get("POLAR_RAY_ENGINE_TOKEN") or None


def ray_address() -> str | None:
    """The cluster to connect to, from RAY_ADDRESS; None: start one on this machine for the time being."""
    return os.environ.get("RAY_ADDRESS") or None
