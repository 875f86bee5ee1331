"""Server-sent events as the OpenAI APIs use them: one `data:` line an event."""

from __future__ import annotations


class Splitter:
    """Cuts a byte stream into the payloads of its `data:` lines; comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads that `data` completes, in order."""
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
