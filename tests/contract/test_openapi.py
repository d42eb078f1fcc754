"""Requests that nobody thought of, from our own OpenAPI: no answer is a 5xx, but where a deadline was asked for."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from schemathesis import GenerationMode

from polar_ray.wire import ErrorReply
from tests.support.endpoint import running_endpoint

EXAMPLES = 25
"""Of each route."""


@pytest.fixture(scope="module")
def described():
    with running_endpoint() as address:
        yield schemathesis.openapi.from_url(f"http://{address}/openapi.json")


def test_no_request_makes_the_endpoint_fail(described):
    statuses: Counter[int] = Counter()
    for operation in (found.ok() for found in described.get_all_operations()):
        ask_in_every_way(operation, statuses)
    assert statuses[200] > EXAMPLES
    assert statuses[400] > EXAMPLES


def ask_in_every_way(operation, statuses: Counter) -> None:
    """Requests as the schema describes them and requests as it does not, the same ones in every run."""

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategies.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)))
    def ask(case):
        response = case.call()
        statuses[response.status_code] += 1
        if response.status_code >= 400:
            error = ErrorReply.model_validate_json(response.content).error
            assert response.status_code < 500 or error.code == "deadline_exceeded", case.as_curl_command()

    ask()
