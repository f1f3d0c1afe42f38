"""Redis URLs: read once, strictly, and spelled so that redis-py and kombu understand the same.

The two libraries read one URL differently, and each passes over what it does not know.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from batchllm_celery.errors import UsageError
from batchllm_celery.redaction import keep_secrets_in, printable, safe_url

_SCHEMES = ("redis", "rediss", "unix")
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]*)(?::([0-9]{1,5}))?")
_DATABASE = re.compile(r"[0-9]{1,5}")
_CHECKS = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_OPTIONS = ("db", "username", "password", "ssl_cert_reqs", "ssl_check_hostname", *_FILES)


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """What a URL says. `place` is the socket's path, or `host:port`."""

    scheme: str
    place: str
    database: int
    username: str
    password: str = field(repr=False)
    tls: dict[str, Any] | None
    """Of `rediss`: `ssl_cert_reqs`, `ssl_check_hostname` and the files that are given."""

    def spelled(self, scheme: str, tail: str) -> str:
        """The URL in one library's words."""
        user = quote(self.username, safe="")
        word = f":{quote(self.password, safe='')}" if self.password else ""
        return f"{scheme}://{user}{word}{'@' if user or word else ''}{self.place}{tail}"


def read_url(url: str) -> RedisUrl:
    """The one reading of `url`.

    Raises:
        UsageError: in one line that says what to write, without the password.
    """
    keep_secrets_in(url)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in _SCHEMES:
        raise _refusal(url, "it must begin with redis://, rediss:// or unix://")
    if re.search(r"[\x00-\x20\x7f]", url):
        raise _refusal(url, "it holds a space or a control character; percent-encode it (%20)")
    if ";" in rest or "," in rest.partition("?")[0]:
        raise _refusal(
            url, "it must name one server (in a password percent-encode ; and , as %3B and %2C)"
        )
    read = _read_socket if scheme.lower() == "unix" else _read_server
    return read(url, scheme.lower(), rest)


def _refusal(url: str, why: str) -> UsageError:
    return UsageError(f"{safe_url(url)!r} is not a Redis URL that can be used: {why}")


def _read_socket(url: str, scheme: str, rest: str) -> RedisUrl:
    authority, slash, tail = rest.partition("/")
    path, _, query = f"{slash}{tail}".partition("?")
    userinfo, at, host = authority.rpartition("@")
    if "#" in rest or (authority and not at):
        raise _refusal(url, "write unix:///path/of.sock?db=0, with # as %23")
    if host or len(path) < 2:
        raise _refusal(url, "the path of a socket must be absolute: unix:///run/redis.sock")
    options = _options(url, scheme, query)
    return _with(url, scheme, path, userinfo, options, options.get("db", "0"))


def _read_server(url: str, scheme: str, rest: str) -> RedisUrl:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(authority) :]
    userinfo, _, server = authority.rpartition("@")
    if "@" in tail or "#" in tail or "[" in userinfo or "]" in userinfo:
        raise _refusal(
            url, "percent-encode # / ? [ ] and @ in a password (%23 %2F %3F %5B %5D %40)"
        )
    found = _HOST_AND_PORT.fullmatch(server)
    if found is None or not 0 < int(found[2] or 6379) < 65536:
        raise _refusal(url, "after the last @ it must say host:port")
    path, _, query = tail.partition("?")
    options = _options(url, scheme, query)
    database = path.removeprefix("/")
    if database and options.get("db", database) != database:
        raise _refusal(url, "it names two databases")
    place = f"{found[1] or 'localhost'}:{found[2] or 6379}"
    return _with(url, scheme, place, userinfo, options, database or options.get("db", "0"))


def _options(url: str, scheme: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS or name in options:
            known = ", ".join(_OPTIONS)
            raise _refusal(
                url, f"leave out ?{printable(name)[:40]}= (known, each once, are {known})"
            )
        if name.startswith("ssl_") and scheme != "rediss":
            raise _refusal(url, f"{name} goes with rediss:// only")
        options[name] = value
    return options


def _with(
    url: str, scheme: str, place: str, userinfo: str, options: dict[str, str], database: str
) -> RedisUrl:
    if not _DATABASE.fullmatch(database):
        raise _refusal(url, "its database must be a number, as in redis://host:6379/0")
    username, _, password = userinfo.partition(":")
    given = {"username": unquote(username), "password": unquote(password)}
    for name in given:
        if options.get(name) and given[name]:
            raise _refusal(url, f"it names two {name}s")
    return RedisUrl(
        scheme=scheme,
        place=place,
        database=int(database),
        username=given["username"] or options.get("username", ""),
        password=given["password"] or options.get("password", ""),
        tls=_tls(url, options) if scheme == "rediss" else None,
    )


def _tls(url: str, options: dict[str, str]) -> dict[str, Any]:
    """Certificates are checked unless the URL says otherwise."""
    check = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    name = options.get("ssl_check_hostname", "true").lower()
    if check not in _CHECKS or name not in ("true", "false"):
        raise _refusal(
            url, "ssl_cert_reqs is required, optional or none; ssl_check_hostname true or false"
        )
    files = {option: options[option] for option in _FILES if option in options}
    by_name = name == "true" and check != "none"
    return {"ssl_cert_reqs": check, "ssl_check_hostname": by_name} | files


def client_url(url: str) -> str:
    """The URL as redis-py spells it.

    Raises:
        UsageError: as `read_url`.
    """
    read = read_url(url)
    if read.scheme == "unix":
        return read.spelled("unix", f"?db={read.database}")
    tls = {name: str(value) for name, value in (read.tls or {}).items()}
    return read.spelled(read.scheme, f"/{read.database}{'?' if tls else ''}{urlencode(tls)}")


def broker_url(url: str) -> str:
    """The same Redis as Celery and Flower spell it; a `rediss` goes with `broker_tls`.

    Raises:
        UsageError: as `read_url`.
    """
    read = read_url(url)
    if read.scheme == "unix":
        return read.spelled("redis+socket", f"?virtual_host={read.database}")
    return read.spelled(read.scheme, f"/{read.database}")


def broker_tls(url: str) -> dict[str, Any] | None:
    """Celery's `broker_use_ssl` for the same Redis; None without TLS."""
    tls = read_url(url).tls
    return None if tls is None else tls | {"ssl_cert_reqs": _CHECKS[tls["ssl_cert_reqs"]]}
