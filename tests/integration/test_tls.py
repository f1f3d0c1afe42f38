"""Redis behind TLS: ledger, broker and Flower check the certificate, and say so when it is bad."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import ipaddress
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kombu.exceptions import OperationalError

from batchllm_celery.connection import Connection
from batchllm_celery.errors import RedisUnavailableError
from batchllm_celery.queue import make_app
from batchllm_celery.settings import Settings
from tests.acceptance.servers import free_port, valkey_on_tcp
from tests.support import wait_until

PASSWORD = "the-redis-password"


def make_certificate(folder: Path, names: list[x509.GeneralName]) -> tuple[Path, Path]:
    """A self-signed certificate that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


@dataclass
class TlsProxy:
    """Ends TLS before a Redis that has none, and keeps what it was told."""

    certificate: Path
    key: Path
    target: int
    port: int = field(default_factory=free_port)
    seen: bytearray = field(default_factory=bytearray)

    @contextlib.contextmanager
    def running(self) -> Iterator[TlsProxy]:
        loop, ready = asyncio.new_event_loop(), threading.Event()
        thread = threading.Thread(target=self._serve, args=(loop, ready), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)

    def _serve(self, loop: asyncio.AbstractEventLoop, ready: threading.Event) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        loop.set_exception_handler(lambda *_: None)  # refused handshakes are what this is for
        server = loop.run_until_complete(
            asyncio.start_server(self._pass_on, "localhost", self.port, ssl=context)
        )
        ready.set()
        loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                while data := await source.read(65536):
                    if sink is back:
                        self.seen += data
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))


@pytest.fixture(params=["good"])
def proxy(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TlsProxy]:
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    if request.param == "other":
        names = [
            x509.DNSName("elsewhere.example"),
            x509.IPAddress(ipaddress.ip_address("10.9.8.7")),
        ]
    certificate, key = make_certificate(tmp_path, names)
    with valkey_on_tcp(PASSWORD) as url:
        port = int(url.rpartition(":")[2].partition("/")[0])
        with TlsProxy(certificate, key, port).running() as proxy:
            yield proxy


def url_of(proxy: TlsProxy, options: str = "") -> str:
    return f"rediss://:{PASSWORD}@localhost:{proxy.port}/0{options}"


def publish(url: str) -> None:
    app = make_app(Settings(), url)
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=0, timeout=10)
        channel: Any = connection.default_channel
        channel.client.ping()


async def test_ledger_and_broker_speak_tls_with_a_known_certificate(proxy: TlsProxy) -> None:
    """With the authority named in the URL both come through."""
    url = url_of(proxy, f"?ssl_ca_certs={proxy.certificate}")
    async with Connection(url) as connection:
        await connection.ping()
    await asyncio.to_thread(publish, url)
    assert PASSWORD.encode() in proxy.seen


@pytest.mark.parametrize(
    ("proxy", "named", "words"),
    [("good", False, "certificate"), ("other", True, "localhost")],
    indirect=["proxy"],
)
async def test_a_bad_certificate_is_told_and_the_password_stays(
    proxy: TlsProxy, named: bool, words: str
) -> None:
    """Of an unknown authority, or of another host: neither connection says a word."""
    url = url_of(proxy, f"?ssl_ca_certs={proxy.certificate}" if named else "")
    async with Connection(url) as connection:
        with pytest.raises(RedisUnavailableError, match="TLS failed: ") as refused:
            await connection.ping()
    assert words in str(refused.value)
    assert PASSWORD not in str(refused.value)
    with pytest.raises(OperationalError, match="CERTIFICATE_VERIFY_FAILED"):
        await asyncio.to_thread(publish, url)
    assert not proxy.seen


async def test_who_asks_for_no_check_gets_none(proxy: TlsProxy) -> None:
    """Both connections, by the same words."""
    url = url_of(proxy, "?ssl_cert_reqs=none")
    async with Connection(url) as connection:
        await connection.ping()
    await asyncio.to_thread(publish, url)


def test_flower_counts_the_messages_behind_tls(proxy: TlsProxy, tmp_path: Path) -> None:
    """`/api/queues/length` asks Redis on a connection of Flower's own."""
    port, environment = free_port(), dict(os.environ)
    environment["BATCHLLM_REDIS_URL"] = url_of(proxy, f"?ssl_ca_certs={proxy.certificate}")
    environment["BATCHLLM_FLOWER_BASIC_AUTH"] = "ann:a:b%=;'\"$x"
    arguments = [sys.executable, "-m", "batchllm_celery.cli", "flower", "--port", str(port)]
    token = base64.b64encode(environment["BATCHLLM_FLOWER_BASIC_AUTH"].encode()).decode()

    def get(path: str) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
        request.add_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.read()

    def is_up() -> bool:
        with contextlib.suppress(OSError):
            return bool(get("/healthcheck") == b"OK")
        return False

    with (tmp_path / "log").open("wb") as log:
        flower = subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_until(is_up, timeout=60, interval=0.2)
        assert "active_queues" in json.loads(get("/api/queues/length"))
    finally:
        flower.send_signal(signal.SIGKILL)
        flower.wait()
