"""A TCP proxy in a process of its own that hands everything on after a while, both ways.

python -m benchmarks.delay_proxy UNIX_SOCKET SECONDS     prints the port it listens on
"""

from __future__ import annotations

import asyncio
import sys


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Bytes keep their order and their distances: each arrives `delay` after it was sent."""
    loop = asyncio.get_running_loop()
    try:
        while data := await reader.read(65_536):
            loop.call_later(delay, writer.write, data)
    except ConnectionError:
        pass
    finally:
        loop.call_later(delay, writer.close)


async def _serve(socket: str, delay: float) -> None:
    pumps: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(socket)
        for pump in (_pump(reader, far_writer, delay), _pump(far_reader, writer, delay)):
            task = asyncio.create_task(pump)
            pumps.add(task)
            task.add_done_callback(pumps.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], float(sys.argv[2])))
