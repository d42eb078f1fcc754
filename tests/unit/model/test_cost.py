"""The peak of a GPU by the name that it gives itself."""

import pytest

from polar_ray.model.cost import PEAK_FLOPS, peak_flops_of


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_a_known_gpu_has_the_peak_of_its_data_sheet(name, key):
    assert peak_flops_of(name, "bfloat16") == peak_flops_of(name, "float16") == PEAK_FLOPS[key]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100 PCIe", "bfloat16"),
        ("NVIDIA H100 NVL", "bfloat16"),
        ("Tesla T4", "float16"),
        ("NVIDIA H200", "float32"),
    ],
)
def test_of_others_nothing_is_said(name, dtype):
    assert peak_flops_of(name, dtype) is None
