"""The commands, in the order in which a user meets them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import api, budgets, carray, config, files, project
from ..errors import ConfigError, MissedError, UsageError
from ..records import Receipt
from ..runs import Run
from . import compressing, explaining, show, tables
from .progress import Bars, console

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
targets_app = typer.Typer(invoke_without_command=True, help="List the targets, or check one.")
app.add_typer(targets_app, name="targets")
app.add_typer(tables.app, name="table")

RUNS = "runs"  # beside edgeprune.toml
DEPLOYED = "deployed"

ProjectFile = Annotated[Path, typer.Option("--project", "-p", help="the project file")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a key: --set compress.steps=5")]
Json = Annotated[bool, typer.Option("--json", help="one machine-readable result on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
TargetName = Annotated[str | None, typer.Option("--target", "-t", help="a [target.NAME], or cpu")]
PowerMode = Annotated[
    str | None, typer.Option(help="of a Jetson: nvpmodel's name or number, set while this runs, then put back")
]
RunFolder = Annotated[Path | None, typer.Option("--run", help="a run's folder; default: the last one in runs/")]
PROJECT = Path(config.FILE)


@app.callback()
def root() -> None:
    """Prune a network to a latency measured on your own device, verify it there, install it, roll it back."""


@app.command()
def init(
    source: Annotated[str, typer.Argument(help="of the model, as in model.source")] = "model.py:build",
    path: ProjectFile = PROJECT,
    force: Annotated[bool, typer.Option(help="replace an existing file")] = False,
) -> None:
    """Write a commented edgeprune.toml."""
    from importlib import resources

    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force replaces it")
    text = (resources.files("edgeprune") / "templates" / "edgeprune.toml").read_text(encoding="utf-8")
    with files.writing(path) as beside:
        beside.write_text(text.replace("{{ source }}", source), encoding="utf-8")
    print(f"wrote {path}: fill in [model], [data] and a budget, then run `edgeprune inspect`")


@targets_app.callback()
def targets(context: typer.Context, path: ProjectFile = PROJECT, as_json: Json = False) -> None:
    """List the targets of the project and the kinds there are."""
    if context.invoked_subcommand is not None:
        return
    from .. import target

    sections: dict[str, Any] = {"cpu": {"kind": "cpu"}}
    if path.exists():
        sections |= project.read(path).sections()
    show.result({"targets": sections, "kinds": target.kinds()}, as_json, show.targets)


@targets_app.command("add")
def add_target(
    name: str,
    host: Annotated[str, typer.Option(help="as ssh takes it: pi@raspberrypi.local, or a name of your configuration")],
    kind: Annotated[str, typer.Option(help="the runtime: a file in targets/")] = "tflite",
    precision: Annotated[str | None, typer.Option(help="f32, or another of that kind")] = None,
    threads: Annotated[int | None, typer.Option(help="of one inference")] = None,
    ssh_config: Annotated[Path | None, typer.Option(help="in the place of ~/.ssh/config")] = None,
    path: ProjectFile = PROJECT,
) -> None:
    """Write a board into the project file; the rest of the file stays as it is."""
    from .. import boards

    keys = {"kind": kind, "host": host, "precision": precision, "threads": threads}
    boards.add(path, name, {**keys, "ssh_config": None if ssh_config is None else str(ssh_config)})
    print(f"wrote [target.{name}] into {path}; see what it lacks with: edgeprune targets check {name}")


@targets_app.command("check")
def check_target(name: str, path: ProjectFile = PROJECT, as_json: Json = False) -> None:
    """Open a target and say what it is; of a board, look at everything that it needs and name what is missing."""
    from .. import boards, target

    sections = project.read(path).sections() if path.exists() else {}
    if sections.get(name, {}).get("host") or sections.get(name, {}).get("kind") == "jetson":
        show.steps(boards.walk(name, sections[name]), as_json)
        return
    with closing(target.open_target(name, sections)) as opened:
        found = {"name": name, "fingerprint": opened.fingerprint(), "state": opened.state()}
    show.result(files.plain(found), as_json, show.target)


@app.command()
def inspect(
    source: Annotated[str | None, typer.Argument(help="a model source; default: the project's")] = None,
    input_: Annotated[str | None, typer.Option("--input", help="its input shape, as in 1x3x224x224")] = None,
    check: Annotated[bool, typer.Option(help="cut half of every group and compare with the masked model")] = False,
    frozen: Annotated[list[str] | None, typer.Option(help="module whose channels must stay")] = None,
    path: ProjectFile = PROJECT,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show which channels can be removed together, and which must stay and why."""
    from .. import inspection, proof
    from . import tree

    opened = _project(path, overrides, source, input_)
    protected = (*(frozen or ()), *opened.config.compress.protected)
    with Bars(as_json).stage("check every group") as progress:
        found = inspection.inspect(opened.model, opened.example, protected, check, progress if check else None)
    show.result(inspection.as_json(found), as_json, lambda _: tree.show(found))
    if found.proof is not None and found.proof.max_deviation > proof.TOLERANCE:
        raise MissedError(
            f"cutting {found.proof.worst} changes the output by {found.proof.max_deviation:.2g} of its largest value; "
            "freeze it with --frozen, and please report this network"
        )


