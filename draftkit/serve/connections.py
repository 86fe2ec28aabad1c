"""Connections: how long a client may take to say what it wants, and who has to go when there are too many.

Uvicorn limits the time between requests only: a client that never sends one, or half of one, would stay for
ever.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # from the first byte of a request, or from connecting, to the end of its headers
IDLE_SECONDS = 30  # between requests
SPARE = 64  # connections beyond the most, while none of them can be closed: they may ask for /health


class LimitedProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1 with a time limit for headers and a cap on connections, which is given as `most`.

    Where there are more, the one that has been idle for longest makes room; one that is being answered is
    never closed.
    """

    most = 4096

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._since = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._wait_for_head()
        if (
            len(self.connections) > self.most
            and not self._make_room()
            and len(self.connections) > self.most + SPARE
        ):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by whomever."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        super().data_received(data)
        self._since = time.monotonic()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._wait_for_head()
        else:
            self._stop_waiting()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing has come since the last answer: one that was not taken in full is given up."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    @property
    def idle(self) -> bool:
        """No request is being read in full or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            self.transport.close()

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest, if there is one besides this."""
        others: list[Any] = [
            c for c in self.connections if c is not self and isinstance(c, LimitedProtocol) and c.idle
        ]
        if not others:
            return False
        oldest = min(others, key=lambda c: c._since)
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True


def protocol_for(most: int) -> type[LimitedProtocol]:
    """The protocol with room for `most` connections."""
    return type("Protocol", (LimitedProtocol,), {"most": most})
