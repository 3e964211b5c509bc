"""Look step by step at what TensorRT needs on this device; each step says what it found, or what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import jetson, trt_api, trtexec
from .cuda_driver import Driver
from .trt_reports import flags

KNOWN = ("exportProfile", "exportTimes", "exportLayerInfo", "separateProfileRun", "useCudaGraph")


class Program:
    """One call for each step; a call that fails says what is missing."""

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {"driver": self.driver, "module": self.module, "program": self.program, "power": self.power}

    def driver(self, event: Callable[[Any], None], device: int) -> str:
        about = Driver(device).describe()
        text = "%(gpu)s, compute capability %(capability)s, %(multiprocessors)s multiprocessors, CUDA %(cuda)s" % about
        return "%s, %s MB" % (text, about["gpu_memory_mb"])

    def module(self, event: Callable[[Any], None]) -> str:
        """TensorRT's Python module; "" where there is none."""
        try:
            found = trt_api.imported()
        except ImportError:
            return ""
        what = trt_api.features(found)
        return "%s %s%s" % (found.__name__, found.__version__, "" if what.builds else " (a runtime alone)")

    def program(self, event: Callable[[Any], None]) -> str:
        """trtexec; "" where there is none. Raises RuntimeError when it is too old to report layers."""
        path = trtexec.found()
        if not path:
            return ""
        text = jetson.said([path, "--help"])
        missing = [name for name in KNOWN if name not in flags(text)]
        if missing:
            raise RuntimeError("%s has no --%s: TensorRT 8.5 or newer is needed" % (path, ", --".join(missing)))
        return "%s, TensorRT %s" % (
            path,
            trtexec.version(text + jetson.said([path, "--loadEngine=/nowhere"])) or "of an unknown version",
        )

    def power(self, event: Callable[[Any], None]) -> str:
        """Board, release, power mode and clocks of a Jetson; "" elsewhere."""
        about = jetson.describe()
        return "; ".join("%s %s" % (key.replace("_", " "), text) for key, text in about.items())
