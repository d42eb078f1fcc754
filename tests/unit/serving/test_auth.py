"""Tokens: several, from a file or the environment, rotated while serving."""

import base64
import hmac
import os

import pytest

from polar_ray.config import AuthConfig
from polar_ray.errors import ConfigError, Unauthorized
from polar_ray.serving.auth import Gate

FIRST, SECOND, THIRD = "first-" + "a" * 20, "second-" + "b" * 20, "third-" + "c" * 20


@pytest.fixture(autouse=True)
def no_tokens_around(monkeypatch):
    monkeypatch.delenv("POLAR_RAY_TOKENS", raising=False)


def bearer(token):
    return f"Bearer {token}"


def basic(token):
    return "Basic " + base64.b64encode(f"anybody:{token}".encode()).decode()


def passes(gate, authorization):
    try:
        gate.check(authorization)
    except Unauthorized:
        return False
    return True


def test_without_tokens_everybody_passes():
    gate = Gate(AuthConfig())
    assert gate.is_open
    assert passes(gate, None)


@pytest.mark.parametrize("show", [bearer, basic])
def test_any_of_the_tokens_opens_and_nothing_else_does(monkeypatch, tmp_path, show):
    file = tmp_path / "tokens"
    file.write_text(f"# the trainer's\n{FIRST}\n\n{SECOND}\n")
    monkeypatch.setenv("POLAR_RAY_TOKENS", f"{THIRD} , ")
    gate = Gate(AuthConfig(tokens_file=file))
    assert all(passes(gate, show(token)) for token in (FIRST, SECOND, THIRD))
    assert not any(
        passes(gate, show(token)) for token in ("", FIRST[:-1], FIRST + "a", "# the trainer's", FIRST.upper())
    )


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", FIRST, f"Token {FIRST}", "Basic !!", "Basic YWJj"])
def test_what_shows_no_token_is_refused_with_a_sentence(monkeypatch, header):
    monkeypatch.setenv("POLAR_RAY_TOKENS", FIRST)
    with pytest.raises(Unauthorized, match="Authorization: Bearer TOKEN"):
        Gate(AuthConfig()).check(header)


def test_an_error_never_holds_a_token(monkeypatch):
    monkeypatch.setenv("POLAR_RAY_TOKENS", FIRST)
    with pytest.raises(Unauthorized) as refused:
        Gate(AuthConfig()).check(bearer(SECOND))
    assert FIRST not in str(refused.value)
    assert SECOND not in str(refused.value)


def test_every_token_is_compared_and_in_constant_time(monkeypatch):
    """How long a refusal takes says neither how much of a token was right nor which of them is near."""
    compared = []
    constant_time = hmac.compare_digest

    def watched(given, token):
        compared.append(token)
        return constant_time(given, token)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    monkeypatch.setenv("POLAR_RAY_TOKENS", f"{FIRST},{SECOND},{THIRD}")
    gate = Gate(AuthConfig())
    for shown in (FIRST, THIRD, FIRST[:-1]):
        compared.clear()
        passes(gate, bearer(shown))
        assert compared == [FIRST.encode(), SECOND.encode(), THIRD.encode()]


def test_tokens_are_rotated_by_writing_the_file(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(FIRST)
    gate = Gate(AuthConfig(tokens_file=file))
    assert passes(gate, bearer(FIRST))
    file.write_text(f"{FIRST}\n{SECOND}")
    os.utime(file, ns=(1, 1))
    assert passes(gate, bearer(SECOND))
    file.write_text(SECOND)
    os.utime(file, ns=(2, 2))
    assert not passes(gate, bearer(FIRST))


def test_a_file_that_is_emptied_or_gone_opens_nothing(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(FIRST)
    gate = Gate(AuthConfig(tokens_file=file))
    file.unlink()
    assert passes(gate, bearer(FIRST))  # it may be being replaced
    file.write_text("")
    os.utime(file, ns=(3, 3))
    assert not passes(gate, bearer(FIRST))
    assert not passes(gate, None)


@pytest.mark.parametrize("content", ["", "# the trainer's\n\n"])
def test_a_file_without_a_token_does_not_leave_the_door_open(tmp_path, content):
    file = tmp_path / "tokens"
    file.write_text(content)
    with pytest.raises(ConfigError, match="a token is required and there are none"):
        Gate(AuthConfig(tokens_file=file))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"short"])
def test_a_rotated_file_that_is_no_good_lets_nobody_in_by_mistake(tmp_path, content):
    file = tmp_path / "tokens"
    file.write_text(FIRST)
    gate = Gate(AuthConfig(tokens_file=file))
    file.write_bytes(content)
    os.utime(file, ns=(4, 4))
    assert not passes(gate, bearer("short"))
    assert not passes(gate, bearer(SECOND))
    file.write_text(SECOND)
    os.utime(file, ns=(5, 5))
    assert passes(gate, bearer(SECOND))


def test_a_file_that_is_no_text_is_said_at_the_start(tmp_path):
    (tmp_path / "tokens").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        Gate(AuthConfig(tokens_file=tmp_path / "tokens"))


def test_required_tokens_that_are_missing_are_said_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="POLAR_RAY_TOKENS where replicas run"):
        Gate(AuthConfig(mode="required"))
    with pytest.raises(ConfigError, match="cannot be read"):
        Gate(AuthConfig(tokens_file=tmp_path / "absent"))


def test_a_token_that_can_be_guessed_is_refused(monkeypatch):
    monkeypatch.setenv("POLAR_RAY_TOKENS", f"{FIRST},secret")
    with pytest.raises(ConfigError, match="shorter than 16 characters"):
        Gate(AuthConfig())


def test_no_authentication_is_a_choice_that_tokens_do_not_overrule(monkeypatch):
    monkeypatch.setenv("POLAR_RAY_TOKENS", FIRST)
    assert Gate(AuthConfig(mode="none")).is_open