@app.command()
def profile(
    target: TargetName = None,
    check: Annotated[int, typer.Option(min=0, help="compare the table with this many whole networks")] = 0,
    power_mode: PowerMode = None,
    path: ProjectFile = PROJECT,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the latency table of the project's network on a target."""
    from .. import profiling

    opened = _project(path, [*(overrides or ()), *_power(path, target, power_mode)])
    with closing(opened.open_target(target)) as device:
        found = profiling.profile(
            opened.model,
            opened.example,
            device,
            opened.config.compress,
            check,
            Bars(quiet),
            opened.calibration(device),
            opened.config.profile.interval,
        )
    show.result(profiling.as_json(found), as_json, lambda _: show.profile(found))


@app.command()
def compress(
    latency_ms: Annotated[
        str | None, typer.Option(help="budget: median latency of one input; 8, or 8,6,4, or cpu=8,pi=20")
    ] = None,
    speedup: Annotated[str | None, typer.Option(help="budget: dense latency divided by this; 2, or 1.5,2,3")] = None,
    size_mb: Annotated[float | None, typer.Option(help="budget: of the exported file, beside the latency")] = None,
    target: TargetName = None,
    strategy: Annotated[
        str | None, typer.Option(help="knapsack, uniform, random, rl, genetic, random-search, magnitude or soft")
    ] = None,
    importance: Annotated[str | None, typer.Option(help="sp-lamp, sp-lamp-log, l1, l2, taylor or random")] = None,
    steps: Annotated[int | None, typer.Option(help="of the budget schedule")] = None,
    epochs: Annotated[int | None, typer.Option(help="of fine-tuning at the end")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes that judge a search's candidates, or magnitude's scan")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster that judges them")] = None,
    power_mode: PowerMode = None,
    run: RunFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the last run, or with --run")] = False,
    path: ProjectFile = PROJECT,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune to a budget, fine-tune, export, verify on the target, and write a report.

    Several budgets (8,6,4) give one network each, every one a subset of the one before. Several targets (--target
    cpu,pi) give one network that meets the budget on each.
    """
    flags = {"strategy": strategy, "importance": importance, "steps": steps, "size_mb": size_mb}
    extra = [f"compress.{key}={value}" for key, value in flags.items() if value is not None]
    extra += [f"compress.target='{target}'"] if target is not None else []
    extra += [f"finetune.epochs={epochs}"] if epochs is not None else []
    for judging in ("search", "magnitude"):
        extra += [f"{judging}.workers={workers}"] if workers is not None else []
        extra += [f"{judging}.ray='{ray}'"] if ray is not None else []
    opened = _project(path, [*(overrides or ()), *extra, *_power(path, target, power_mode)])
    section = opened.config.compress
    if latency_ms is None and speedup is None:
        request = budgets.requested(section.target, section.latency_ms, section.speedup, section.size_mb)
    else:  # a budget on the command line replaces the file's, whichever kind that was
        texts = [None if text is None else budgets.parse(text) for text in (latency_ms, speedup)]
        request = budgets.requested(section.target, texts[0], texts[1], section.size_mb)
    with _run_folder(opened, run, resume) as folder:
        compressing.run(opened, request, Run(folder), resume, as_json, quiet)


@app.command()
def explain(
    run: RunFolder = None,
    dense: Annotated[bool, typer.Option(help="explain the dense network instead of a finished run")] = False,
    target: TargetName = None,
    path: ProjectFile = PROJECT,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say why a network is not faster: layer by layer, with the staircases, the sum, and the floor."""
    from .. import explain as explaining_
    from .. import store

    opened = _project(path, overrides)
    folder = None if dense else _finished(opened, run)
    with closing(opened.open_target(target)) as device:
        found = explaining_.explain(
            opened.model,
            opened.example,
            device,
            opened.config.compress,
            store.Store(store.default_path()),
            None if folder is None else Run(folder),
            Bars(quiet),
            opened.calibration(device),
            opened.config.profile.interval,
        )
    show.result(files.plain(found), as_json, lambda _: explaining.text(found))


@app.command()
def export(
    run: RunFolder = None,
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("exported"),
    dense: Annotated[bool, typer.Option(help="the dense network instead of the pruned one")] = False,
    format_: Annotated[str, typer.Option("--format", help="target: what the target loads; c-array: C too")] = "target",
    target: TargetName = None,
    path: ProjectFile = PROJECT,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write a finished run's network as the files its target loads: ONNX and OpenVINO IR for cpu, .tflite for tflite.

    With --format c-array also as C source for microcontrollers, from a target of kind tflite.
    """
    if format_ not in ("target", "c-array"):
        raise UsageError(f"--format {format_}: there are target and c-array")
    opened = _project(path, overrides)
    module = opened.model if dense else api.load(_finished(opened, run), opened.model)
    with closing(opened.open_target(target)) as device, Bars(as_json).stage("export"):
        artifact = device.export(module, opened.example, out, opened.calibration(device))
    if format_ == "c-array":
        if artifact.format != "tflite":
            raise UsageError(
                f"--format c-array is written from a .tflite model, and target {device.name} loads {artifact.format}; "
                "name a target of kind tflite with --target"
            )
        made = carray.write(Path(artifact.path), out)
        artifact = replace(artifact, files=(*artifact.files, *map(str, made)))
    show.result(files.plain(artifact), as_json, show.artifact)


@app.command()
def verify(
    run: RunFolder = None,
    path: ProjectFile = PROJECT,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a finished run again on its target: latency, agreement, accuracy."""
    from .. import pipeline, report

    opened = _project(path, overrides)
    found = Run(_finished(opened, run))
    with closing(opened.open_target()) as device:
        outcome = pipeline.verify_again(opened.model, device, opened.task(), found, Bars(quiet))
    show.finished(outcome, report.write(found), as_json)


@app.command()
def flash(
    run: RunFolder = None,
    to: Annotated[
        list[str] | None,
        typer.Option(help="FOLDER on the target's device, or HOST:FOLDER by ssh; several, or commas between"),
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="versions that stay installed")] = 5,
    service: Annotated[str, typer.Option(help="command that restarts the model's user after the switch")] = "",
    rollback: Annotated[bool, typer.Option("--rollback", help="go back to the version before")] = False,
    list_: Annotated[bool, typer.Option("--list", help="list the installed versions")] = False,
    target: TargetName = None,
    path: ProjectFile = PROJECT,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Install a finished run: versioned, atomic, checked by checksum and by running it there.

    Several devices get it one after the other, and none after the first that fails.
    """
    from .. import deploy, flashing
    from ..host import Host

    where = flashing.places(to or [DEPLOYED])
    opened = _project(path, overrides)
    with closing(opened.open_target(target)) as device:
        if list_:
            found = flashing.everywhere(device, where, deploy.versions)
            show.each(where, [{"versions": files.plain(list(versions))} for versions in found], as_json, show.versions)
            return
        if not rollback:
            sources, manifest = flashing.package(Run(_finished(opened, run)), opened.model, opened.data, device)

        def act(host: Host, folder: str) -> Receipt:
            if rollback:
                return deploy.rollback(host, folder, service)
            return deploy.install(host, sources, manifest, folder, keep, service)

        with Bars(as_json).stage("go back and test" if rollback else "install and test"):
            receipts = flashing.everywhere(device, where, act)
    show.each(where, files.plain(receipts), as_json, show.receipt)


@app.command("report")
def report_(run: RunFolder = None, path: ProjectFile = PROJECT, as_json: Json = False) -> None:
    """Write the page of a finished run again."""
    from .. import report

    folder = run if run is not None else api.last_run(path.parent / RUNS)
    page = report.write(Run(folder))
    show.result({"report": str(page)}, as_json, lambda r: print(r["report"]))


# ---- shared --------------------------------------------------------------------------------------------------


def _power(path: Path, targets: str | None, mode: str | None) -> list[str]:
    """A power mode as overrides of the targets that are used."""
    from .. import budgets

    if mode is None:
        return []
    return [
        f"target.{name}.power_mode='{mode}'" for name in budgets.names(targets or config.read(path).compress.target)
    ]


def _project(
    path: Path, overrides: list[str] | None, source: str | None = None, input_: str | None = None
) -> project.Project:
    extra = list(overrides or ())
    if input_ is not None:
        extra.append(f"model.input={[int(n) for n in _dims(input_)]}")
    if source is None:
        return project.read(path, extra)
    values = {"model": {"source": source, "input": [int(n) for n in _dims(input_ or "1x3x224x224")]}}
    return project.Project(Path.cwd() / config.FILE, config.check(values, "command line"))


def _dims(text: str) -> list[str]:
    parts = text.replace(",", "x").split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--input {text}: write the shape as 1x3x224x224, batch first")
    return parts


@contextmanager
def _run_folder(opened: project.Project, run: Path | None, resume: bool) -> Iterator[Path]:
    folder = opened.folder / RUNS
    if run is not None or resume:
        yield run or api.last_run(folder)
        return
    with api.new_run(folder) as made:
        yield made


def _finished(opened: project.Project, run: Path | None) -> Path:
    folder = run if run is not None else api.last_run(opened.folder / RUNS)
    if (folder / "curve.json").exists():
        parts = sorted(p.parent.name for p in folder.glob("*/recipe.json"))
        raise UsageError(f"{folder} holds a run for each budget ({', '.join(parts)}): name one with --run {folder}/...")
    if not (folder / "recipe.json").exists():
        raise UsageError(f"{folder} holds no finished run; go on with `edgeprune compress --resume`")
    return folder


__all__ = ["app", "console"]
