"""One URL has one reading: redis-py and kombu reach the same database alike, or neither does."""

from __future__ import annotations

import ssl
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.transport import redis as kombu_redis
from redis.asyncio import Redis

from batchllm_celery.connection import Connection, broker_tls, broker_url, client_url
from batchllm_celery.errors import UsageError
from batchllm_celery.queue import make_app
from batchllm_celery.settings import Settings

WORD = "p%40%3A%2F%3F%23%5B%20w"  # p@:/?#[ w

READ: list[tuple[str, dict[str, Any]]] = [
    ("redis://h", {"host": "h", "port": 6379, "db": 0}),
    ("REDIS://h:1/", {"host": "h", "port": 1, "db": 0}),
    ("redis://h:1/7", {"host": "h", "port": 1, "db": 7}),
    ("redis://h?db=3", {"host": "h", "port": 6379, "db": 3}),
    ("redis://h/3?db=3", {"host": "h", "port": 6379, "db": 3}),
    ("redis:///2", {"host": "localhost", "port": 6379, "db": 2}),
    ("redis://[::1]:5/2", {"host": "::1", "port": 5, "db": 2}),
    ("redis://:pw@h", {"host": "h", "password": "pw"}),
    ("redis://u:pw@h", {"username": "u", "password": "pw"}),
    ("redis://TOKEN@h", {"username": "TOKEN", "password": None}),
    ("redis://a@b:c@h", {"username": "a@b", "password": "c", "host": "h"}),
    (f"redis://u:{WORD}@h/1", {"password": "p@:/?#[ w", "db": 1}),
    (f"redis://h?password={WORD}&username=u", {"password": "p@:/?#[ w", "username": "u"}),
    ("redis://:a+b%2Bc@h", {"password": "a+b+c"}),
    ("redis://:%zz@h", {"password": "%zz"}),
    ("unix:///run/s.sock", {"path": "/run/s.sock", "db": 0}),
    ("unix:///s?db=2&password=pw", {"path": "/s", "db": 2, "password": "pw"}),
    (f"unix://u:{WORD}@/a%20b/s?db=5",
     {"path": "/a b/s", "db": 5, "username": "u", "password": "p@:/?#[ w"}),
    ("rediss://h:2", {"host": "h", "port": 2, "db": 0}),
]  # fmt: skip

REFUSED = [
    ("http://h", "must begin with"),
    ("h:6379", "must begin with"),
    ("redis:/h", "must begin with"),
    ("redis+socket:///s", "must begin with"),
    ("redis://h?health_check_interval=30", "health_check_interval"),
    ("redis://h?socket_timeout=5", "socket_timeout"),
    ("redis://h?max_connections=20", "max_connections"),
    ("redis://h?protocol=3", "protocol"),
    ("redis://h?virtual_host=3", "virtual_host"),
    ("redis://h?db=1&db=2", "db"),
    ("redis://h/1?db=2", "two databases"),
    ("redis://:a@h?password=b", "two passwords"),
    ("redis://h/mydb", "a number"),
    ("redis://h/-1", "a number"),
    ("redis://h/1/2", "a number"),
    ("redis://h?db=", "a number"),
    ("redis://h/\u0661", "a number"),
    ("redis://a/5;redis://b/5", "one server"),
    ("redis://a,b/5", "one server"),
    ("redis://:s3cret#x@h", "percent-encode"),
    ("redis://:s3cret/x@h", "percent-encode"),
    ("redis://:s3cret?x@h", "percent-encode"),
    ("redis://:s3cret[x@h", "percent-encode"),
    ("redis://:s3cret x@h", "percent-encode"),
    ("redis://:s3cret\n@h", "percent-encode"),
    ("redis://h/0#s3cret", "percent-encode"),
    ("redis://h:port", "host:port"),
    ("redis://h:0", "host:port"),
    ("redis://h:70000", "host:port"),
    ("redis://::1", "host:port"),
    ("redis://h?ssl_cert_reqs=none", "rediss"),
    ("rediss://h?ssl_cert_reqs=maybe", "required, optional or none"),
    ("unix://s.sock", "unix:///"),
    ("unix://", "absolute"),
    ("unix:///s?db=x", "a number"),
    ("unix:///s#x", "%23"),
]


def of_redis_py(url: str) -> dict[str, Any]:
    return dict(Redis.from_url(client_url(url)).connection_pool.connection_kwargs)


def of_kombu(url: str) -> dict[str, Any]:
    """What a channel connects with; made without `__init__`, which connects."""
    channel: Any = object.__new__(kombu_redis.Channel)
    client = make_app(Settings(), url).connection_for_write()
    channel.connection = SimpleNamespace(client=client, default_port=6379)
    return dict(channel._connparams())


@pytest.mark.parametrize(("url", "means"), READ)
def test_both_libraries_read_a_url_alike(url: str, means: dict[str, Any]) -> None:
    """Server, database, user and password, whatever they are made of."""
    for read in (of_redis_py(url), of_kombu(url)):
        seen = {name: read.get(name) or None for name in means}
        assert seen == {name: value or None for name, value in means.items()}


@pytest.mark.parametrize(("url", "words"), REFUSED)
def test_what_they_would_read_differently_is_refused_in_one_line(url: str, words: str) -> None:
    """By the connection and by the broker alike, with what to write, without the password."""
    for read in (Connection, broker_url, lambda url: make_app(Settings(), url)):
        with pytest.raises(UsageError) as refused:
            read(url)
        said = str(refused.value)
        assert words in said
        assert said.isprintable()
        assert "s3cret" not in said.replace("s3cret#x", "").replace("0#s3cret", "")


@pytest.mark.parametrize(
    ("options", "check", "by_name"),
    [
        ("", ssl.CERT_REQUIRED, True),
        ("?ssl_cert_reqs=CERT_REQUIRED", ssl.CERT_REQUIRED, True),
        ("?ssl_check_hostname=false", ssl.CERT_REQUIRED, False),
        ("?ssl_cert_reqs=none", ssl.CERT_NONE, False),
        ("?ssl_cert_reqs=optional&ssl_ca_certs=/ca.pem", ssl.CERT_OPTIONAL, True),
    ],
)
def test_both_check_certificates_alike(options: str, check: int, by_name: bool) -> None:
    """By default the certificate and the name in it; less only where the URL says so."""
    url = f"rediss://h{options}"
    kombus, ours = broker_tls(url) or {}, of_redis_py(url)
    assert kombus["ssl_cert_reqs"] == check
    assert kombus["ssl_check_hostname"] is by_name
    assert f"CERT_{ours['ssl_cert_reqs'].upper()}" == ssl.VerifyMode(check).name
    assert ours["ssl_check_hostname"] is by_name
    assert kombus.get("ssl_ca_certs") == ours.get("ssl_ca_certs")
    assert "ssl_cert_reqs" in of_kombu(url)


@pytest.mark.parametrize(
    "name", ["CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"]
)
def test_messages_travel_through_the_ledgers_redis(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever another Celery's environment says."""
    monkeypatch.setenv(name, "redis://elsewhere:1/9")
    app = make_app(Settings(), "redis://here:2/3")
    for connect in (app.connection, app.connection_for_read, app.connection_for_write):
        assert connect().as_uri(include_password=True).endswith("here:2/3")
