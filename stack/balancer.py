"""One address for several processes, as a Service of Kubernetes is: it spreads connections, not calls."""

import asyncio
import contextlib


class Balancer:
    """Hands each new connection to the next backend that takes it."""

    def __init__(self):
        self.backends = []
        self.server = None
        self.turn = 0

    def add(self, address):
        self.backends.append(address)

    async def listen(self, host, port):
        """Serves; the port it got."""
        self.server = await asyncio.start_server(self.serve, host, port)
        return self.server.sockets[0].getsockname()[1]

    def close(self):
        if self.server:
            self.server.close()

    async def serve(self, reader, writer):
        for _ in range(len(self.backends)):
            self.turn += 1
            host, _, port = self.backends[self.turn % len(self.backends)].rpartition(":")
            with contextlib.suppress(OSError):
                there = await asyncio.open_connection(host, int(port))
                await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))
                return
        writer.close()


async def copy(reader, writer):
    """What one side says to the other, to its end."""
    try:
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
    except OSError:
        pass
    finally:
        with contextlib.suppress(OSError):
            writer.close()
