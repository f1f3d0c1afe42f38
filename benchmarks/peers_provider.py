"""The provider of `peers.py`: answers a POST after a while and keeps the times.

python -m benchmarks.peers_provider SECONDS     prints its port
"""

from __future__ import annotations

import asyncio
import sys
import time

from aiohttp import web


class Provider:
    """One second's answer, whatever is asked; `GET /times` tells first start, last end, calls."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.first = self.last = 0.0
        self.calls = self.flying = self.most = 0

    async def answer(self, request: web.Request) -> web.Response:
        await request.read()
        self.first = self.first or time.time()
        self.flying += 1
        self.most = max(self.most, self.flying)
        await asyncio.sleep(self.seconds)
        self.flying -= 1
        self.calls += 1
        self.last = time.time()
        return web.json_response({"text": "an answer of a few words", "input": 20, "output": 10})

    async def times(self, request: web.Request) -> web.Response:
        told = {"first": self.first, "last": self.last, "calls": self.calls, "most": self.most}
        if request.query.get("reset"):
            self.first = self.last = 0.0
            self.calls = self.most = 0
        return web.json_response(told)


async def _serve(seconds: float) -> None:
    provider = Provider(seconds)
    app = web.Application()
    app.add_routes([web.post("/call", provider.answer), web.get("/times", provider.times)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    server = site._server
    assert server is not None
    print(server.sockets[0].getsockname()[1], flush=True)  # type: ignore[attr-defined]
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
