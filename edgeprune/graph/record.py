"""Run a network once and write down every operator it calls, as a list of `Op`s over numbered values.

Under `torch.inference_mode` a dispatch mode sees the composite operators (conv2d, linear, batch_norm,
scaled_dot_product_attention ...) before they are decomposed. Composites without a rule of their own are decomposed on
the spot. What depends on the input flows without data, so nothing heavy is computed; a network that reads its data, or
does with it what only data can do, is run once more on the example itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import TraceError
from .copies import without_weights
from .dataless import META, Dataless, NeedsData

Example = Tensor | Sequence[Any] | Mapping[str, Any]

READS_DATA = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose")


@dataclass(frozen=True)
class Ref:
    """Stands for value number `value` in the arguments of an operator."""

    value: int


def refs_in(tree: Any) -> list[Ref]:
    """All references in a tree of arguments, in order."""
    if isinstance(tree, Ref):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [ref for item in tree for ref in refs_in(item)]


@dataclass(frozen=True)
class Value:
    """A tensor seen while recording."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str  # "op", "input", "constant", or "state" for a parameter or buffer
    name: str  # of the parameter or buffer, else ""
    from_input: bool  # depends on the network's input
    constant: Tensor | None  # the data itself, kept for constants and integer buffers only


@dataclass(frozen=True)
class Op:
    """One operator call."""

    func: OpOverload[..., Any]
    args: tuple[Any, ...]  # tensors replaced by Ref
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]  # value numbers, -1 for an output that is no tensor
    module: str  # path of the innermost module that was running
    aliases: bool  # wrote into a view of another tensor

    @cached_property
    def refs(self) -> tuple[Ref, ...]:
        """All tensor operands, in order, those inside lists too."""
        return tuple(refs_in((self.args, self.kwargs)))


@dataclass(frozen=True)
class Call:
    """One call of a submodule: the operators `first <= i < last` ran inside."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any  # tensors replaced by Ref
    first: int
    last: int


@dataclass
class Recording:
    """A network's forward pass as data."""

    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    output: Any = None  # the forward's result, tensors replaced by Ref
    state: dict[str, int] = field(default_factory=dict)  # parameter or buffer name -> value number
    reads: dict[int, str] = field(default_factory=dict)  # op index -> where a scalar was read from data
    training: bool = False


def as_call(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) with which a network is called on `example`: a tensor, a sequence, or keywords."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def record(
    model: nn.Module,
    example: Example,
    has_rule: Callable[[OpOverload[..., Any]], bool],
    training: bool = False,
    owned: bool = False,
) -> Recording:
    """Run `model(example)` once and record it.

    Args:
        model: any module; it is not changed, not even its buffers or its mode.
        example: one input (batch first): a tensor, a tuple of arguments, or a dict of keywords.
        has_rule: operators to keep as they are; composites without a rule are decomposed.
        training: record the training-mode forward (auxiliary heads, drop path).
        owned: the module may be run itself rather than a copy; in evaluation mode already; its hooks are put back.
    Raises:
        TraceError: the forward pass failed; the message holds the error and the line.
    """
    args, kwargs = as_call(example)
    devices = [leaf.device for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    dataless = Dataless(devices[0] if devices else torch.device("cpu"))
    for hollow in (dataless, None):
        runner = model if owned else without_weights(model).train(training)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_fast_paths())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.inference_mode())
            recorder = _Recorder(runner, has_rule, training, hollow)
            stack.callback(recorder.unhook)
            try:
                recorder.run(runner, args, kwargs)
                break
            except Exception as error:
                if hollow is None:
                    raise TraceError(_failed_forward(model, args, kwargs, error, recorder.op_name)) from error
    return recorder.recording


