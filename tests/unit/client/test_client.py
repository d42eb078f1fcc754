"""The client against real servers that behave in every way a server can."""

import asyncio
import base64
import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from polar_ray import AsyncRewardClient, RewardClient, Triple
from polar_ray.client import retry
from polar_ray.errors import (
    ConfigError,
    DeadlineExceeded,
    EmptyText,
    EngineError,
    EngineProtocolError,
    NotFound,
    Overloaded,
    ReceiptMismatch,
    RequestInvalid,
    RequestTooLarge,
    ServingError,
    Unauthorized,
    Unavailable,
)
from polar_ray.triples import TokenIds
from tests.support.scripted_server import error_answer, good, n_rows, rewards_reply, scripted_server

TOKEN = "a-token-of-some-length"


def outputs(n, groups=1):
    """Triples whose output is their number, which `good` gives back as the reward."""
    return [Triple(f"P{number % groups}", "R", str(number)) for number in range(n)]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)


def test_rewards_come_back_in_order_however_they_travelled():
    with scripted_server(good) as script, RewardClient(script.address, rows_per_request=4, max_in_flight=3) as client:
        assert client.rewards(outputs(50, groups=7)) == [float(n) for n in range(50)]
        assert client.receipt_id == "r1"
        assert script.most_under_way <= 3
        assert len(script.connections) <= 3


def test_no_rows_need_no_request():
    with scripted_server(good) as script, RewardClient(script.address) as client:
        assert client.score([]) == []
        assert script.bodies == []


def test_a_group_is_one_request_with_the_prompt_once():
    with scripted_server(good) as script, RewardClient(script.address) as client:
        scored = client.score_group("P", "R", ["3", "1"])
        assert [row.reward for row in scored] == [3.0, 1.0]
        (body,) = script.bodies
        assert body.pop("deadline_s") <= 300
        assert body == {"prompt": "P", "reference": "R", "outputs": ["3", "1"], "priority": "interactive"}


def test_the_token_is_shown_to_the_server_and_to_nobody_else(monkeypatch):
    with scripted_server(error_answer(401, "unauthorized")) as script:
        monkeypatch.setenv("POLAR_RAY_ADDRESS", script.address)
        monkeypatch.setenv("POLAR_RAY_TOKEN", TOKEN)
        with RewardClient() as client:
            assert TOKEN not in repr(client)
            with pytest.raises(Unauthorized) as refused:
                client.rewards(outputs(1))
        assert script.headers[0]["authorization"] == f"Bearer {TOKEN}"
        assert TOKEN not in str(refused.value)
        with RewardClient(f"anybody:{TOKEN}@{script.address}", token=None) as client:
            assert TOKEN not in repr(client)


@pytest.mark.parametrize(
    "first",
    [
        error_answer(503, "unavailable"),
        error_answer(503, "engine_unavailable"),
        error_answer(429, "overloaded"),
        (502, {}, b"<html>bad gateway</html>"),
        (500, {}, b"Internal Server Error"),
        "cut",
    ],
    ids=["503", "engine", "429", "html", "500", "cut"],
)
def test_what_may_go_better_is_asked_again(first):
    with scripted_server(first, first, good) as script, RewardClient(script.address) as client:
        assert client.rewards(outputs(3)) == [0.0, 1.0, 2.0]
        assert len(script.bodies) == 3
        assert script.bodies[2]["deadline_s"] < script.bodies[0]["deadline_s"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error_answer(400, "request_invalid"), RequestInvalid),
        (error_answer(401, "unauthorized"), Unauthorized),
        (error_answer(404, "not_found"), NotFound),
        (error_answer(409, "receipt_mismatch"), ReceiptMismatch),
        (error_answer(504, "deadline_exceeded"), DeadlineExceeded),
        (error_answer(502, "engine_failed"), EngineError),
        ((404, {}, b"nginx"), NotFound),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_what_will_not_go_better_is_raised_at_once_as_itself(answer, kind):
    with scripted_server(answer) as script, RewardClient(script.address) as client:
        with pytest.raises(kind):
            client.rewards(outputs(3))
        assert len(script.bodies) == 1


