"""`darkroom <command>`: pictures and the registry. Each command imports what it needs, so that --help is quick."""

import argparse
import contextlib
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from darkroom import __version__, cli_data, cli_registry
from darkroom.disk import disk_error, sentence
from darkroom.errors import InputError, Interrupted, StageFailed

if TYPE_CHECKING:
    from darkroom.workspace import Workspace

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75

_EPILOG = """\
exit codes: 0 done, 1 failed or refused by the gate, 2 bad input or parameters, 69 MLflow's server does not answer,
75 interrupted with state saved.
MLFLOW_TRACKING_URI says where runs and models are kept; the default is a database in .darkroom/ of the project.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run one command in the project that holds the working directory, and exit with its code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("darkroom").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by a supervisor like by Ctrl-C
    sys.exit(_outcome(options.command, options))


def _outcome(command: Callable[["Workspace", argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The exit code of a command; what went wrong is printed to stderr. Defects keep their traceback."""
    try:
        return command(cli_registry.here(options.anywhere), options)
    except InputError as error:
        return _fail(error, BAD_INPUT)
    except Interrupted as error:
        return _fail(error, INTERRUPTED)
    except (StageFailed, FloatingPointError) as error:  # the second is a network's that returned NaN
        return _fail(error, getattr(error, "exit_code", FAILED))
    except KeyboardInterrupt:
        return _fail("interrupted; everything is as it was", 130)
    except Exception as error:
        if (found := disk_error(error)) is None:
            raise
        return _fail(sentence(found), FAILED)