@contextlib.contextmanager
def _no_fast_paths() -> Iterator[None]:
    """Transformer fast paths fuse a whole layer into one operator that nothing could be said about."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _failed_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception, op_name: str
) -> str:
    shapes = [tuple(a.shape) if isinstance(a, Tensor) else repr(a) for a in (*args, *kwargs.values())]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages/torch/" not in f.filename]
    inside = [f for f in frames if f.filename != __file__]
    where = f" at {inside[-1].filename}:{inside[-1].lineno} (`{inside[-1].line}`)" if inside else ""
    return (
        f"{type(model).__name__} failed on an input of shape {', '.join(map(str, shapes))}{where}, last operator "
        f"{op_name or 'none'}: {type(error).__name__}: {error}. Check the input shape; if the forward needs more "
        "than tensors (targets, masks), wrap it in a module that takes tensors only."
    )


class _Recorder(TorchDispatchMode):
    """Numbers tensors as they appear and appends an `Op` for each call."""

    def __init__(
        self,
        model: nn.Module,
        has_rule: Callable[[OpOverload[..., Any]], bool],
        training: bool,
        dataless: Dataless | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording(training=training)
        self._dataless = dataless
        self.op_name: Any = ""
        self._has_rule = has_rule
        self._numbers: Any = WeakIdKeyDictionary()
        self._keep: list[Tensor] = []  # constants stay alive so that their numbers stay theirs
        self._stack: list[tuple[str, int]] = []
        self._open_calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._hooks: list[Any] = []
        self._hook(model)
        named = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in named:
            self._number_state(name, tensor)

    # -- tensors ---------------------------------------------------------------------------------------------

    def run(self, runner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._dataless is not None:
            args, kwargs = self._dataless.example((args, kwargs))
        flat, _ = tree_flatten((args, kwargs))
        self.recording.inputs = tuple(self._new(t, "input") for t in flat if isinstance(t, Tensor))
        with self:
            output = runner(*args, **kwargs)
        self.recording.output = self._refs(_plain(output))

    def _number_state(self, name: str, tensor: Tensor) -> None:
        number = self._numbers.get(tensor)
        if number is None:
            number = self._new(tensor, "state", name)
        self.recording.state[name] = number

    def _new(self, tensor: Tensor, source: str, name: str = "", from_input: bool | None = None) -> int:
        keep = source == "constant" or (source == "state" and not tensor.is_floating_point())
        keep = keep or (source == "op" and not from_input and not tensor.is_floating_point())
        if keep and self._dataless is not None and tensor.device == META:
            raise NeedsData("a constant has no data")
        value = Value(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            source=source,
            name=name,
            from_input=source == "input" if from_input is None else from_input,
            constant=tensor.detach() if keep else None,
        )
        self.recording.values.append(value)
        self._numbers[tensor] = len(self.recording.values) - 1
        return len(self.recording.values) - 1

    def _number(self, tensor: Tensor) -> int:
        number = self._numbers.get(tensor)
        if number is None:
            self._keep.append(tensor)
            number = self._new(tensor, "constant")
        return int(number)

    def _refs(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return Ref(self._number(tree))
        if type(tree) in (tuple, list):
            return type(tree)([self._refs(item) for item in tree])
        if type(tree) is dict:
            return {key: self._refs(item) for key, item in tree.items()}
        if isinstance(tree, (int, float, str, type(None))):
            return tree
        if tree == META and self._dataless is not None:  # what is written down is the call with data
            return self._dataless.device
        return tree_map(lambda leaf: Ref(self._number(leaf)) if isinstance(leaf, Tensor) else leaf, tree)

    # -- modules ---------------------------------------------------------------------------------------------

    def _hook(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self._hooks.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stack.append((path, len(self.recording.ops)))
            self._open_calls.append((self._refs(args), self._refs(kwargs)))

        return hook

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path, first = self._stack.pop()
        call_args, call_kwargs = self._open_calls.pop()
        ops = self.recording.ops
        self.recording.calls.append(Call(path, call_args, call_kwargs, self._refs(_plain(output)), first, len(ops)))

    # -- operators -------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.op_name = func
        if not self._has_rule(func) and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        call_args, call_kwargs = self._refs(args), self._refs(kwargs)
        from_input = any(self.recording.values[ref.value].from_input for ref in refs_in((call_args, call_kwargs)))
        if func._schema.name in READS_DATA and from_input:
            self.recording.reads[len(self.recording.ops)] = _users_line()
        aliases = _writes_to_view(func, args)
        if self._dataless is None:
            result = func(*args, **kwargs)
        else:
            result = self._dataless.call(func, args, kwargs, from_input)
        leaves = [result] if isinstance(result, Tensor) else tree_flatten(result)[0]
        outputs = tuple(
            self._new(leaf, "op", from_input=from_input) if isinstance(leaf, Tensor) else -1 for leaf in leaves
        )
        module = self._stack[-1][0] if self._stack else ""
        self.recording.ops.append(Op(func, call_args, call_kwargs, outputs, module, aliases))
        return result


def _writes_to_view(func: Any, args: tuple[Any, ...]) -> bool:
    if not func._schema.is_mutable or not args or not isinstance(args[0], Tensor):
        return False
    target = args[0]
    return bool(target._is_view()) or target.untyped_storage().nbytes() > target.numel() * target.element_size()


def _users_line() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else "an unknown line"


def _plain(output: Any) -> Any:
    """Outputs as plain tuples, lists and dicts, so that tensors inside dataclasses are found."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {f.name: _plain(getattr(output, f.name)) for f in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        return {k: _plain(v) for k, v in output.items()}
    return output