def test_retry_after_is_waited_for():
    with scripted_server(error_answer(429, "overloaded", Retry_After="1"), good) as script:
        with RewardClient(script.address) as client:
            assert client.rewards(outputs(1)) == [0.0]
        assert script.times[1] - script.times[0] >= 1.0


def test_a_wait_beyond_the_deadline_is_not_begun():
    with scripted_server(error_answer(429, "overloaded", Retry_After="60")) as script:
        with RewardClient(script.address) as client, pytest.raises(Overloaded, match="said the server") as refused:
            client.rewards(outputs(1), deadline_s=5)
        assert refused.value.details["retry_after_s"] == 60
        assert len(script.bodies) == 1


def test_a_row_that_kills_its_server_is_not_sent_for_ever():
    with scripted_server("cut") as script, RewardClient(script.address) as client:
        with pytest.raises(Unavailable, match="broke"):
            client.rewards(outputs(1))
        assert len(script.bodies) == retry.MOST_LOST_CONNECTIONS


def test_a_server_that_hangs_is_left_at_the_deadline(monkeypatch):
    monkeypatch.setattr("polar_ray.client.aio.LATE_REPLY_S", 0.1)
    with scripted_server("hang") as script, RewardClient(script.address) as client:
        with pytest.raises(DeadlineExceeded):
            client.rewards(outputs(1), deadline_s=0.3)
        assert len(script.bodies) == 1


def test_a_reply_that_drips_is_left_at_the_deadline(monkeypatch):
    monkeypatch.setattr("polar_ray.client.aio.LATE_REPLY_S", 0.1)
    with scripted_server("drip") as script, RewardClient(script.address) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.rewards(outputs(1), deadline_s=0.3)
        assert time.monotonic() - began < 1.5
        assert len(script.bodies) == 1


def test_a_proxys_500_is_not_asked_again_for_ever():
    with scripted_server((500, {}, b"Internal Server Error")) as script, RewardClient(script.address) as client:
        with pytest.raises(Unavailable):
            client.rewards(outputs(1))
        assert len(script.bodies) == retry.MOST_LOST_CONNECTIONS


def test_a_deadline_of_nothing_is_over():
    with scripted_server(good) as script, RewardClient(script.address) as client:
        with pytest.raises(DeadlineExceeded):
            client.rewards(outputs(1), deadline_s=0)
        assert script.bodies == []


@pytest.mark.parametrize("token", ["a token\nX-Evil: 1", "töken-of-some-length"])
def test_a_token_that_no_header_can_hold_is_said_at_once(token):
    with pytest.raises(ConfigError, match="POLAR_RAY_TOKEN"):
        RewardClient("127.0.0.1:1", token=token)


def test_a_ca_file_that_is_not_there_is_said_at_once():
    with pytest.raises(ConfigError, match="cannot be read as a CA's certificates"):
        RewardClient("https://127.0.0.1:1", verify="/absent/ca.pem")


def test_a_token_in_the_address_is_shown_as_a_password_and_kept_out_of_every_url():
    with scripted_server(good) as script, RewardClient(f"x:{TOKEN}@{script.address}") as client:
        client.rewards(outputs(1))
        assert base64.b64decode(script.headers[0]["authorization"].removeprefix("Basic ")) == f"x:{TOKEN}".encode()
        assert TOKEN not in str(client._client._url)


def test_nobody_there_is_unavailable_and_names_the_address():
    with RewardClient("127.0.0.1:9", deadline_s=3.0) as client, pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        client.rewards(outputs(1))


