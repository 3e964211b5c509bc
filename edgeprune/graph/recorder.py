"""The dispatch mode that sees each operator of a running network, and writes it down."""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .copies import Parts
from .dataless import META, Dataless, NeedsData
from .recording import Call, Op, Recording, Ref, Value

READS_DATA = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose")
PLAIN = frozenset([int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format])


@dataclass(frozen=True)
class _Kind:
    """What to know of an operator."""

    decomposes: bool  # a composite that has no rule of its own
    mutable: bool
    reads_data: bool


class Recorder(TorchDispatchMode):
    """Numbers tensors as they appear and appends an `Op` for each call. It leaves its marks on the network it runs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would wrap the dispatch in what takes as long as the rest of it

    def __init__(
        self,
        found: Parts,
        has_rule: Callable[[OpOverload[..., Any]], bool],
        training: bool,
        dataless: Dataless | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording(training=training, with_data=dataless is None)
        self.op_name: Any = ""
        self._dataless = dataless
        self._kind = functools.cache(lambda func: _kind_of(func, has_rule))
        self._refs_of: dict[int, Ref] = {}  # by the tensor's id()
        self._keep: list[Tensor] = []  # every tensor stays alive, so that its id stays its own
        self._path = ""
        self.recording.parameters = tuple(found.parameters)
        for path, module in found.modules.items():
            self._wrap(path, module)
        for name, tensor in found.state.items():
            self.recording.state[name] = self._new(tensor, "state", name).value

    def run(self, runner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._dataless is not None:
            args, kwargs = self._dataless.example((args, kwargs))
        flat, _ = tree_flatten((args, kwargs))
        made = [self._new(leaf, "input", from_input=True) for leaf in flat if isinstance(leaf, Tensor)]
        self.recording.inputs = tuple(ref.value for ref in made)
        with self:
            output = runner(*args, **kwargs)
        self.recording.output = self._refs(_plain(output), [])

    # -- tensors ---------------------------------------------------------------------------------------------

    def _new(self, tensor: Tensor, source: str, name: str = "", from_input: bool = False) -> Ref:
        dtype = tensor.dtype
        keep = not from_input and (source == "constant" or (source != "input" and not dtype.is_floating_point))
        if keep and self._dataless is not None and tensor.device == META:
            raise NeedsData("a constant has no data")
        constant = tensor.detach() if keep else None
        return self._number(tensor, Value(tuple(tensor.shape), dtype, source, name, from_input, constant))

    def _number(self, tensor: Tensor, value: Value) -> Ref:
        values = self.recording.values
        ref = self._refs_of[id(tensor)] = Ref(len(values))
        values.append(value)
        self._keep.append(tensor)
        return ref

    def _made(self, tensor: Any, from_input: bool) -> int:
        """The number of an operator's result; -1 for one that is no tensor."""
        if not isinstance(tensor, Tensor):
            return -1
        if not from_input:
            return self._new(tensor, "op").value
        return self._number(tensor, Value(tuple(tensor.shape), tensor.dtype, "op", "", True, None)).value

    def _refs(self, tree: Any, found: list[Ref]) -> Any:
        """The tree with its tensors replaced by references, which are appended to `found` in order."""
        kind = type(tree)
        if kind in PLAIN:
            return tree
        if kind is tuple or kind is list:
            made = [item if type(item) in PLAIN else self._refs(item, found) for item in tree]
            return made if kind is list else tuple(made)
        ref = self._refs_of.get(id(tree))
        if ref is None and isinstance(tree, Tensor):
            ref = self._new(tree, "constant")
        if ref is not None:
            found.append(ref)
            return ref
        if kind is dict:
            return {key: self._refs(item, found) for key, item in tree.items()}
        if isinstance(tree, (int, float, str)):
            return tree
        if tree == META and self._dataless is not None:  # what is written down is the call with data
            return self._dataless.device
        return tree_map(lambda leaf: self._refs(leaf, found) if isinstance(leaf, Tensor) else leaf, tree)

    # -- modules ---------------------------------------------------------------------------------------------

    def _wrap(self, path: str, module: nn.Module) -> None:
        """Note the calls of a module: around its forward, and around its hooks, where it has any."""
        if isinstance(module, torch.jit.ScriptModule):
            return
        if module._forward_hooks or module._forward_pre_hooks:
            self._hook(path, module)
        else:
            self._replace_forward(path, module)

    def _replace_forward(self, path: str, module: nn.Module) -> None:
        forward, ops, refs_of = module.forward, self.recording.ops, self._refs_of

        def recorded(*args: Any, **kwargs: Any) -> Any:
            outer, first = self._path, len(ops)
            self._path = path
            one = refs_of.get(id(args[0])) if len(args) == 1 else None  # mostly a single tensor
            given = self._refs(args, []) if one is None else (one,)
            named = self._refs(kwargs, []) if kwargs else {}
            try:
                output = forward(*args, **kwargs)
            finally:
                self._path = outer
            self._called(path, given, named, output, first)
            return output

        vars(module)["forward"] = recorded

    def _hook(self, path: str, module: nn.Module) -> None:
        running: list[tuple[str, int, Any, Any]] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append((self._path, len(self.recording.ops), self._refs(args, []), self._refs(kwargs, [])))
            self._path = path

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._path, first, given, named = running.pop()
            self._called(path, given, named, output, first)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True)

    def _called(self, path: str, args: Any, kwargs: Any, output: Any, first: int) -> None:
        returned = self._refs_of.get(id(output)) or self._refs(_plain(output), [])
        self.recording.calls.append(Call(path, args, kwargs, returned, first, len(self.recording.ops)))

    # -- operators -------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.op_name = func
        kind = self._kind(func)
        if kind.decomposes:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        recording = self.recording
        refs: list[Ref] = []
        call_args, call_kwargs = self._refs(args, refs), self._refs(kwargs, refs) if kwargs else {}
        values = recording.values
        from_input = True in [values[ref.value].from_input for ref in refs]
        if kind.reads_data and from_input:
            recording.reads[len(recording.ops)] = _users_line()
        aliases = kind.mutable and _writes_to_view(args)
        if self._dataless is None:
            result = func(*args, **kwargs)
        else:
            result = self._dataless.call(func, args, kwargs, from_input)
        leaves = [result] if isinstance(result, Tensor) else tree_flatten(result)[0]
        outputs = tuple([self._made(leaf, from_input) for leaf in leaves])
        recording.ops.append(Op(func, call_args, call_kwargs, tuple(refs), outputs, self._path, aliases))
        return result


def _kind_of(func: OpOverload[..., Any], has_rule: Callable[[OpOverload[..., Any]], bool]) -> _Kind:
    return _Kind(
        decomposes=not has_rule(func) and bool(func._can_decompose()),
        mutable=bool(func._schema.is_mutable),
        reads_data=func._schema.name in READS_DATA,
    )


def _writes_to_view(args: tuple[Any, ...]) -> bool:
    if not args or not isinstance(args[0], Tensor):
        return False
    target = args[0]
    return bool(target._is_view()) or target.untyped_storage().nbytes() > target.numel() * target.element_size()


def _users_line() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else "an unknown line"


def _plain(output: Any) -> Any:
    """Outputs as plain tuples, lists and dicts, so that tensors inside dataclasses are found."""
    if isinstance(output, Tensor):
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {f.name: _plain(getattr(output, f.name)) for f in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        return {k: _plain(v) for k, v in output.items()}
    return output
