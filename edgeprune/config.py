"""edgeprune.toml: what is pruned, with which data, for which devices, to which budget.

Every key can be overridden on the command line (`--set compress.steps=5`); a key or value that does not exist is
refused with the ones that do.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from . import budgets
from .errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

FILE = "edgeprune.toml"
INTERVAL = 0.01  # of a latency table's entries, see [profile]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """[model]: where the network comes from."""

    source: str = Field(
        description="file.py:function, package.module:function, torchvision:NAME or timm:NAME", min_length=1
    )
    weights: Path | None = Field(None, description="a .safetensors file, or a .pt/.pth state dict")
    input: tuple[PositiveInt, ...] = Field((1, 3, 224, 224), description="one input, batch first")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the source")
    low_rank: tuple[str, ...] = Field(
        (), description="module paths whose layers become products, the ranks to be chosen like widths"
    )


class DataSection(Section):
    """[data]: images and labels. Without it, a network can be profiled, but not fine-tuned or verified."""

    source: str = Field(
        description="folder:DIR (a folder per class), npz:FILE (x, y), file.py:function, or digits", min_length=1
    )
    test: str | None = Field(
        None, description="a second folder:DIR or npz:FILE: halved into search and final; else both come from source"
    )
    split: tuple[float, float, float] = Field((0.7, 0.15, 0.15), description="train, search, final shares of source")
    final_images: PositiveInt | None = Field(
        None, description="look at so many of the final images at most, drawn at random: for slow boards"
    )
    seed: int = Field(0, description="of the split")
    resize: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="(height, width), the middle of which is used; default: the input's, or none for arrays"
    )
    mean: tuple[float, ...] | None = Field(None, description="per channel, of pixels in 0..1; default: from train")
    std: tuple[PositiveFloat, ...] | None = Field(None, description="per channel; default: from train")
    crop: int = Field(0, ge=0, description="augmentation: pad by this many pixels, then crop at random")
    flip: bool = Field(False, description="augmentation: mirror left and right at random")

    @model_validator(mode="after")
    def _shares(self) -> DataSection:
        if min(self.split) <= 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError("split: three positive shares that add up to 1 are needed, for train, search and final")
        return self


class TargetSection(BaseModel):
    """[target.NAME]: a device. Keys besides `kind` belong to that kind."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str = Field(description="a file in targets/")


def _numbers(value: Any) -> budgets.Numbers:
    if isinstance(value, str):
        return budgets.parse(value)
    numbers = (
        list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    )
    if not numbers or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise ValueError("write one number (8), several ([8, 6, 4]), or one for each target ({ cpu = 8, pi = 20 })")
    if isinstance(value, Mapping):
        return {str(name): float(n) for name, n in value.items()}
    return tuple(map(float, numbers)) if isinstance(value, list | tuple) else float(value)


Numbers = Annotated[budgets.Numbers, PlainValidator(_numbers)]


class ProfileSection(Section):
    """[profile]: how sure a latency table is, whichever command measures it."""

    interval: Annotated[float, Field(gt=0, lt=1)] = Field(
        INTERVAL,
        description="a layer is measured until the 95 % interval of its median is this narrow, relative to it; what is "
        "on disk already stays as it is",
    )


class CompressSection(Section):
    """[compress]: the budget and how it is reached."""

    target: str = Field("cpu", description="a [target.NAME], or cpu; several with commas between")
    latency_ms: Numbers | None = Field(
        None, description="budget: median latency of one input; several, or one for each target"
    )
    speedup: Numbers | None = Field(
        None, description="budget: dense latency divided by this; several, or one for each target"
    )
    size_mb: PositiveFloat | None = Field(None, description="budget: of the exported file, beside the latency")
    strategy: Literal["knapsack", "uniform", "random", "rl", "genetic", "random-search", "magnitude", "soft"] = Field(
        "knapsack", description="how widths are chosen"
    )
    importance: Literal["sp-lamp", "sp-lamp-log", "l1", "l2", "taylor", "random"] = Field(
        "sp-lamp", description="how channels are scored"
    )
    steps: PositiveInt = Field(3, description="prune in this many steps of a geometric budget schedule")
    protected: tuple[str, ...] = Field((), description="module paths whose channels stay")
    min_width: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="no group is cut below this share of its channels"
    )
    drop_blocks: bool = Field(False, description="residual blocks may be dropped whole")
    accuracy_floor: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="fail when accuracy on the final split is below"
    )
    floors: dict[str, float] = Field(
        default_factory=dict,
        description="fail when one of these metrics is below, on the final split and the target's own runtime: "
        'accuracy, recall_of_class_N, psnr, "file.py:function"',
    )
    back_off: int = Field(
        0, ge=0, description="when a floor is broken after training, try a larger latency budget up to so many times"
    )
    seed: int = 0


class FinetuneSection(Section):
    """[finetune]: after each step, and at the end."""

    epochs: int = Field(10, ge=0, description="epochs at the end")
    step_epochs: int = Field(1, ge=0, description="epochs after each earlier step")
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: float = Field(5e-4, ge=0)
    distillation: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7, description="share of the loss that follows the dense network"
    )
    temperature: PositiveFloat = 4.0
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field("auto", description="auto: the faster one")
    bn_images: int = Field(1024, ge=0, description="training images for re-estimating batch norm after a cut")
    devices: PositiveInt = Field(
        1, description="GPUs that train together, or processes where there is none; each takes a part of every batch"
    )


class Workers(Section):
    """Who judges cut networks. What is found does not depend on it, so it is no part of what a run was asked for."""

    workers: PositiveInt = Field(1, exclude=True, description="processes; more than one, or --ray, needs Ray")
    ray: str = Field("", exclude=True, description="address of a Ray cluster; auto: the one on this machine")


