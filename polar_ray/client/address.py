"""Addresses of endpoints, as people write them."""

from __future__ import annotations

import httpx

from polar_ray.config import endpoint_address
from polar_ray.errors import ConfigError

FORMS = "give host:port or http(s)://host:port, with a path if the endpoint has a route prefix"


def base_url(address: str | None) -> httpx.URL:
    """The URL that an endpoint's paths are appended to; None takes POLAR_RAY_ADDRESS.

    `host:port` means HTTP. Raises `ConfigError` for what is no address. Credentials in an address are kept, as HTTP
    Basic, and never shown (`shown`).
    """
    given = address or endpoint_address()
    if not given:
        raise ConfigError(f"no address of an endpoint; {FORMS}, or set POLAR_RAY_ADDRESS")
    try:
        url = httpx.URL(given if "://" in given else f"http://{given}")
    except httpx.InvalidURL:
        raise ConfigError(f"the address is not a URL; {FORMS}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"address {shown(url)!r}; {FORMS}")
    if url.query or url.fragment:
        raise ConfigError(f"address {shown(url)!r} has a query or a fragment; {FORMS}")
    return url


def shown(url: httpx.URL) -> str:
    """The URL for messages: without credentials."""
    return str(url.copy_with(username=None, password=None))
