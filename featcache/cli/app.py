"""The command line as a whole: its commands, and how it ends. Messages go to stderr, results to stdout.

In: ``sys.argv``. Out: an exit code. 0 done; 1 failed; 2 wrong usage; 3 done, but more images were refused than
``--max-bad`` allows; 128 + the signal when stopped by one.
"""

import io
import logging
import os
import sys
from typing import Annotated

import typer

from featcache import __version__
from featcache.cli import demo, extract, inspect, predict, train
from featcache.cli.console import is_first_process, printable, say
from featcache.errors import FeatcacheError
from featcache.system.signals import interrupt_on_signals
from featcache.system.supervisor import supervised

_DECODING = ("extract", "finetune", "predict", "evaluate")  # commands that decode images

app = typer.Typer(
    name="featcache",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Embed images once, cache the embeddings with proof of origin, train classifiers on them in seconds.",
    epilog="[bold]Three commands:[/]  featcache extract photos/ -o features.h5  ·  "
    "featcache fit-head features.h5 -o model/  ·  featcache predict model/ new_photos/",
)
for group in (extract, train, predict, inspect, demo):  # in the order in which the help shows them
    for command, examples in group.COMMANDS.items():
        app.command(epilog=f"[bold]Examples:[/]  {examples}")(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"featcache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    _log_to_stderr()
    decodes = sys.argv[1:2] and (sys.argv[1] in _DECODING or "--repair" in sys.argv)
    if decodes and (worker_code := supervised()) is not None:
        sys.exit(worker_code)
    asked = interrupt_on_signals()
    code = _run()
    if code == 130:  # also what typer makes of an interruption
        say("interrupted")
        code = 128 + asked.signal if asked else 130
    sys.exit(code)


def _run() -> int:
    """Run the command of ``sys.argv``; its exit code."""
    try:
        code = app(prog_name="featcache", standalone_mode=False)
    except FeatcacheError as error:
        say(f"error: {error}")
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        say(f"error: {error}")
        return 1
    except Exception as error:
        return _usage_error(error)
    return code if isinstance(code, int) else 0


def _usage_error(error: Exception) -> int:
    """Print a click error as click words it, harmless to a terminal; anything else is a bug and keeps its traceback."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    text = io.StringIO()
    show(file=text)
    for line in text.getvalue().rstrip("\n").split("\n"):
        say(line)
    return int(getattr(error, "exit_code", 2))


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + printable(record.getMessage())


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter())
    logger = logging.getLogger("featcache")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)
