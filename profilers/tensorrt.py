"""TensorRT on an NVIDIA GPU: engines are built here, kept, timed with CUDA graphs, and their layers told apart.

TensorRT runs in a child process with a deadline: through its Python module, or through trtexec where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import gpu_state, jetson, machine, trtexec
from .child import Child, ChildError
from .power import Switched

METHOD = "1"  # of timing layers: entries of one method do not mix with another's
SILENCE_S = 3600.0  # a large network takes a small board this long to build; signs of life go to the host meanwhile
BACKENDS = ("auto", "python", "trtexec")


class TensorRTError(RuntimeError):
    """What TensorRT or the driver says, in the user's words."""


class Program:
    """The calls of one session: `open` first, then the others."""

    def __init__(self) -> None:
        self._device, self._power_mode = 0, ""
        self._worker: Child | trtexec.Trtexec | None = None
        self._opening: dict[str, Any] = {}
        self._switched: Switched | None = None  # the old mode is back when this process ends

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {name: getattr(self, name) for name in ("open", "state", "build", "time", "run", "operators")}

    def open(
        self, event: Callable[[Any], None], precision: str, device: int, backend: str, tf32: bool, dla: int,
        external_tactics: bool, workspace_mib: int, power_mode: str,
    ) -> dict[str, Any]:  # fmt: skip
        """Find driver, GPU and TensorRT, and fix how engines are built; returns what measurements will depend on."""
        if backend not in BACKENDS:
            raise ValueError("backend %r; there are %s" % (backend, ", ".join(BACKENDS)))
        if power_mode:
            self._switched = Switched(power_mode)
        self._device, self._power_mode = device, jetson.mode_now()
        wish = {
            "precision": precision,
            "tf32": tf32,
            "dla": dla,
            "external_tactics": external_tactics,
            "workspace_mib": workspace_mib,
        }
        self._opening = {"backend": backend, "device": device, "power_mode": self._power_mode, "wish": wish}
        about = self._opened(event, **self._opening)
        described = dict(machine.describe(), **jetson.describe())
        described.update(about, method=METHOD, tf32=str(tf32), dla=str(dla) if dla >= 0 else "none")
        described["processor"] = described.get("board") or about["gpu"]
        return {"machine": described}

    def _opened(self, event: Callable[[Any], None], backend: str, **arguments: Any) -> dict[str, str]:
        """Start the first back end that is there and works."""
        missing = ""
        if backend != "trtexec":
            self._worker = Child("trt_worker", "TensorRT's process")
            try:
                return self._asked("open", event, **arguments)  # type: ignore[no-any-return]
            except ChildError as error:
                self._worker.close()
                self._worker = None
                if error.kind not in ("ImportError", "ModuleNotFoundError") or backend == "python":
                    raise _explained(error) from error
                missing = str(error)
        program = trtexec.found()
        if not program:
            raise TensorRTError(
                "there is no TensorRT: %s, and no trtexec at %s or in PATH; on a Jetson: sudo apt install "
                "nvidia-jetpack python3-libnvinfer" % (missing or "trtexec was asked for", trtexec.USUAL)
            )
        self._worker = trtexec.Trtexec(program)
        return self._asked("open", event, **arguments)  # type: ignore[no-any-return]

    def state(self, event: Callable[[Any], None]) -> dict[str, Any]:
        return gpu_state.state(self._device)

    def build(self, event: Callable[[Any], None], path: str) -> dict[str, Any]:
        """Build a network's engine and keep it."""
        return self._called("build", event, path=path)  # type: ignore[no-any-return]

    def time(
        self, event: Callable[[Any], None], items: list[dict[str, Any]], least: int, most: int, interval: float,
        budget_s: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Time layers and whole models in turn; see `trt_worker`."""
        found = self._called("time", event, items=items, least=least, most=most, interval=interval, budget_s=budget_s)
        return {"timings": found, "state": self.state(event)}

    def run(self, event: Callable[[Any], None], path: str, inputs: list[str], output: str) -> dict[str, Any]:
        return self._called("run", event, path=path, inputs=inputs, output=output)  # type: ignore[no-any-return]

    def operators(self, event: Callable[[Any], None], path: str) -> dict[str, Any]:
        """The layers of a model's engine with their times, and its time end to end."""
        return self._called("layers", event, path=path)  # type: ignore[no-any-return]

    def _called(self, name: str, event: Callable[[Any], None], **arguments: Any) -> Any:
        now = jetson.mode_now()
        if now != self._power_mode:
            raise TensorRTError(
                "the power mode was %s when the session began and is %s now: what is measured would not belong "
                "together; start again" % (self._power_mode or "unknown", now or "unknown")
            )
        if self._worker is None:  # the last call ended it
            self._opened(event, **self._opening)
        try:
            return self._asked(name, event, **arguments)
        except ChildError as error:
            if not error.kind and self._worker is not None:
                self._worker.close()
                self._worker = None
            raise _explained(error) from error

    def _asked(self, name: str, event: Callable[[Any], None], **arguments: Any) -> Any:
        assert self._worker is not None
        return self._worker.call(name, event, SILENCE_S, **arguments)


def _explained(error: ChildError) -> Exception:
    """The child's own words, without the name of its error where that tells the user nothing."""
    text = str(error)
    if error.kind == "MemoryError":
        text = "the device is out of memory; end other programs on it, or choose a smaller batch"
    kind, colon, rest = text.partition(": ")
    return TensorRTError(rest if colon and kind == error.kind else text)
