"""The command line: `edgeprune profile --target cpu`, `edgeprune compress --latency-ms 8`.

Results go to standard output, everything else to standard error; with `--json` one machine-readable object is all that
standard output gets. Exit status: 0 met, 1 budget or accuracy missed, 2 usage or bad input, 3 target unreachable or
broken, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ..errors import EdgepruneError, MissedError

STOPPED = 130  # what shells expect after Ctrl-C, and what typer makes of it
STOPPED_TEXT = "stopped; what was finished is kept: go on with `edgeprune compress --resume`"


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # while it starts or ends
        print(STOPPED_TEXT, file=sys.stderr)
        status = STOPPED
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit status. No error the user can act on shows a traceback."""
    import typer

    from .commands import app

    # typer brings its own click in some releases and uses the installed one in others
    wrong_use: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

    try:
        status = int(app(arguments, standalone_mode=False) or 0)
        if status == STOPPED:
            print(STOPPED_TEXT, file=sys.stderr)
        return status
    except typer.Exit as stop:
        return int(stop.exit_code)
    except wrong_use as error:
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print(STOPPED_TEXT, file=sys.stderr)
        return STOPPED
    except EdgepruneError as error:
        if "--json" in arguments and not isinstance(error, MissedError):  # its result has been printed
            print(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of standard output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