class MagnitudeSection(Workers):
    """[magnitude]: single weights are pruned and the rest retrained; what each group has left shapes its width."""

    ratio: Annotated[float, Field(gt=1)] = Field(4.0, description="weights before over weights after")
    rounds: PositiveInt = Field(1, description="of pruning and retraining, finetune.step_epochs each")
    l1: float = Field(0.0, ge=0, description="weight of the absolute weights in the retraining's loss")
    images: PositiveInt = Field(1000, description="of the search split, by which the sensitivity scan judges")


class SoftSection(Section):
    """[soft]: shares of the groups by gradient, to the latency that the table predicts, floors observed."""

    components: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="name -> module paths; the other outermost modules are one each"
    )
    isolate: bool = Field(False, description="groups that cross between components stay whole")
    steps: PositiveInt = Field(300, description="of the gradient, a batch each")
    rate: PositiveFloat = Field(0.1, description="of Adam, on the shares' logits")
    tolerance: PositiveFloat = Field(0.02, description="of the latency, while the shares are soft")
    images: PositiveInt = Field(1000, description="of the search split, by which cut networks are judged")


class RLSection(Section):
    """[search.rl]: RL-Pruner. A distribution over groups says where channels go; it moves towards what did best."""

    rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="how far the distribution moves towards the best sample; 0 is random search"
    )
    noise: float = Field(0.04, ge=0, description="of samples around the distribution, whose entries add up to 1")
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="an entry changes by this factor at most")
    samples: PositiveInt = Field(10, description="drawn before each move, and remembered")
    lookahead: PositiveInt = Field(1, description="steps of the budget schedule that a sample is judged by")
    discount: Annotated[float, Field(ge=0, le=1)] = Field(0.9, description="weight of each further step of lookahead")
    epsilon: Annotated[float, Field(ge=0, le=1)] = Field(
        0.4, description="chance to move towards any remembered sample; falls to 0 over the first tenth of the search"
    )


class GeneticSection(Section):
    """[search.genetic]: GeneCAI. Widths evolve; what none beats in both accuracy and latency is the Pareto front."""

    mode: Literal["nsga2", "score"] = Field(
        "nsga2", description="nsga2: non-dominated sorting; score: GeneCAI's own scalar score"
    )
    population: PositiveInt | None = Field(None, description="default: a twentieth of the evaluations, 4 to 50")
    directed: bool = Field(True, description="begin with networks that each layer alone could bear")
    tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.01, description="accuracy that cutting one layer alone may cost, for the directed beginning"
    )
    threshold: Annotated[float, Field(ge=0, le=1)] = Field(0.6, description="of the score: accuracy below is punished")
    pressure: float = Field(100.0, ge=0, description="of the score: weight of what latency is saved")


class SearchSection(Workers):
    """[search]: for strategies that try candidates: rl, genetic, random-search."""

    evaluations: PositiveInt = Field(300, description="different networks that are cut and judged, over all steps")
    images: PositiveInt = Field(1000, description="of the search split, that each is judged on")
    by: Literal["loss", "accuracy"] = Field("loss", description="which of two candidates is the better one")
    rl: RLSection = Field(default_factory=RLSection)  # type: ignore[arg-type]
    genetic: GeneticSection = Field(default_factory=GeneticSection)  # type: ignore[arg-type]


class Config(Section):
    """The whole file."""

    model: ModelSection
    data: DataSection | None = None
    target: dict[str, TargetSection] = Field(default_factory=dict)
    profile: ProfileSection = Field(default_factory=ProfileSection)  # type: ignore[arg-type]
    compress: CompressSection = Field(default_factory=CompressSection)  # type: ignore[arg-type]
    finetune: FinetuneSection = Field(default_factory=FinetuneSection)  # type: ignore[arg-type]
    search: SearchSection = Field(default_factory=SearchSection)  # type: ignore[arg-type]
    magnitude: MagnitudeSection = Field(default_factory=MagnitudeSection)  # type: ignore[arg-type]
    soft: SoftSection = Field(default_factory=SoftSection)  # type: ignore[arg-type]


def read(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a project file.

    Args:
        path: the file.
        overrides: `section.key=value` strings that win over the file.
    Raises:
        ConfigError: no file, no TOML, or a key or value that is not allowed; the message names it.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; `edgeprune init` writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    return check(values, str(path))


def check(values: Mapping[str, Any], where: str) -> Config:
    """Validate parsed values; raises ConfigError with every offending key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is no override; write section.key=value, as in compress.steps=5")
    *parents, last = key.strip().split(".")
    here = values
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise ConfigError(f"{text!r}: {parent} is not a section")
    here[last] = _value(value.strip())


def _value(text: str) -> Any:
    """A TOML value; what is none is taken as a string, so that quotes may be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        allowed = _keys_at(path[:-1])
        close = difflib.get_close_matches(path[-1], allowed, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"unknown key {name}{hint} (allowed here: {', '.join(allowed)})"
    if problem["type"] == "missing":
        return f"{name} is missing: {_described(path)}"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if isinstance(problem["input"], dict) else f" (it is {problem['input']!r})"
    return f"{name}: {message[0].lower()}{message[1:]}{got}" if name else message


def _section_at(path: Sequence[str]) -> type[BaseModel] | None:
    if path[:1] == ["target"]:
        return TargetSection
    section: type[BaseModel] = Config
    for key in path:
        field = section.model_fields.get(key)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return DataSection if path == ["data"] else None
        section = field.annotation
    return section


def _keys_at(path: Sequence[str]) -> list[str]:
    section = _section_at(path)
    return sorted(section.model_fields) if section else []


def _described(path: Sequence[str]) -> str:
    section = _section_at(path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    return (field.description if field and field.description else "") or "it has no default"
