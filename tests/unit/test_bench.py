"""What benchmarks score."""

import pytest

from polar_ray.bench.workload import SHAPES, WORKLOADS, Workload, random_groups, write_random_checkpoint
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.planning import plan


def test_groups_have_the_lengths_of_encoded_gsm8k_triples():
    sequences = random_groups(WORKLOADS["gsm8k"], 16, 8192)
    assert all(451 <= len(ids) <= 775 for ids in sequences)
    shared = plan(sequences, token_budget=4096).computed_tokens / sum(map(len, sequences))
    assert shared == pytest.approx(0.5, abs=0.05)
    assert all((a == b).all() for a, b in zip(sequences, random_groups(WORKLOADS["gsm8k"], 16, 8192), strict=True))


def test_what_a_workload_has_in_common_is_shared_at_every_level():
    workload = Workload("", (20, 20), (20, 20), (30, 30), group_size=2, system=40, references=3)
    sequences = random_groups(workload, 6, 8192)
    assert [len(ids) for ids in sequences] == [60 + 20 + 60 + 30] * 12
    # The system prompt once, two prompts with it again behind each of their references.
    assert plan(sequences, token_budget=10_000).computed_tokens == 40 + 2 * 20 + 6 * (20 + 60) + 12 * 30


def test_a_random_checkpoint_opens(tmp_path):
    write_random_checkpoint(tmp_path, SHAPES["tiny"])
    assert Checkpoint.open(tmp_path).config.vocab_size == 8192
