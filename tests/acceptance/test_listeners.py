"""Prometheus and OpenTelemetry, switched on by the environment of real workers."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.acceptance.conftest import StartProvider
from tests.acceptance.fleet import Fleet, write_rows
from tests.support import wait_until

ROWS = 60


@pytest.fixture
def simulated(fleet: Fleet, provide: StartProvider) -> Fleet:
    fleet.env["BATCHLLM_SIMULATED_URL"] = provide().url
    return fleet


def answer(fleet: Fleet, *options: str) -> None:
    """Let the fleet answer `ROWS` rows."""
    rows = write_rows(fleet.folder / "rows.jsonl", ROWS)
    options = ("--model", "simulated", "--rpm", "60000", "--batch-id", "b", *options)
    submitted = fleet.run("submit", str(rows), *options)
    assert submitted.returncode == 0, submitted.stderr
    ended = fleet.run("results", "b", "--follow", "-o", str(fleet.folder / "out.jsonl"))
    assert ended.returncode == 0, ended.stderr


def free_port() -> int:
    with socket.create_server(("", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def ports_of(said: str) -> list[int]:
    return [int(port) for port in re.findall(r"metrics.listening port=(\d+)", said)]


def counted(ports: list[int]) -> float:
    """Items with an outcome, as a Prometheus that scrapes all these ports would add them."""
    total = 0.0
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        lines = re.findall(r"^batchllm_items_total\{.*\} (\S+)$", text, re.MULTILINE)
        total += sum(map(float, lines))
    return total


def test_each_process_serves_its_metrics_at_a_port_of_its_own(simulated: Fleet) -> None:
    """Three processes and one number: three ports, one of them skipped, no count lost."""
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("", 0)))
        first = taken.getsockname()[1]
        simulated.env["BATCHLLM_PROMETHEUS_PORT"] = str(first)
        simulated.start("worker", "--processes", "3", name="worker")
        wait_until(lambda: len(ports_of(simulated.said("worker"))) == 3)
        ports = ports_of(simulated.said("worker"))
        assert len(set(ports)) == 3
        assert all(first < port < first + 100 for port in ports)
        answer(simulated)
        wait_until(lambda: counted(ports) == ROWS)


def test_each_child_of_prefork_serves_its_metrics(simulated: Fleet) -> None:
    """A plain Celery worker does the same; its parent, which runs no item, serves none."""
    simulated.env["BATCHLLM_PROMETHEUS_PORT"] = str(free_port())
    simulated.start_celery_worker("-P", "processes", "-c", "2", "-l", "INFO", name="worker")
    wait_until(lambda: len(ports_of(simulated.said("worker"))) == 2)
    answer(simulated)
    wait_until(lambda: counted(ports_of(simulated.said("worker"))) == ROWS)
    assert len(ports_of(simulated.said("worker"))) == 2


def test_a_port_that_cannot_be_had_stops_no_work(simulated: Fleet) -> None:
    """No port is free from 65535 on: one line, and the items are answered."""
    with ExitStack() as stack:
        stack.enter_context(socket.create_server(("", 65_535)))
        simulated.env["BATCHLLM_PROMETHEUS_PORT"] = "65535"
        simulated.start_celery_worker(name="worker")
        answer(simulated)
    assert simulated.said("worker").count("listener.not_opened") == 1


@contextmanager
def collector() -> Iterator[tuple[str, dict[str, list[bytes]]]]:
    """An OpenTelemetry collector that keeps what it is sent, by path."""
    received: dict[str, list[bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.setdefault(self.path, []).append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("pool", [(), ("-P", "processes", "-c", "2")], ids=["asyncio", "prefork"])
def test_spans_reach_the_collector_that_the_environment_names(
    simulated: Fleet, pool: tuple[str, ...]
) -> None:
    """A span per item and the counters, whole when the worker has ended; no prompt in them."""
    with collector() as (url, received):
        simulated.env |= {"BATCHLLM_OTEL": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": url}
        worker = simulated.start_celery_worker(*pool, name="worker")
        answer(simulated)
        worker.terminate()
        assert worker.wait(timeout=60) == 0
    spans = b"".join(received["/v1/traces"])
    assert spans.count(b"batchllm.item_id") == ROWS
    assert b"batchllm-worker" in spans
    assert b"batchllm.items" in b"".join(received["/v1/metrics"])
    assert b"question number" not in spans


@pytest.mark.parametrize(
    ("variables", "module", "extra"),
    [
        ({"BATCHLLM_PROMETHEUS_PORT": "9464"}, "prometheus_client", "prometheus"),
        ({"BATCHLLM_OTEL": "1"}, "opentelemetry", "otel"),
        ({"BATCHLLM_OTEL": "true"}, "opentelemetry.exporter", "otel"),
    ],
)
@pytest.mark.parametrize("command", ["batchllm", "celery"])
def test_a_missing_extra_is_one_line_at_the_start(
    fleet: Fleet, variables: dict[str, str], module: str, extra: str, command: str
) -> None:
    """It names the variable, and what to install; nothing is started again and again."""
    _hide(module, fleet)
    fleet.env |= variables
    if command == "batchllm":
        ended = fleet.run("worker")
        assert ended.returncode == 2
        said = ended.stderr
    else:
        worker = fleet.start_celery_worker(name="worker")
        assert worker.wait(timeout=60) != 0
        said = fleet.said("worker")
    (line,) = [line for line in said.splitlines() if line.startswith("Error:")]
    assert next(iter(variables)) in line
    assert f"batchllm-celery[{extra}]" in line
    assert "Traceback" not in said


def test_nothing_is_opened_by_an_empty_variable(simulated: Fleet) -> None:
    """What compose hands on without a value is as good as unset."""
    simulated.env |= {"BATCHLLM_PROMETHEUS_PORT": "", "BATCHLLM_OTEL": "", "BATCHLLM_SLOTS": ""}
    simulated.start_celery_worker(name="worker")
    answer(simulated)
    assert ports_of(simulated.said("worker")) == []


def _hide(module: str, fleet: Fleet) -> None:
    """Let no process of the fleet import `module`, as if it were not installed."""
    hiding = f"import sys\nsys.modules[{module!r}] = None\n"
    (Path(fleet.folder) / "sitecustomize.py").write_text(hiding)
    fleet.env["PYTHONPATH"] = f"{fleet.folder}:{fleet.env['PYTHONPATH']}"
