"""Every error: picklable, with a code of its own, and listed in the table that people read."""

import pickle

import pytest

from polar_ray import errors
from polar_ray.errors import CheckpointError, EngineError, PolarRayError, TripleTooLong, unwrap


def all_errors() -> list[type[PolarRayError]]:
    found, pending = [PolarRayError], [PolarRayError]
    while pending:
        subclasses = pending.pop().__subclasses__()
        found += subclasses
        pending += subclasses
    return found


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_an_error_survives_the_trip_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("what was found", field="prompt", tokens=3)))
    assert type(error) is kind
    assert str(error) == "what was found"
    assert error.details == {"field": "prompt", "tokens": 3}


def test_codes_are_unique():
    codes = [kind.code for kind in all_errors()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", all_errors()[1:], ids=lambda kind: kind.__name__)
def test_the_table_in_the_docstring_tells_the_truth(kind):
    row = next(line for line in errors.__doc__.splitlines() if f" {kind.__name__} " in line)
    retry, http, exit_code = row.split(kind.code)[1].split()
    assert retry == ("yes" if kind.retryable else "no")
    assert http in (str(kind.http_status), "-")
    assert exit_code == str(kind.exit_code)


def test_unwrap_finds_the_error_below_an_executors_own():
    inner = CheckpointError("no weights")
    outer = RuntimeError("the actor died")
    outer.__cause__ = inner
    assert unwrap(outer) is inner


def test_unwrap_follows_rays_cause_attribute():
    class RayTaskError(Exception):
        cause = EngineError("boom")

    assert unwrap(RayTaskError()) is RayTaskError.cause


def test_unwrap_leaves_a_strangers_error_as_it_is():
    error = ValueError("x")
    error.__cause__ = KeyError("placeholder")
    assert unwrap(error) is error


def test_a_bad_triple_is_a_value_error():
    assert issubclass(TripleTooLong, ValueError)
