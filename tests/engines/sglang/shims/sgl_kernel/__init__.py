"""In place of SGLang's kernels, which PyPI has for CUDA only: what imports them finds them, what calls them fails."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name}: there are no kernels here")

    return absent
