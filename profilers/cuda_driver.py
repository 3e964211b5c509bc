"""The CUDA driver through ctypes: what a GPU is, memory on it, streams, events and graphs. No other package is needed.

Every call that fails is a DriverError in the user's words. Functions: CUDA driver API, 11.4 (JetPack 5) and newer.
"""

from __future__ import annotations

import ctypes
from typing import Any

LIBRARIES = (
    "libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
)
OUT_OF_MEMORY, NO_DEVICE = 2, 100
WORDS = {
    OUT_OF_MEMORY: "the GPU is out of memory; end other programs on it, or use a smaller batch",
    34: "only a stub of the driver is installed; install NVIDIA's driver",
    46: "the GPU is in use by a program that does not share it",
    NO_DEVICE: "the driver finds no GPU; check CUDA_VISIBLE_DEVICES, and that this user may open /dev/nvidia* (on a "
    "Jetson /dev/nvhost-*)",
    101: "there is no GPU of this number",
    209: "nothing in the engine runs on this GPU: it was built for another one",
    700: "the GPU read or wrote outside its memory; the process has to be started again",
    702: "the GPU took too long over one kernel and was stopped",
    802: "the driver is not ready yet; wait for it, or start the machine again",
    803: "the driver's library and its kernel module are of different versions; start the machine again",
    804: "the installed compatibility library does not support this GPU",
    999: "the driver has failed for an unknown reason; look at dmesg, or start the machine again",
}
MULTIPROCESSORS, MAJOR, MINOR, INTEGRATED = 16, 75, 76, 18  # attributes of a device
NON_BLOCKING, THREAD_LOCAL = 1, 1
NAME_BYTES = 128


class DriverError(RuntimeError):
    """There is no driver or no GPU, or it failed; `code` is the driver's own, 0 when there is none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


def explained(function: str, code: int) -> DriverError:
    words = WORDS.get(code, "see CUresult in NVIDIA's documentation of the driver API")
    return DriverError("%s failed (CUDA error %d): %s" % (function, code, words), code)


class Driver:
    """One GPU. Its context is made when memory or a stream is first asked for.

    Args:
        device: the number of the GPU.
    Raises:
        DriverError: there is no driver, no GPU, or none of this number.
    """

    def __init__(self, device: int = 0) -> None:
        self._library = _loaded()
        self._number = device
        self._context = ctypes.c_void_p()
        self("cuInit", 0)
        self._device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(self._device), device)

    def __call__(self, function: str, *arguments: Any) -> None:
        try:
            code = getattr(self._library, function)(*arguments)
        except AttributeError as error:
            raise DriverError("the driver is too old: it has no %s; install a newer one" % function) from error
        if code:
            raise explained(function, code)

    def describe(self) -> dict[str, str]:
        """What a latency depends on, as text."""
        version, total, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(NAME_BYTES)
        self("cuDriverGetVersion", ctypes.byref(version))
        self("cuDeviceTotalMem_v2", ctypes.byref(total), self._device)
        self("cuDeviceGetName", name, NAME_BYTES, self._device)
        return {
            "gpu": name.value.decode("utf-8", "replace"),
            "multiprocessors": str(self._attribute(MULTIPROCESSORS)),
            "capability": "%d.%d" % (self._attribute(MAJOR), self._attribute(MINOR)),
            "gpu_memory_mb": str(total.value // 1_000_000),
            "cuda": "%d.%d" % (version.value // 1000, version.value % 1000 // 10),
        }

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def use(self) -> None:
        """Make the GPU's primary context current, the one that runtimes share."""
        if not self._context:
            self("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocated(self, size_bytes: int) -> int:
        """An address of new memory on the GPU."""
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size_bytes, 1)))
        return address.value

    def release(self, address: int) -> None:
        self("cuMemFree_v2", ctypes.c_uint64(address))

    def send(self, address: int, array: Any) -> None:
        """Copy a contiguous numpy array to the GPU."""
        self("cuMemcpyHtoD_v2", ctypes.c_uint64(address), array.ctypes.data_as(ctypes.c_void_p), _size(array))

    def fetch(self, array: Any, address: int) -> None:
        """Copy from the GPU into a contiguous numpy array."""
        self("cuMemcpyDtoH_v2", array.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(address), _size(array))

    def stream(self) -> Stream:
        return Stream(self)


class Stream:
    """Work on the GPU in order, with two events to time it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._handle, self._start, self._end = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        driver("cuStreamCreate", ctypes.byref(self._handle), NON_BLOCKING)
        for event in (self._start, self._end):
            driver("cuEventCreate", ctypes.byref(event), 0)

    @property
    def number(self) -> int:
        """The handle that runtimes take."""
        return self._handle.value or 0

    def wait(self) -> None:
        self._driver("cuStreamSynchronize", self._handle)

    def timed_ms(self, enqueue: Any) -> float:
        """Milliseconds on the GPU of what `enqueue()` puts on this stream."""
        self._driver("cuEventRecord", self._start, self._handle)
        enqueue()
        self._driver("cuEventRecord", self._end, self._handle)
        self._driver("cuEventSynchronize", self._end)
        ms = ctypes.c_float()
        self._driver("cuEventElapsedTime", ctypes.byref(ms), self._start, self._end)
        return ms.value

    def clear(self, address: int, size_bytes: int) -> None:
        """Write zeros: the least a stream can do."""
        self._driver("cuMemsetD8Async", ctypes.c_uint64(address), 0, ctypes.c_size_t(size_bytes), self._handle)

    def captured(self, enqueue: Any) -> Graph:
        """What `enqueue()` puts on this stream, as a graph; nothing runs yet."""
        graph = ctypes.c_void_p()
        self._driver("cuStreamBeginCapture_v2", self._handle, THREAD_LOCAL)
        try:
            enqueue()
        finally:  # a stream that is left in capture can do nothing else
            code = self._driver._library.cuStreamEndCapture(self._handle, ctypes.byref(graph))
        if code:
            raise explained("cuStreamEndCapture", code)
        return Graph(self._driver, graph, self._handle)

    def close(self) -> None:
        for event in (self._start, self._end):
            self._driver("cuEventDestroy_v2", event)
        self._driver("cuStreamDestroy_v2", self._handle)


class Graph:
    """Captured work, launched in one call."""

    def __init__(self, driver: Driver, graph: Any, stream: Any) -> None:
        self._driver, self._graph, self._stream = driver, graph, stream
        self._runnable = ctypes.c_void_p()
        driver("cuGraphInstantiateWithFlags", ctypes.byref(self._runnable), graph, ctypes.c_ulonglong(0))

    def launch(self) -> None:
        self._driver("cuGraphLaunch", self._runnable, self._stream)

    def close(self) -> None:
        self._driver("cuGraphExecDestroy", self._runnable)
        self._driver("cuGraphDestroy", self._graph)


def _size(array: Any) -> Any:
    return ctypes.c_size_t(array.nbytes)


def _loaded() -> Any:
    reasons = []
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise DriverError(
        "this machine has no NVIDIA driver (%s); install it, or on a Jetson JetPack: sudo apt install nvidia-jetpack"
        % reasons[0]
    )