@pytest.mark.parametrize(
    "answer",
    [
        lambda body: rewards_reply([1.0] * (n_rows(body) - 1)),
        lambda body: rewards_reply([1.0] * (n_rows(body) + 1)),
        lambda body: (200, {}, rewards_reply([1.0, 2.0, 3.0])[2].replace(b'"index": 0', b'"index": 2')),
        lambda body: (200, {}, rewards_reply([1.0, 2.0, 3.0])[2].replace(b"1.0", b"NaN")),
        lambda body: (200, {}, rewards_reply([1.0, 2.0, 3.0])[2].replace(b"1.0", b"null")),
        lambda body: (200, {}, b"{}"),
        lambda body: (200, {}, b"[[1.0]]"),
        lambda body: (200, {}, b"<html>"),
    ],
    ids=["short", "long", "order", "nan", "null", "empty", "list", "html"],
)
def test_a_reply_that_is_not_one_reward_per_row_is_never_taken_for_one(answer):
    with scripted_server(answer) as script, RewardClient(script.address) as client:
        with pytest.raises(EngineProtocolError):
            client.rewards(outputs(3))
        assert len(script.bodies) == 1


def test_rewards_of_two_receipts_are_never_mixed():
    second = lambda body: rewards_reply([0.0] * n_rows(body), receipt_id="r2")  # noqa: E731
    with scripted_server(good, second) as script, RewardClient(script.address, rows_per_request=1) as client:
        with pytest.raises(ReceiptMismatch, match="changed during this call"):
            client.rewards(outputs(4))
        assert script.bodies


def test_an_expected_receipt_is_told_and_checked():
    with scripted_server(good) as script, RewardClient(script.address, expect_receipt="r0") as client:
        with pytest.raises(ReceiptMismatch, match="expected rewards of receipt r0"):
            client.rewards(outputs(1))
        assert script.bodies[0]["expect_receipt"] == "r0"


def test_a_failed_row_is_data_for_score_and_an_error_for_rewards():
    with scripted_server(rewards_reply([1.0, None])) as script, RewardClient(script.address) as client:
        first, second = client.score(outputs(2))
        assert (first.reward, second.reward, second.status) == (1.0, None, "engine_failed")
        with pytest.raises(EngineError, match="row 1") as raised:
            client.rewards(outputs(2))
        assert type(raised.value) is EngineError


def test_a_request_that_the_endpoint_finds_too_large_goes_in_parts():
    def picky(body):
        return good(body) if n_rows(body) <= 3 else error_answer(413, "request_too_large")

    with scripted_server(picky) as script, RewardClient(script.address) as client:
        assert client.rewards(outputs(20)) == [float(n) for n in range(20)]
        assert max(n_rows(body) for body in script.bodies) == 20
    with (
        scripted_server(error_answer(413, "request_too_large")) as script,
        RewardClient(script.address) as client,
        pytest.raises(RequestTooLarge),
    ):
        client.rewards(outputs(1))


def test_a_row_that_cannot_be_sent_keeps_its_place_and_its_neighbours():
    with scripted_server(good) as script, RewardClient(script.address) as client:
        rows = client.score([Triple("P", "R", "1"), Triple("P", "R", "\ud800", id="x"), Triple("P", "R", "2")])
        assert [row.reward for row in rows] == [1.0, None, 2.0]
        assert (rows[1].status, rows[1].id) == ("row_unreadable", "x")
        assert n_rows(script.bodies[0]) == 2


def test_a_label_that_cannot_be_sent_is_its_rows_own_error_and_ids_of_other_types_are_text():
    given = [
        Triple("P", "R", "1", id="\ud800"),
        Triple([{"role": "\ud800", "content": "P"}], "R", "2"),
        Triple("P", "R", "3", id=np.int64(3)),
        Triple("P", None, "4", id=np.int64(4)),
    ]
    with scripted_server(good) as script, RewardClient(script.address) as client:
        rows = client.score(given)
    assert [row.status for row in rows] == ["row_unreadable", "row_unreadable", "ok", "triple_invalid"]
    assert rows[0].detail.startswith("id: a lone surrogate")
    assert rows[1].detail.startswith("prompt[0].role: a lone surrogate")
    assert [row["id"] for row in script.bodies[0]["triples"]] == ["3"]
    assert rows[3].id == "4"


