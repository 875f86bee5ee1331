"""What a compiled CUDA binary says of itself: tests read it where no GPU could run it."""

from __future__ import annotations

import struct


def local_bytes(cubin: bytes, kernel: str) -> int:
    """Bytes of stack a thread that a cubin's metadata (.nv.info, EIATTR_MIN_STACK_SIZE) states for a kernel."""
    offset, = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + 64 * i) for i in range(count)]

    def name(section: tuple[int, ...]) -> str:
        start = sections[names][4] + section[0]
        return cubin[start : cubin.index(b"\0", start)].decode()

    info = next(section for section in sections if name(section) == ".nv.info")
    at, end = info[4], info[4] + info[5]
    found = []
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, at)
        if form == 4:
            if attribute == 0x12:
                found.append(struct.unpack_from("<II", cubin, at + 4)[1])
            at += 4 + size
        else:
            at += 4
    assert found, kernel
    return max(found)
