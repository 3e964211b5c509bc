"""Prune a PyTorch network to a latency that is measured on your own device, verified there, installed, reversible.

    import edgeprune

    outcome = edgeprune.compress(model, example, target="cpu", latency_ms=8.0, train=train, evaluate=evaluate)
    smaller = edgeprune.load("runs/001", model)

Every stage is a module of its own: `graph.trace`, `importance.score`, `measure.fill`, `knapsack.solve`,
`surgery.cut`, `finetune.train`, `verify.check`, `deploy.install`. Importing this package loads neither torch nor a
runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import compress, load

__version__ = "0.1.0"
__all__ = ["__version__", "compress", "load"]


def __getattr__(name: str) -> Any:
    if name in ("compress", "load"):
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