def test_ids_of_any_library_are_sent_and_what_is_no_id_is_its_rows_own_error():
    given = [TokenIds(np.array([1, 2], np.int32)), TokenIds([1, 2.5]), TokenIds((3, np.int64(4)))]
    with scripted_server(good) as script, RewardClient(script.address) as client:
        rows = client.score_ids(given)
    assert [(row.reward, row.status) for row in rows] == [(2.0, "ok"), (None, "triple_invalid"), (4.0, "ok")]
    assert script.bodies[0]["ids"] == [[1, 2], [3, 4]]


def test_the_first_part_that_fails_for_good_ends_the_call():
    with scripted_server(good, error_answer(400, "request_invalid")) as script:
        with RewardClient(script.address, rows_per_request=1, max_in_flight=2) as client, pytest.raises(RequestInvalid):
            client.rewards(outputs(100))
        assert len(script.bodies) <= 4


@pytest.mark.parametrize(
    "address", ["", "http://", "ftp://host", "host:port", "host:99999", "http://host:8000/?x=1", "http://[::1"]
)
def test_an_address_that_is_none_is_said_at_once(address, monkeypatch):
    monkeypatch.delenv("POLAR_RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="host:port"):
        RewardClient(address)


@pytest.mark.parametrize("options", [{"max_in_flight": 0}, {"rows_per_request": 0}, {"deadline_s": 0}])
def test_options_that_make_no_sense_are_said_at_once(options):
    with pytest.raises(ConfigError, match="must be positive"):
        AsyncRewardClient("127.0.0.1:1", **options)


def test_a_path_of_the_address_is_kept():
    with scripted_server(good) as script:
        paths = []
        for prefix in ("", "/", "/polar", "/polar/"):
            with RewardClient(f"http://{script.address}{prefix}") as client:
                client.rewards(outputs(1))
            paths.append(script.paths[-1])
    assert paths == ["/v1/rewards", "/v1/rewards", "/polar/v1/rewards", "/polar/v1/rewards"]


def test_one_client_serves_many_threads():
    with scripted_server(good) as script, RewardClient(script.address, rows_per_request=3) as client:
        answers: dict[int, list[float]] = {}
        threads = [
            threading.Thread(target=lambda n=n: answers.update({n: client.rewards(outputs(n))})) for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {n: [float(place) for place in range(n)] for n in range(1, 9)}
        assert script.most_under_way <= 8


def test_the_synchronous_client_works_where_a_loop_is_running():
    async def cell(address):
        with RewardClient(address) as client:
            return client.rewards(outputs(2))

    with scripted_server(good) as script:
        assert asyncio.run(cell(script.address)) == [0.0, 1.0]


def test_a_cancelled_call_asks_for_nothing_more():
    async def test(address):
        async with AsyncRewardClient(address, rows_per_request=1, max_in_flight=1) as client:
            task = asyncio.create_task(client.rewards(outputs(50)))
            while not script.bodies:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with scripted_server(good) as script:
        asyncio.run(test(script.address))
        time.sleep(0.1)  # one request may have been on its way
        assert len(script.bodies) <= 3


def interrupt():
    """What Ctrl-C does to a program."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_a_wait_that_outlasts_the_deadline_hides_no_failure(monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(seconds + 1))
    with scripted_server(good) as script:
        gone = script.address
    with RewardClient(gone, deadline_s=0.5) as client, pytest.raises(Unavailable, match="nobody answers"):
        client.rewards(outputs(1))


def test_an_interrupted_call_asks_for_nothing_more():
    def interrupting(body):
        if len(script.bodies) == 5:
            interrupt()
        time.sleep(0.05)
        return good(body)

    with (
        scripted_server(interrupting) as script,
        RewardClient(script.address, rows_per_request=1, max_in_flight=1) as client,
    ):
        with pytest.raises(KeyboardInterrupt):
            client.rewards(outputs(40))
        time.sleep(0.3)
        assert len(script.bodies) <= 6
        assert client.rewards(outputs(1)) == [0.0]


def test_an_interrupt_during_a_wait_ends_the_call_and_the_block():
    def full(body):
        threading.Timer(0.2, interrupt).start()
        return error_answer(429, "overloaded", Retry_After="20")

    with scripted_server(full) as script:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), RewardClient(script.address, deadline_s=60) as client:
            client.rewards(outputs(1))
        assert time.monotonic() - began < 5
        assert len(script.bodies) == 1


def test_closing_takes_back_what_other_threads_wait_for():
    raised = []

    def wait():
        try:
            client.rewards(outputs(1))
        except ServingError as error:
            raised.append(error)

    with scripted_server(error_answer(429, "overloaded", Retry_After="20")) as script:
        client = RewardClient(script.address, deadline_s=60)
        thread = threading.Thread(target=wait)
        thread.start()
        while not script.bodies:
            time.sleep(0.001)
        client.close()
        thread.join(5)
        assert [str(error) for error in raised] == ["this client is closed; make another"]
        client.close()
        with pytest.raises(ServingError, match="closed"):
            client.rewards(outputs(1))


FORK = """
import os, signal, sys
from polar_ray import RewardClient, Triple
from polar_ray.errors import ServingError
with RewardClient({address!r}, deadline_s=20) as client:
    print(client.rewards([Triple('P', 'R', '1')]), flush=True)
    {before}
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a child that hangs is killed by it, and does not outlive the test
        {child}
        sys.exit(0)
    print(os.waitpid(child, 0)[1])
    {after}
"""


@pytest.mark.parametrize(
    ("before", "child", "after", "printed"),
    [
        ("", "print(client.rewards([Triple('P', 'R', '2')]), flush=True)", "", ["[1.0]", "[2.0]", "0"]),
        ("", "", "print(client.rewards([Triple('P', 'R', '3')]))", ["[1.0]", "0", "[3.0]"]),
        ("", "client.close()", "print(client.rewards([Triple('P', 'R', '3')]))", ["[1.0]", "0", "[3.0]"]),
        (
            "client.close()",
            "\n        try: client.model()\n        except ServingError as error: print(error, flush=True)",
            "",
            ["[1.0]", "this client is closed; make another", "0"],
        ),
    ],
    ids=["asks", "exits", "closes", "closed before"],
)
def test_a_forked_child_has_connections_of_its_own(before, child, after, printed):
    with scripted_server(good) as script:
        code = FORK.format(address=script.address, before=before, child=child, after=after)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.stdout.splitlines(), done.stderr) == (printed, "")


def test_as_many_requests_are_under_way_as_were_asked_for():
    def slow(body):
        time.sleep(0.2)
        return good(body)

    with scripted_server(slow) as script:
        with RewardClient(script.address, rows_per_request=1, max_in_flight=20) as client:
            assert client.rewards(outputs(60)) == [float(n) for n in range(60)]
        assert script.most_under_way == 20
        assert len(script.connections) == 20


def test_a_client_that_is_forgotten_keeps_no_thread():
    with scripted_server(good) as script:
        before = threading.active_count()
        client = RewardClient(script.address)
        client.rewards(outputs(1))
        del client
        gc.collect()
        assert threading.active_count() <= before + 1  # the server's own connection thread may linger


def test_a_script_that_forgets_to_close_ends():
    with scripted_server(good) as script:
        code = (
            "from polar_ray import RewardClient, Triple\n"
            f"client = RewardClient({script.address!r})\n"
            "print(client.rewards([Triple('P', 'R', '5')]))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[5.0]\n", "")


def test_progress_is_shown_on_request(capfd):
    with scripted_server(good) as script, RewardClient(script.address, rows_per_request=2) as client:
        client.score(outputs(6), progress=True)
    assert "6/6" in capfd.readouterr().err


def test_an_empty_text_is_the_rows_own_error():
    answer = lambda body: (200, {}, rewards_reply([None])[2].replace(b"engine_failed", b"triple_empty"))  # noqa: E731
    with scripted_server(answer) as script, RewardClient(script.address) as client, pytest.raises(EmptyText):
        client.rewards(outputs(1))
    assert script.bodies
