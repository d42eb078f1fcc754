"""Numbers as people read them."""

import pytest

from polar_ray.report.wording import decimal, number, percent


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (12_345, "12.3 k"),
        (999_600, "1 M"),
        (1.2e9, "1.2 G"),
        (0.25, "0.25"),
    ],
)
def test_numbers_take_three_digits(value, written):
    assert number(value).replace("\u202f", " ") == written


@pytest.mark.parametrize(
    ("share", "written"), [(0, "0 %"), (1e-6, "< 0.1 %"), (0.5, "50.0 %"), (0.9999, "> 99.9 %"), (1, "100 %")]
)
def test_a_share_is_never_rounded_to_none_or_all(share, written):
    assert percent(share).replace("\u202f", " ") == written


def test_rewards_have_two_decimals_unless_they_are_huge():
    assert [decimal(value).replace("\u202f", " ") for value in (-3.14159, 0, 1e6)] == ["−3.14", "0.00", "1 M"]
