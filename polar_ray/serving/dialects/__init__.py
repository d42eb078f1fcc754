"""How trainers and engines word a request for rewards: one file per family, translations and nothing else."""

from polar_ray.serving.dialects import lmdeploy, openai, trainers, vllm
from polar_ray.serving.dialects.base import Dialect

DIALECTS: tuple[Dialect, ...] = (*vllm.DIALECTS, *lmdeploy.DIALECTS, *trainers.DIALECTS, *openai.DIALECTS)
