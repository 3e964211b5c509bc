"""The whole job as one call, for people who have their own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import budgets, metrics, pipeline, runs, search, store, target
from .asked import Asked
from .config import CompressSection, MagnitudeSection, ProfileSection, SearchSection, SoftSection
from .errors import RunError, UsageError
from .finetune import Images
from .graph import Example
from .metrics import Metric
from .pipeline import Outcome
from .records import Budget
from .runs import Run
from .target import Target
from .task import Callables
from .watch import Watch


def compress(
    model: nn.Module,
    example: Example,
    target: str | Target = "cpu",
    latency_ms: float | None = None,
    speedup: float | None = None,
    train: Callable[[nn.Module], object] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    targets: Mapping[str, Mapping[str, Any]] | None = None,
    search_images: Images | None = None,
    final_images: Images | None = None,
    measures: Mapping[str, Metric] | None = None,
    watch: Watch | None = None,
    search_settings: Mapping[str, Any] | None = None,
    magnitude_settings: Mapping[str, Any] | None = None,
    soft_settings: Mapping[str, Any] | None = None,
    profile_settings: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Outcome:
    """Prune `model` to a latency measured on `target`, with your own training loop.

    Args:
        model: a trained network; it is not changed.
        example: one input, batch first: a tensor, a tuple of arguments, or a dict of keywords.
        target: "cpu", a name in `targets`, or an open target.
        latency_ms, speedup: the budget, one of them.
        train: trains a network in place; called after each step's cut.
        evaluate: judges a network (0..1, larger is better), on data that may guide choices.
        batches: returns some (inputs, labels), to re-estimate batch norm on.
        run: a folder for the run's files; default: the next one in runs/.
        resume: go on in that folder.
        targets: [target.*] sections by name, as in edgeprune.toml.
        search_settings: the keys of [search], for strategies that try candidates.
        magnitude_settings, soft_settings: the keys of [magnitude] and [soft], for the strategies of those names.
        profile_settings: the keys of [profile], for what the latency table lacks.
        search_images: labelled images for the floors' metrics while choices are made.
        final_images: labelled images nobody has looked at, for accuracy and the floors in the end.
        measures: metrics of your own by name, that `floors` may name: of (outputs, labels, inputs), arrays.
        settings: the other keys of [compress]: steps, importance, strategy, protected, min_width ...
    Raises:
        UnreachableBudget: before any training, with the fastest this device can be.
    """
    section = CompressSection.model_validate(settings)
    searching = SearchSection.model_validate(search_settings or {})
    weights = MagnitudeSection.model_validate(magnitude_settings or {})
    shares = SoftSection.model_validate(soft_settings or {})
    profiled = ProfileSection.model_validate(profile_settings or {})
    known = {n: (measures or {}).get(n) or metrics.resolve(n, Path.cwd()) for n in section.floors}
    with ExitStack() as stack:
        opened = target if not isinstance(target, str) else _open(target, targets or {})
        if isinstance(target, str):
            stack.callback(opened.close)
        folder = Path(run) if run is not None else stack.enter_context(new_run(Path("runs")))
        return pipeline.compress(
            model,
            example,
            opened,
            Callables(train, evaluate, batches, search_images, final_images, known),
            asked(section, one_budget(latency_ms, speedup, section.size_mb), searching, weights, shares),
            Run(folder),
            store.Store(store.default_path()),
            watch,
            resume,
            interval=profiled.interval,
        )


def load(run: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a finished run's pruned network from the original class; `model`'s own weights do not matter.

    Raises:
        RunError: the run is not finished, damaged, or was made from another network.
    """
    return runs.load_model(Run(Path(run)), model)


def asked(
    section: CompressSection, budget: Budget, searching: SearchSection, weights: MagnitudeSection, shares: SoftSection
) -> Asked:
    """What [compress] and the strategy's own section ask for, with one of the budgets."""
    return Asked(
        budget=budget,
        strategy=section.strategy,
        importance=section.importance,
        steps=section.steps,
        protected=section.protected,
        min_width=section.min_width,
        drop_blocks=section.drop_blocks,
        accuracy_floor=section.accuracy_floor,
        floors=section.floors,
        back_off=section.back_off,
        seed=section.seed,
        search=searching if section.strategy in search.NAMES else None,
        magnitude=weights if section.strategy == "magnitude" else None,
        soft=shares if section.strategy == "soft" else None,
    )


def one_budget(latency_ms: float | None, speedup: float | None, size_mb: float | None = None) -> Budget:
    """Raises BudgetError unless exactly one was given and it makes sense."""
    return budgets.requested("target", latency_ms, speedup, size_mb).levels[0][0]


@contextmanager
def new_run(folder: Path) -> Iterator[Path]:
    """The first unused numbered folder, runs/001, runs/002 ..., made: no other process can take it too.

    When nothing was written into it, it is gone in the end. Raises RunError when it cannot be made.
    """
    while True:
        number = 1 + max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)
        made = folder / f"{number:03d}"
        try:
            made.mkdir(parents=True)
            break
        except FileExistsError:
            continue  # another process was faster
        except OSError as error:
            raise RunError(f"{made} cannot be made: {error.strerror}; check where you are, and its disk") from error
    try:
        yield made
    finally:
        with suppress(OSError):  # only empty folders can be removed
            made.rmdir()
            folder.rmdir()


def last_run(folder: Path) -> Path:
    """The highest numbered folder.

    Raises:
        UsageError: there is none.
    """
    found = [p for p in folder.glob("*") if p.name.isdigit()]
    if not found:
        raise UsageError(f"there is no run in {folder}; `edgeprune compress` makes one, or name one with --run")
    return max(found, key=lambda p: int(p.name))


def _open(name: str, sections: Mapping[str, Mapping[str, Any]]) -> Target:
    return target.open_target(name, sections)
