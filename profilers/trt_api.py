"""One way to use TensorRT 8.5 to 11 and TensorRT for RTX: what a release has is looked up, no numbers are compared.

The precision of a network is in its ONNX file (16-bit weights and casts; QuantizeLinear and DequantizeLinear). Where a
release types strongly, that is all; the flags of precision are set only where types are weak. Tensors go by name:
bindings by number are gone from 10 on.

A Runtime made without a driver ends the process (11.4) or the next call does (8.6): ask `cuda_driver` first.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
SAID = 30  # messages kept
WORST = ("INTERNAL_ERROR", "ERROR")
MEMORY = ("out of memory", "outofmemory", "insufficient memory", "cannot allocate")
PRECISIONS = {"f32": "", "f16": "FP16", "int8": "INT8"}  # and the flag of networks that are weakly typed


class BuildError(RuntimeError):
    """TensorRT does not make or load an engine; the message has its own words."""


@dataclass(frozen=True)
class Wish:
    """How to build: what an engine depends on besides the network."""

    precision: str  # f32, f16, int8
    tf32: bool  # 32-bit layers may compute with 10-bit mantissas
    dla: int  # the core of the deep learning accelerator; -1: the GPU
    external_tactics: bool  # kernels of cuBLAS and cuDNN may be used
    workspace_mib: int


@dataclass(frozen=True)
class Features:
    """What a release has."""

    builds: bool  # it has a builder and a parser, not only a runtime
    weak_types: bool  # precision by flags
    strong_types: bool  # precision in the network, when asked
    explicit_batch: bool  # has to be asked for
    named_tensors: bool
    aux_streams: bool
    timing_cache: bool
    dla: bool
    inspector: bool
    calibrators: bool  # of int8, which are not used here


class Api:
    """A TensorRT module.

    Args:
        module: of one of the names in MODULES.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.name = str(module.__name__).replace("_bindings", "").replace("_", "-")
        self.version = str(module.__version__)
        self.log = _logger(module)
        self.features = features(module)
        self._runtime: Any = None

    def network_flags(self) -> int:
        """Of `create_network`: as strongly typed as can be had, and the explicit batch where it is not the only one."""
        kinds = getattr(self.module, "NetworkDefinitionCreationFlag", None)
        flags = 0
        if self.features.explicit_batch and self.features.weak_types and not self.features.strong_types:
            flags |= 1 << int(kinds.EXPLICIT_BATCH)  # type: ignore[union-attr]
        if self.features.strong_types:
            flags |= 1 << int(kinds.STRONGLY_TYPED)  # type: ignore[union-attr]
        return flags

    def build(self, content: bytes, wish: Wish, cache: str = "") -> bytes:
        """A network as an engine for this GPU.

        Args:
            content: of an ONNX file.
            wish: how.
            cache: the file of measured kernels that builds share; "" for none.
        Raises:
            BuildError: the network is refused, there is no builder without a GPU, or nothing comes of it.
        """
        if not self.features.builds:
            raise BuildError(
                "%s %s is a runtime alone and builds no engines; install the whole of TensorRT" % self._named
            )
        self.log.lines.clear()
        builder = self._made("Builder")
        network = builder.create_network(self.network_flags())
        parser = self.module.OnnxParser(network, self.log)
        if not parser.parse(content):
            errors = [_words(parser.get_error(at)) for at in range(parser.num_errors)]
            raise BuildError("%s %s refuses the network: %s" % (*self._named, "; ".join(errors) or self.log.said()))
        config = self._configured(builder, network, wish)
        kept = self._timing_cache(config, cache)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._failed("builds no engine")
        if kept is not None:
            measured = config.get_timing_cache().serialize()
            if measured is not None:  # some releases keep none
                _write(cache, bytes(measured))
        return bytes(plan)

    def loaded(self, plan: bytes) -> Any:
        """An engine on the GPU; raises BuildError when it was built for another GPU or release, or is damaged."""
        self.log.lines.clear()
        self._runtime = self._runtime or self._made("Runtime")  # engines need it for as long as they live
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._failed("cannot load an engine, which was built for another GPU or release, or is damaged")
        return engine

    def description(self, engine: Any, context: Any) -> str:
        """The inspector's JSON; "" where there is no inspector."""
        if not self.features.inspector:
            return ""
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        return str(inspector.get_engine_information(self.module.LayerInformationFormat.JSON))

    def profiler(self) -> Any:
        """An object that notes (layer, ms) in `rows` when a context reports to it."""

        class Profiler(self.module.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.rows: list[tuple[str, float]] = []

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.rows.append((layer_name, ms))

        return Profiler()

    @property
    def _named(self) -> tuple[str, str]:
        return self.name, self.version

    def _made(self, kind: str) -> Any:
        """A Builder or a Runtime; without a GPU they are None, or a TypeError."""
        try:
            made = getattr(self.module, kind)(self.log)
        except TypeError as error:
            raise self._failed("gives no %s" % kind) from error
        if made is None:
            raise self._failed("gives no %s" % kind)
        return made

    def _failed(self, problem: str) -> BuildError:
        said = self.log.said()
        if any(word in said.lower() for word in MEMORY):
            problem = "runs out of memory: end other programs, or choose a smaller batch or workspace. It"
            return BuildError("%s %s %s says: %s" % (*self._named, problem, said))
        return BuildError("%s %s %s: %s" % (*self._named, problem, said or "it does not say why; is there a GPU?"))

    def _configured(self, builder: Any, network: Any, wish: Wish) -> Any:
        trt, config = self.module, builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, wish.workspace_mib << 20)
        if not wish.tf32 and hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        flag = PRECISIONS[wish.precision]
        if flag and not self.features.strong_types and hasattr(trt.BuilderFlag, flag):
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if self.features.aux_streams:
            config.max_aux_streams = 0  # layers on several streams overlap, and their times add up to no total
        if not wish.external_tactics:
            own = [s for n, s in trt.TacticSource.__members__.items() if not n.startswith(("CUBLAS", "CUDNN"))]
            config.set_tactic_sources(sum(1 << int(source) for source in own))
        if wish.dla >= 0:
            self._on_dla(builder, config, wish.dla)
        for at in range(network.num_inputs):
            if -1 in tuple(network.get_input(at).shape):
                raise BuildError("the network's input %s has no fixed shape" % network.get_input(at).name)
        return config

    def _on_dla(self, builder: Any, config: Any, core: int) -> None:
        """Some releases take any core in silence; the number of cores tells."""
        cores = int(getattr(builder, "num_DLA_cores", 0))
        if core >= cores:
            raise BuildError(
                "DLA core %d was asked for, and %s %s finds %s here; leave `dla` out"
                % (core, *self._named, cores or "none")
            )
        config.default_device_type = self.module.DeviceType.DLA
        config.DLA_core = core
        config.set_flag(self.module.BuilderFlag.GPU_FALLBACK)

    def _timing_cache(self, config: Any, path: str) -> Any:
        if not path or not self.features.timing_cache:
            return None
        for content in filter(None, (_read(path), b"\0")):  # what another release wrote is refused; then an empty one
            try:
                cache = config.create_timing_cache(content if content != b"\0" else b"")
            except (RuntimeError, TypeError):
                continue
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
        return None


