"""The wire: what an endpoint says, a client reads back as the same thing."""

import pytest

from polar_ray.errors import (
    DeadlineExceeded,
    Overloaded,
    PolarRayError,
    RequestInvalid,
    ServingError,
    Unauthorized,
    Unavailable,
    error_kinds,
)
from polar_ray.triples import STATUS_OK, Scored, TokenIds, Triple
from polar_ray.wire import (
    RewardRow,
    RewardsRequest,
    error_reply,
    parse_options,
    parse_request,
    read_error,
    triple_to_json,
)


@pytest.mark.parametrize("kind", error_kinds().values(), ids=lambda kind: kind.__name__)
def test_an_error_is_read_back_as_the_class_it_was_raised_as(kind):
    error = kind("what was found", row=3, place="here", tensor=object())
    body = error_reply(error).model_dump_json().encode()
    read = read_error(kind.http_status, body, {})
    assert type(read) is kind
    assert str(read) == "what was found"
    assert read.details == {"row": 3, "place": "here"}


def test_an_error_that_names_what_utf8_cannot_hold_still_goes_out():
    body = error_reply(RequestInvalid("field \ud800 is unknown", field="\udfff")).model_dump_json().encode()
    read = read_error(400, body, {})
    assert (str(read), read.details) == ("field ? is unknown", {"field": "?"})


def test_retry_after_is_kept():
    body = error_reply(Overloaded("full")).model_dump_json().encode()
    assert read_error(429, body, {"retry-after": "7"}).details["retry_after_s"] == 7
    body = error_reply(Overloaded("full", retry_after_s=6.5)).model_dump_json().encode()
    assert read_error(429, body, {"retry-after": "7"}).details["retry_after_s"] == 6.5


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, Overloaded),
        (401, Unauthorized),
        (503, Unavailable),
        (504, DeadlineExceeded),
        (502, Unavailable),
        (500, Unavailable),
        (418, RequestInvalid),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html>a proxy's page</html>", b'{"error": "text"}', b"[]"])
def test_a_strangers_error_is_classified_by_its_status(status, kind, body):
    error = read_error(status, body, {"retry-after": "2"})
    assert type(error) is kind
    assert "page" not in str(error)
    lost = {"connection_lost": True} if status in (500, 502) else {}
    assert error.details == {"retry_after_s": 2.0, **lost}


@pytest.mark.parametrize("header", ["nan", "inf", "-3", "Wed, 25 Nov 2026 00:00:00 GMT", ""])
def test_a_retry_after_that_is_no_wait_is_none(header):
    assert "retry_after_s" not in read_error(429, b"", {"retry-after": header}).details


def test_a_code_of_a_later_version_is_still_an_error():
    body = b'{"error": {"code": "not_yet_invented", "message": "m", "retryable": false}}'
    assert type(read_error(500, body, {"retry-after": "soon"})) is ServingError


def test_a_triple_crosses_unchanged():
    messages = [{"role": "user", "content": "P", "name": "x"}, {"content": "Q"}]
    triple = Triple(messages, "R", "O", wrapper="pretrain", id="7")
    request = RewardsRequest(triples=[triple_to_json(triple)])
    (read,) = parse_request(request.model_dump_json(exclude_none=True).encode()).rows()
    kept = [{"role": "user", "content": "P"}, {"role": "user", "content": "Q"}]
    assert read == Triple(kept, "R", "O", wrapper="pretrain", id="7")
    assert triple_to_json(Triple("P", "R", "O", id=7))["id"] == "7"
    assert triple_to_json(Triple("P", "R", "O")) == {"prompt": "P", "reference": "R", "output": "O"}


def test_a_group_and_ids_are_rows_too():
    rows = parse_request(b'{"prompt": "P", "reference": "R", "outputs": ["a", "b"], "wrapper": "pretrain"}').rows()
    assert rows == [Triple("P", "R", "a", "pretrain"), Triple("P", "R", "b", "pretrain")]
    assert parse_request(b'{"ids": [[1, 2]]}').rows() == [TokenIds([1, 2])]
    assert parse_request(b'{"triples": []}').rows() == []


def test_a_row_is_read_back_as_the_scorer_gave_it():
    row = RewardRow(index=4, id="a", reward=-1.5, status=STATUS_OK, tokens=9, cut_tokens=1, removed_control_tokens=2)
    assert row.scored() == Scored(-1.5, STATUS_OK, None, 9, 1, 2, "a")


def test_faults_are_counted_and_their_values_left_out():
    with pytest.raises(RequestInvalid) as refused:
        parse_request(b'{"ids": [["secret"], ["secret"], ["secret"], ["secret"], ["secret"]]}')
    assert "and 2 more" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_misspelt_option_of_a_query_string_is_refused():
    assert parse_options({"deadline_s": "3", "think": "keep"}, others=("think",)).deadline_s == 3
    with pytest.raises(RequestInvalid, match="deadlines: Extra inputs"):
        parse_options({"deadlines": "3"})


def test_options_of_a_query_string():
    options = parse_options({"deadline_s": "2.5", "priority": "bulk"})
    assert (options.deadline_s, options.priority, options.expect_receipt) == (2.5, "bulk", None)
    with pytest.raises(PolarRayError, match="priority"):
        parse_options({"priority": "first"})
