"""What tracing takes a shorter way to, against the long way: shapes, views of ids, unions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.graph.dataless import META, Dataless
from edgeprune.graph.structure import reshaped
from edgeprune.graph.unions import Unions

aten = torch.ops.aten
X = torch.zeros(2, 6, 9, 8)
CALLS = [
    (aten.conv2d.default, (X, torch.zeros(4, 6, 3, 3))),
    (aten.conv2d.default, (X, torch.zeros(4, 3, 3, 2), torch.zeros(4), [2, 1], [1, 2], [2, 1], 2)),
    (aten.conv1d.default, (torch.zeros(2, 6, 9), torch.zeros(4, 6, 3), None, [2], [1])),
    (aten.linear.default, (torch.zeros(2, 5, 8), torch.zeros(3, 8), torch.zeros(3))),
    (aten.conv2d.default, (torch.zeros(6, 9, 8), torch.zeros(4, 6, 3, 3))),
    (aten.add.Tensor, (X, torch.zeros(6, 1, 1))),
    (aten.add.Tensor, (torch.zeros(9, 1), torch.zeros(2, 6, 1, 8))),
    (aten.mul.Tensor, (torch.zeros(2, 6, 1, 1), X)),
    (aten.mul.Tensor, (torch.zeros(2, 1, 0), torch.zeros(4, 1))),
    (aten.mul.Tensor, (X, 2)),
    (aten.cat.default, ([X, torch.zeros(2, 1, 9, 8)], 1)),
    (aten.mean.dim, (X, [2, -1], True)),
    (aten.mean.dim, (X, [-1])),
    (aten.adaptive_avg_pool2d.default, (X, [1, 3])),
    (aten.layer_norm.default, (X, [9, 8], torch.zeros(9, 8))),
    (aten.relu.default, (X,)),
]


@pytest.mark.parametrize(("func", "args"), CALLS, ids=lambda part: str(part) if callable(part) else "")
def test_a_result_without_data_looks_like_the_one_with_data(func: object, args: tuple[object, ...]) -> None:
    real = func(*args)  # type: ignore[operator]
    hollow = Dataless(X.device)
    for _ in range(2):  # worked out, or remembered
        found = hollow.call(func, hollow.example(args), {}, from_input=True)
        assert found.device == META
        assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.conv2d.default, (X, torch.zeros(4, 5, 3, 3))),
        (aten.conv2d.default, (torch.zeros(6), torch.zeros(6))),
        (aten.add.Tensor, (X, torch.zeros(5, 1, 1))),
        (aten.mul.Tensor, (X, torch.zeros(0, 1))),
        (aten.linear.default, (X, torch.zeros(3, 7))),
        (aten.batch_norm.default, (X, None, None, torch.zeros(5), torch.ones(5), False, 0.1, 1e-5, False)),
        (aten.layer_norm.default, (X, [9, 7])),
        (aten.cat.default, ([X, torch.zeros(2, 1, 9, 7)], 1)),
    ],
)
def test_sizes_that_do_not_fit_are_refused_without_data_too(func: object, args: tuple[object, ...]) -> None:
    hollow = Dataless(X.device)
    with pytest.raises((RuntimeError, ValueError)):
        hollow.call(func, hollow.example(args), {}, from_input=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_ids_seen_with_another_shape_are_those_of_the_whole_tensor(data: st.DataObject) -> None:
    factors = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))

    def grouped() -> tuple[int, ...]:
        cuts = sorted(data.draw(st.sets(st.integers(1, max(len(factors) - 1, 1)), max_size=3)))
        edges = [0, *(c for c in cuts if c < len(factors)), len(factors)]
        return tuple(int(np.prod(factors[a:b])) for a, b in itertools.pairwise(edges))

    before, after = grouped(), grouped()
    narrow = [n if data.draw(st.booleans()) else 1 for n in before]
    ids = np.arange(int(np.prod(narrow))).reshape(narrow)
    whole = torch.from_numpy(ids).expand(before).reshape(after).numpy()
    assert np.array_equal(np.broadcast_to(reshaped(ids, before, after), after), whole)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_classes_are_those_of_a_union_find_over_single_ids(data: st.DataObject) -> None:
    unions = Unions()
    ranges = [unions.fresh(size) for size in data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))]
    of = list(range(unions.count))
    for _ in range(2):  # before the first look at the classes, and after it
        for _ in range(data.draw(st.integers(0, 4))):
            a, b = (ranges[data.draw(st.integers(0, len(ranges) - 1))] for _ in range(2))
            size = min(len(a), len(b))
            a, b = a[:size] if size < len(a) else a, b[:size] if size < len(b) else b
            b = b[::-1] if data.draw(st.booleans()) else b
            unions.unite(a, b)
            for i, j in zip(a.tolist(), b.tolist(), strict=True):
                of = [of[i] if c == of[j] else c for c in of]
        classes = unions.classes()
        assert all((classes[i] == classes[j]) == (of[i] == of[j]) for i in range(len(of)) for j in range(len(of)))


def test_axes_that_are_turned_round_are_not_taken_for_whole_ranges() -> None:
    unions = Unions()
    ids = unions.fresh(6)
    assert unions.whole(ids.reshape(1, 6, 1)) == 0
    for other in (ids[::-1], ids.reshape(2, 3).T, ids[:5], ids + 0):
        assert unions.whole(other) is None