def _fail(message: object, code: int) -> int:
    print(*(f"darkroom: {line}" for line in str(message).splitlines()), sep="\n", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darkroom",
        description="Keeps a class-conditional diffusion model in production: DVC computes, this draws and ships.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"darkroom {__version__}")
    parser.set_defaults(anywhere=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[["Workspace", argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text.split(":")[0], description=text)
        sub.add_argument("--json", action="store_true", help="print JSON on stdout")
        sub.set_defaults(command=command)
        return sub

    cli_registry.add_commands(add)
    _add_sample(add("sample", _sample, "draw images to look at: a grid, single PNGs and the film of their denoising"))
    _add_ema(add("ema", _ema, "make the EMA of another width: from the snapshots that training left, without training"))
    add("params", _params, "check params.yaml: prints each mistake, or that there is none")
    cli_data.add_commands(commands)
    return parser


def _add_sample(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model", metavar="WHERE", help="a directory or models:/NAME@ALIAS of MLflow (default: what is scored)"
    )
    sub.add_argument("--class", dest="classes", nargs="+", default=[], metavar="CLASS", help="by name or number (all)")
    sub.add_argument("--num", type=int, default=8, metavar="N", help="images of each class (8)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other images (0)")
    sub.add_argument("--out", default="samples", metavar="DIR", help="where to put them (samples)")
    sub.add_argument("--film", action="store_true", help="the denoising as well: film.gif and film.png")
    sub.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once; changes no image (64)")
    sub.add_argument("--compile", action="store_true", help="torch.compile first: pays for many images on a GPU")
    how = sub.add_argument_group("how (default: as the model was measured, else as params.yaml says under sample)")
    for option, kind, text in (
        ("--sampler", str, "ddpm, ddpm_beta, ddim, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s or heun"),
        ("--steps", int, "timesteps to visit"),
        ("--spacing", str, "of the timesteps: trailing, leading, linspace or log_snr"),
        ("--eta", float, "noise of ddim, 0 to 1"),
        ("--clipping", str, "of the estimate of x_0: none, static or dynamic"),
        ("--guidance-scale", float, "1 conditional, 0 unconditional, more: truer to the class"),
        ("--precision", str, "fp32 or bf16"),
    ):
        how.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=text)
    how.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=argparse.SUPPRESS,
        metavar=("LOW", "HIGH"),
        help="noise levels sigma between which to guide",
    )


def _add_ema(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--width",
        type=float,
        required=True,
        metavar="W",
        help="standard deviation of the average, as a share of the training's length: above 0, at most 0.25",
    )
    sub.add_argument("--step", type=int, metavar="N", help="the average after N steps (default: after the last)")
    sub.add_argument("--output", metavar="DIR", help="where to put the model (default: models/ema-WIDTH)")


def _sample(workspace: "Workspace", options: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from darkroom.device import choose_device
    from darkroom.diffusion.model import DiffusionModel, read_draw_params
    from darkroom.evaluation.pictures import check_destination, draw_pictures, find_labels
    from darkroom.params import DrawParams
    from darkroom.progress import progress
    from darkroom.registry.outputs import served_model

    for name, least in (("num", 1), ("batch_size", 1), ("seed", 0)):
        if not least <= getattr(options, name) < 2**63:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {least} or more")
    out = Path(options.out)
    check_destination(out)
    with tempfile.TemporaryDirectory(prefix="darkroom-") as fetched:
        directory = Path(options.model) if options.model else served_model(workspace)
        if ":/" in (options.model or ""):
            from darkroom.registry.fetch import fetch_model

            directory = fetch_model(workspace, options.model, Path(fetched))
        model = DiffusionModel.load(directory, choose_device(), compiled=options.compile)
        settings = read_draw_params(directory) or workspace.params().sample
    asked = {name: value for name, value in vars(options).items() if name in DrawParams.model_fields}
    settings = settings.with_sampler(asked.get("sampler", settings.sampler)).changed(**asked)
    labels = find_labels(model.card.classes, options.classes)
    batches = -(-len(labels) * options.num // options.batch_size)
    shown = contextlib.nullcontext() if options.json else progress("drawing", batches * settings.steps, "steps")
    with shown as advance:
        images = draw_pictures(
            model,
            settings,
            labels,
            options.num,
            options.seed,
            out,
            film=options.film,
            batch_size=options.batch_size,
            progress=advance,
        )
    files = ["grid.png", *(["film.gif", "film.png"] if options.film else []), "samples.json"]
    if options.json:
        _print_json({"directory": str(out), "files": files, "images": len(images)})
    else:
        print(f"{len(images)} images in {out}: {', '.join(files)} and one file each")
    return DONE


def _ema(workspace: "Workspace", options: argparse.Namespace) -> int:
    import os
    from pathlib import Path

    from darkroom.progress import progress
    from darkroom.training.ema import width_name
    from darkroom.training.posthoc import open_snapshots, plan_average, write_model
    from darkroom.training.snapshots import DIRECTORY

    snapshots = workspace.models / DIRECTORY
    plan = plan_average(open_snapshots(snapshots), options.width, options.step)
    name = f"ema-{width_name(plan.width)}" + ("" if options.step is None else f"-step-{plan.step}")
    target = Path(options.output) if options.output else workspace.models / name
    shown = contextlib.nullcontext() if options.json else progress("averaging", len(plan.snapshots), "snapshots")
    with shown as advance:
        made = write_model(workspace.models, snapshots, plan, target, advance)
    if options.json:
        _print_json(dataclasses.asdict(made) | {"directory": str(target)})
    else:
        where = os.path.relpath(target)
        print(f"width {width_name(made.width)} after step {made.step}: weights {made.weights_digest[:12]} in {where}")
        print(f"residual {made.residual:.2g}: the share of the wanted average that the snapshots could not make")
        print(f"look at it:  darkroom sample --model {where}")
    return DONE


def _params(workspace: "Workspace", options: argparse.Namespace) -> int:
    params = workspace.params()
    for line in params.train.warnings():
        print(f"darkroom: ! {line}", file=sys.stderr)
    if options.json:
        _print_json(params.model_dump(mode="json", by_alias=True))
    else:
        print(f"{workspace.params_file}: ok")
    return DONE


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))
