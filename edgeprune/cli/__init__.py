"""The command line: `edgeprune profile --target cpu`, `edgeprune compress --latency-ms 8`.

Results go to standard output, everything else to standard error; with `--json` one machine-readable object is all that
standard output gets. Exit status: 0 met, 1 budget or accuracy missed, 2 usage or bad input, 3 target unreachable or
broken, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys

from ..errors import EdgepruneError

STOPPED = 130


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit status. No error the user can act on shows a traceback."""
    import click

    from .commands import app

    try:
        status = app(arguments, standalone_mode=False)
        return int(status or 0)
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("stopped; what was finished is kept: go on with `edgeprune compress --resume`", file=sys.stderr)
        return STOPPED
    except EdgepruneError as error:
        if "--json" in arguments:
            print(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of standard output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
