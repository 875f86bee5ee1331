"""CUDA C++ at run time: NVRTC compiles it, the driver loads it, compiled binaries stay on disk.

Both libraries are reached through ctypes: libnvrtc comes with torch's CUDA wheels (or a CUDA toolkit), libcuda with the
driver, so nothing has to be installed. Nothing here needs a GPU until `load`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from saddle.errors import SaddleError
from saddle.kernels.ahead import only_compiles

CU_FUNC_ATTRIBUTE_NUM_REGS = 4
CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
# Newest first; torch's wheels of CUDA 12 and 13 bring one of them.
NVRTC_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class CudaError(SaddleError):
    """NVRTC or the driver refused something; the message is theirs."""


@cache
def nvrtc() -> ctypes.CDLL:
    """libnvrtc, from the packages of this Python, else from the system.

    Raises:
        CudaError: there is none.
    """
    folders = [lib for folder in sys.path for lib in sorted(Path(folder).glob("nvidia/*/lib"))]
    for name in NVRTC_NAMES:
        for folder in [*folders, Path("/usr/local/cuda/lib64")]:
            if (folder / name).exists():
                return ctypes.CDLL(str(folder / name))
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    names = ", ".join(NVRTC_NAMES)
    raise CudaError(f"NVRTC was not found ({names}); torch's CUDA wheels bring it (nvidia-cuda-nvrtc).")


def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def sources(name: str) -> dict[str, str]:
    """A kernel's file in `cuda/` and all the headers that it includes, by name."""
    folder = resources.files("saddle.kernels").joinpath("cuda")
    found: dict[str, str] = {}
    wanted = [name]
    while wanted:
        file = wanted.pop()
        if file not in found:
            found[file] = folder.joinpath(file).read_text()
            wanted += re.findall(r'^#include "(\S+)"', found[file], re.M)
    return found


def compile_cubin(name: str, sources: Mapping[str, str], options: Sequence[str]) -> bytes:
    """Compile `sources[name]`; the others are its headers.

    Raises:
        CudaError: with the compiler's log.
    """
    library = nvrtc()
    headers = [(header, text) for header, text in sources.items() if header != name]
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for _, text in headers))
    names = (ctypes.c_char_p * len(headers))(*(header.encode() for header, _ in headers))
    program = ctypes.c_void_p()
    made = library.nvrtcCreateProgram(
        ctypes.byref(program), sources[name].encode(), name.encode(), len(headers), texts, names
    )
    _check_nvrtc(made, "nvrtcCreateProgram")
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), flags)
        if status:
            log = _nvrtc_bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            raise CudaError(f"{name} does not compile with {' '.join(options)}:\n{log.decode(errors='replace')}")
        return _nvrtc_bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def cached_cubin(folder: Path | None, name: str, sources: Mapping[str, str], options: Sequence[str], tag: str) -> bytes:
    """`compile_cubin`, from disk if the same sources were compiled with the same options and compiler before.

    Args:
        folder: of the cache; None: no cache.
        tag: what else the binary belongs to (GPU, version of Saddle); part of the file's name.
    """
    if folder is None:
        return compile_cubin(name, sources, options)
    digest = hashlib.sha256(repr((nvrtc_version(), sorted(sources.items()), list(options))).encode()).hexdigest()
    path = folder / f"{Path(name).stem}-{tag}-{digest[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = compile_cubin(name, sources, options)
    folder.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: several processes may start at once.
    handle, written = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(cubin)
    os.replace(written, path)
    return cubin


class Kernel:
    """A function of a loaded binary, launched on a stream of the current context.

    Args:
        shared_bytes: dynamic shared memory of a block.

    Raises:
        CudaError: the driver does not take it.
    """

    def __init__(self, cubin: bytes, function: str, shared_bytes: int) -> None:
        self._driver = driver()
        self._module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        self._shared_bytes = shared_bytes
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), cubin), "cuModuleLoadData")
        found = self._driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, function.encode())
        self._check(found, "cuModuleGetFunction")
        allowed = self._driver.cuFuncSetAttribute(
            self._function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
        )
        self._check(allowed, "cuFuncSetAttribute")

    def attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._check(self._driver.cuFuncGetAttribute(ctypes.byref(value), which, self._function), "cuFuncGetAttribute")
        return value.value

    def blocks_per_sm(self, threads: int) -> int:
        """Blocks that a multiprocessor can hold at once."""
        value = ctypes.c_int()
        found = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(value), self._function, threads, ctypes.c_size_t(self._shared_bytes)
        )
        self._check(found, "cuOccupancyMaxActiveBlocksPerMultiprocessor")
        return value.value

    def launch(self, blocks: int, threads: int, parameters: ctypes.Structure, stream: int) -> None:
        """Launch with all blocks resident at once; `parameters` is the kernel's one argument, copied by the call."""
        if only_compiles():
            return
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        status = self._driver.cuLaunchCooperativeKernel(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, ctypes.c_void_p(stream), pointers
        )
        self._check(status, "cuLaunchCooperativeKernel")

    def launch_apart(self, blocks: int, threads: int, parameters: ctypes.Structure, stream: int) -> None:
        """`launch` without the promise that all blocks are resident at once."""
        if only_compiles():
            return
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        status = self._driver.cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, ctypes.c_void_p(stream), pointers, None
        )
        self._check(status, "cuLaunchKernel")

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{what}: {text.value.decode() if text.value else status}")


@cache
def driver() -> ctypes.CDLL:
    """libcuda.

    Raises:
        CudaError: there is no NVIDIA driver.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"The CUDA driver was not found: {error}") from None


def _check_nvrtc(status: int, what: str) -> None:
    if status:
        error = nvrtc().nvrtcGetErrorString
        error.restype = ctypes.c_char_p
        raise CudaError(f"{what}: {error(status).decode()}")


def _nvrtc_bytes(program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(getattr(nvrtc(), size_of)(program, ctypes.byref(size)), size_of)
    buffer = ctypes.create_string_buffer(size.value)
    _check_nvrtc(getattr(nvrtc(), get)(program, buffer), get)
    return buffer.raw
