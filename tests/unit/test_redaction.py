"""No secret, and nothing that a terminal obeys, leaves with a message."""

from __future__ import annotations

import io
import json
import logging
import time
from typing import Any
from urllib.parse import quote

import pytest
from rich.text import Text

from batchllm_celery import redaction
from batchllm_celery.cli import main
from batchllm_celery.cli.display.console import print_json, to_stderr
from batchllm_celery.cli.request import resume_command
from batchllm_celery.errors import FailureKind, ProviderError, describe
from batchllm_celery.models import Failure, StrategySpec
from batchllm_celery.redaction import (
    keep_secret,
    keep_secrets_in,
    printable,
    safe_url,
    without_secrets,
)
from batchllm_celery.settings import Settings
from batchllm_celery.strategies import CallableStrategy, classify, classify_for
from batchllm_celery.strategies.registry import Registration


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_kept", set())


KEYS = [
    "gsk_Q2VydGFpbmx5IG5vdA",
    "xai-0123456789abcdef",
    "AQ.Ab8RN6L-_x.y",
    "0123456789abcdef0123456789abcdef",
    "my own key!",
    "k3y",
    "a+b/c==",
    'with"quote',
    "pä$$.*wörd",
]


@pytest.mark.parametrize("key", KEYS)
def test_the_key_in_use_is_blanked_whatever_its_shape(key: str) -> None:
    """As it is, as a URL and as JSON spell it; also where the cut would leave half of it."""
    keep_secret(key)
    for quoted in (key, json.dumps({"key": key}), f"?{quote(key, safe='')}", "x" * 170 + f" {key}"):
        said = describe(RuntimeError(f"401 wrong key: {quoted}"))
        assert key not in said
        assert key[: max(4, len(key) - 4)] not in said


@pytest.mark.parametrize("name", ["GROQ_API_KEY", "MY_TOKEN", "db-password", "AWS_ACCESS_KEY"])
def test_secrets_of_the_environment_are_blanked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By the names that people give them; other variables are no secrets."""
    monkeypatch.setenv(name, "tell-nobody-of-it")
    monkeypatch.setenv("KEYBOARD", "qwerty-layout")
    assert without_secrets("so tell-nobody-of-it, please") == "so [key], please"
    assert without_secrets("a qwerty-layout") == "a qwerty-layout"


def test_a_short_key_is_blanked_as_a_word_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of three letters must not eat the words that hold them."""
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    assert without_secrets("abc is no key, abcdef is none either: (abc)") == (
        "[key] is no key, abcdef is none either: ([key])"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("wrong key my-own-secret"),
        ProviderError("wrong key my-own-secret", kind=FailureKind.AUTHENTICATION),
        ProviderError("sk-0123456789, gsk_0123456789, xai-0123456789, AQ.0123456789"),
    ],
)
def test_a_failure_quotes_no_key(error: Exception) -> None:
    """Ours, the SDK's, and one that is not known but looks like one."""
    keep_secret("my-own-secret")
    message = classify(error).message
    assert "my-own" not in message
    assert "0123456789" not in message


def test_a_translator_of_ones_own_quotes_no_key_either() -> None:
    """What a strategy's `classify` says goes the same way."""

    class Own(CallableStrategy[Any]):
        def classify(self, exception: BaseException) -> Failure | None:
            return Failure(FailureKind.UNKNOWN, f"Own: {exception}\x1b[2J")

    async def ask(prompt: str) -> str:
        return prompt

    keep_secret("my-own-secret")
    failed = classify_for(Own(ask), RuntimeError("my-own-secret"))
    assert failed.message == "Own: [key]\\x1b[2J"


def test_parameters_that_are_secrets_are_known_as_such() -> None:
    """A strategy that is given its key as a parameter."""

    def build(api_key: str) -> CallableStrategy[Any]:
        raise RuntimeError(f"bad {api_key}")

    spec = StrategySpec(name="own", params={"api_key": "in-the-parameters"})
    with pytest.raises(ValueError) as refused:
        Registration("own", build).build(spec)
    assert "in-the-parameters" not in str(refused.value)


def test_a_log_line_and_its_traceback_hold_no_secret() -> None:
    """Nor a control character; the chain of exceptions is part of the traceback."""
    keep_secret("my-own-secret")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("batchllm_celery")
    logger.addHandler(handler)
    try:
        try:
            try:
                raise ValueError("my-own-secret")
            except ValueError as error:
                raise RuntimeError("wrapped\x1b]0;title\x07") from error
        except RuntimeError:
            logger.exception("failed item_id=%s", "my-own-secret \x9b31m")
    finally:
        logger.removeHandler(handler)
    said = stream.getvalue()
    assert "ValueError: [key]" in said
    assert "my-own" not in said
    assert said == printable(said)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret-word@host:1/0",
        "redis://s3cret-word@host",
        "rediss://user:s3cret-word@host",
        "redis://:s3cret-word#x@host",
        "unix:///run/s?password=s3cret-word&db=1",
        "https://user:s3cret-word@llm.example/v1",
        "https://llm.example/v1?api-key=s3cret-word",
        "redis://a:s3cret-word@h/5;redis://b:s3cret-word@h/5",
    ],
)
def test_no_url_is_shown_with_its_secret(url: str) -> None:
    """In a message, a resume line, a settings error; once known, nowhere."""
    assert "s3cret" not in safe_url(url)
    for arguments in (["run", "--redis-url", url], ["run", f"--base-url={url}"], ["run", url]):
        assert "s3cret" not in resume_command("b", arguments)
    Settings(redis_url=url)
    assert "s3cret" not in without_secrets(f"no such host: {url}")
    with pytest.raises(ValueError) as refused:
        Settings(redis_url=url, namespace="..")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("text", ["?" * 10_000, "?a" * 5_000, "?token" * 2_000, "&" * 10_000])
def test_a_long_foreign_text_is_searched_in_no_time(text: str) -> None:
    """A reply of question marks (text in a wrong encoding, say) held a worker for 20 s."""
    started = time.process_time()
    assert without_secrets(text + "?x=1&api_key=hidden").endswith("?x=1&api_key=***")
    assert time.process_time() - started < 2


def test_what_is_no_secret_of_a_url_stays() -> None:
    """Host, port, user and path are what a message is for."""
    keep_secrets_in("unix:///tmp/a@b.sock")
    keep_secrets_in(None)
    assert without_secrets("/tmp/a in redis://host:6379/0") == "/tmp/a in redis://host:6379/0"
    assert safe_url("redis://user:pw@host:1/3") == "redis://user:***@host:1/3"
    assert resume_command("b", ["run", "a.jsonl", "--rpm", "5"]) == (
        "batchllm run a.jsonl --rpm 5 --batch-id b"
    )


ODD = "a\x1b[31mb\x07c\x9b1md\u202ee\u2066f\ud800g\x7fh\u200ei\rj\u2028k\U000e0041l"


def test_nothing_that_a_terminal_obeys_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """By the console, as JSON, and as an error; JSON keeps the value."""
    to_stderr().print(Text(ODD), soft_wrap=True)
    print_json({"text": ODD})
    with pytest.raises(SystemExit):
        main(["run", f"{ODD}.jsonl", "--model", "simulated"])
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert text == printable(text)
        assert "\x1b" not in text
    assert json.loads(said.out) == {"text": ODD}


def test_words_of_all_languages_stay_as_they_are() -> None:
    """Only what is obeyed or hidden is escaped."""
    for text in ("größer, 日本語, עברית, العربية, 👩\u200d🔬, a\tb\nc", ""):
        assert printable(text) == text
