"""Addresses of endpoints, as people write them."""

from __future__ import annotations

import base64
import ssl

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
        url = httpx.URL(given.strip() if "://" in given else f"http://{given.strip()}")
    except httpx.InvalidURL:
        raise ConfigError(f"the address is not a URL; {FORMS}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"address {shown(url)!r}; {FORMS}")
    if url.port is not None and not 0 < url.port < 65536:
        raise ConfigError(f"address {shown(url)!r}: there is no port {url.port}; {FORMS}")
    if url.query or url.fragment:
        raise ConfigError(f"address {shown(url)!r} has a query or a fragment; {FORMS}")
    return url


def shown(url: httpx.URL) -> str:
    """The URL for messages: without credentials."""
    return str(url.copy_with(username=None, password=None))


def credentials(url: httpx.URL, token: str | None) -> dict[str, str]:
    """The header that shows `token`, or else what stands in the address as `NAME:TOKEN@`; none where there is neither.

    Raises `ConfigError` for a token that no header can hold.
    """
    if token is None:
        if not url.password:
            return {}
        pair = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}
    token = token.strip()
    if not token.isascii() or not token.isprintable():
        raise ConfigError("the token has characters that no HTTP header can hold; check POLAR_RAY_TOKEN")
    return {"Authorization": f"Bearer {token}"}


def ssl_context(verify: bool | str) -> ssl.SSLContext:
    """What certificates are checked by; a string names a CA's file. Raises `ConfigError` if it cannot be read."""
    if isinstance(verify, bool):
        return httpx.create_ssl_context(verify, trust_env=False)
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        raise ConfigError(f"verify = {verify!r}: cannot be read as a CA's certificates ({error})") from None
