"""A project file made real: its model, data, target and training, opened when a command needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config
from .config import Config
from .errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from .data import Data
    from .finetune import Settings
    from .target import Target
    from .task import Classification


@dataclass(frozen=True)
class Project:
    """Opened with `read`; each part is made on first use."""

    path: Path
    config: Config

    @property
    def folder(self) -> Path:
        return self.path.parent

    @cached_property
    def model(self) -> nn.Module:
        from . import model

        return model.load(self.config.model, self.folder)

    @cached_property
    def example(self) -> Tensor:
        from . import model

        return model.example_of(self.config.model)

    @cached_property
    def data(self) -> Data:
        """Images and labels; raises ConfigError when the project has none."""
        from . import data

        if self.config.data is None:
            raise ConfigError(f"{self.path} has no [data]: fine-tuning and accuracy need images and labels")
        loaded = data.load(self.config.data, self.folder, self.config.model.input)
        data.check_labels(loaded, self._outputs())
        return loaded

    def _outputs(self) -> int:
        import torch

        model, example = self.model, self.example  # made here: what inference mode makes can never be differentiated
        with torch.inference_mode():
            out = model(example)
        if not isinstance(out, torch.Tensor) or out.dim() != 2:
            raise ConfigError(
                f"{self.config.model.source} returns no (batch, classes) scores: only classifiers are trained here. "
                "Use edgeprune.compress in Python with your own train and evaluate."
            )
        return int(out.shape[1])

    def task(self) -> Classification:
        from . import metrics
        from .task import Classification

        tuned = self.config.finetune
        return Classification(
            self.data.train,
            self.data.search,
            self.data.final,
            self.settings(),
            tuned.epochs,
            tuned.step_epochs,
            {name: metrics.resolve(name, self.folder) for name in self.config.compress.floors},
        )

    def settings(self) -> Settings:
        from .finetune import Settings

        tuned = self.config.finetune.model_dump(exclude={"epochs", "step_epochs"})
        return Settings(**tuned, seed=self.config.compress.seed)

    def calibration(self, target: Target) -> list[NDArray[Any]]:
        """Some training images, where exports for this target need them and the project has data."""
        from .target import calibrated

        return self.task().calibration() if calibrated(target) and self.config.data is not None else []

    def sections(self) -> dict[str, dict[str, Any]]:
        """The [target.*] sections as plain dicts."""
        return {name: section.model_dump() for name, section in self.config.target.items()}

    def open_target(self, name: str | None = None) -> Target:
        """Open a target by name; the first of the project's without one."""
        from . import budgets, target

        return target.open_target(name or budgets.names(self.config.compress.target)[0], self.sections())


def read(path: Path, overrides: Sequence[str] = ()) -> Project:
    """Read a project file; raises ConfigError that names the offending key."""
    from . import target

    checked = config.read(path, overrides)
    for name, section in checked.target.items():
        target.check_options(name, section.model_dump())
    return Project(path, checked)
