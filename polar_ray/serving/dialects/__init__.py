"""All dialects."""

from polar_ray.serving.dialects.base import Dialect

DIALECTS: tuple[Dialect, ...] = ()