def features(module: Any) -> Features:
    """What a module has, by its names alone: nothing is called."""

    def has(kind: str, name: str) -> bool:
        return hasattr(getattr(module, kind, None), name)

    return Features(
        builds=hasattr(module, "Builder") and hasattr(module, "OnnxParser"),
        weak_types=has("BuilderFlag", "FP16"),
        strong_types=has("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        explicit_batch=has("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
        named_tensors=has("IExecutionContext", "set_tensor_address") and has("IExecutionContext", "execute_async_v3"),
        aux_streams=has("IBuilderConfig", "max_aux_streams"),
        timing_cache=has("IBuilderConfig", "create_timing_cache"),
        dla=has("Builder", "num_DLA_cores"),
        inspector=has("ICudaEngine", "create_engine_inspector"),
        calibrators=hasattr(module, "IInt8EntropyCalibrator2"),
    )


def imported(names: tuple[str, ...] = MODULES) -> Any:
    """The first TensorRT module that is installed; raises ImportError that says what is wrong with each."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)  # libraries that it only names need not be whole
    problems = []
    try:
        for name in names:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    problems.append("%s needs %s" % (name, error.name))
            except (ImportError, OSError, RuntimeError) as error:
                problems.append("%s: %s" % (name, error))
    finally:
        sys.setdlopenflags(flags)
    raise ImportError("; ".join(problems) or "TensorRT's Python module is not installed", name="tensorrt")


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what is said; errors go to standard error too."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            kind = str(severity).rpartition(".")[2]
            if kind not in ("INFO", "VERBOSE"):
                self.lines = [*self.lines[-SAID:], (kind, message)]
                print("TensorRT %s: %s" % (kind, message), file=sys.stderr, flush=True)

        def said(self) -> str:
            """The errors, or for want of them the warnings."""
            errors = [text for kind, text in self.lines if kind in WORST]
            return " | ".join((errors or [text for _, text in self.lines])[-3:])

    return Log()


def _words(error: Any) -> str:
    """An error of the parser: the node, and what is wrong with it."""
    text = str(error.desc()) if hasattr(error, "desc") else str(error)
    name = str(error.node_name()) if hasattr(error, "node_name") else ""
    return "%s: %s" % (name, text) if name and name not in text else text


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return b""


def _write(path: str, content: bytes) -> None:
    beside = "%s.%d" % (path, os.getpid())
    with open(beside, "wb") as stream:
        stream.write(content)
    os.replace(beside, path)
