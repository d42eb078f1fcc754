"""A certificate for 127.0.0.1, and the authority that a client must know to trust it."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificate:
    """Files in PEM form. `ca` is the client's; the names of the others are Serve's and uvicorn's."""

    ca: str
    ssl_certfile: str
    ssl_keyfile: str

    @property
    def server(self) -> dict[str, str]:
        """What a server is told."""
        return {"ssl_certfile": self.ssl_certfile, "ssl_keyfile": self.ssl_keyfile}


def make_certificate(folder: Path) -> Certificate:
    """A new authority and what it vouches for, written to `folder`."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    files = Certificate(*(str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem")))
    authority.cert_pem.write_to_path(files.ca)
    issued.cert_chain_pems[0].write_to_path(files.ssl_certfile)
    issued.private_key_pem.write_to_path(files.ssl_keyfile)
    return files
