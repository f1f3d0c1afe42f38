"""A simulated provider in a process of its own, and how to watch and change it from outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from batchllm_celery.simulation.config import SimulationConfig

_STOP_SECONDS = 10


class SimulationClient:
    """The admin side of a simulated provider anywhere.

    Args:
        url: the line it printed: `http://127.0.0.1:PORT`.
        pid: its process, where we started it.
    """

    def __init__(self, url: str, pid: int | None = None) -> None:
        self.url = url
        self.openai_url = f"{url}/v1"
        self.pid = pid

    def stats(self, *, arrivals: bool = False, prompts: bool = False) -> dict[str, Any]:
        """The counts; with `arrivals` a list of [Unix seconds, status, tokens] of each call,
        with `prompts` how often each prompt was answered."""
        wanted = [name for name, on in (("arrivals", arrivals), ("prompts", prompts)) if on]
        return self._request(f"stats?{'&'.join(f'{name}=1' for name in wanted)}")

    def calls(self, after: int = 0) -> list[dict[str, Any]]:
        """The latest calls, from number `after` + 1 on."""
        calls: list[dict[str, Any]] = self._request(f"calls?after={after}")["calls"]
        return calls

    def change(self, **settings: Any) -> None:
        """Change settings (`rpm=300`) in mid-run."""
        self._request("settings", settings)

    def refuse(self, count: int, retry_after: float = 1.0) -> None:
        """Refuse the next `count` calls with a 429 that asks for `retry_after` seconds."""
        self._request("refuse", {"count": count, "retry_after": retry_after})

    def reset(self) -> None:
        """Forget every call, cache and charge."""
        self._request("reset", {})

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/_simulation/{path}", data=data)
        # A proxy of the environment must not see what goes to our own machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@contextlib.contextmanager
def spawn(config: SimulationConfig | None = None, **settings: Any) -> Iterator[SimulationClient]:
    """Run a provider in a process of its own while the context is open.

    Raises:
        RuntimeError: if it did not start; its standard error says why.
    """
    config = (config or SimulationConfig()).changed(**settings)
    command = [sys.executable, "-m", "batchllm_celery.simulation", config.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().rpartition(" ")[2].strip()
            if not url:
                raise RuntimeError("the simulated provider did not start")
            yield SimulationClient(url, process.pid)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
