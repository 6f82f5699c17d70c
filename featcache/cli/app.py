"""The command line as a whole: its commands, and how it ends. What was found goes to stdout, everything else to stderr.

In: ``sys.argv``. Out: an exit code. 0 done; 1 failed; 2 wrong usage; 3 done, but more images were refused than
``--max-bad`` allows; 128 + the signal when stopped by one.
"""

import atexit
import gc
import itertools
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from typing import Annotated, Any

import typer

from featcache import __version__
from featcache.cli import audit, demo, examples, exchange, extract, inspect, merge, pages, predict, split, train
from featcache.cli.console import is_first_process, open_missing_streams, say, show_result, silence
from featcache.cli.help import Command, Group
from featcache.cli.usage import explain, with_backbone
from featcache.errors import DownloadError, FeatcacheError, Interrupted, UsageError
from featcache.system.signals import interrupt_on_signals
from featcache.system.supervisor import supervised

_DECODING = (
    "stats",
    "split",
    "extract",
    "finetune",
    "predict",
    "evaluate",
    "report",
    "preview",
    "audit",
)  # commands that decode images
_EVERYWHERE = re.compile("-q+|--quiet|-v+|--verbose")  # options that may stand before or behind the command

log = logging.getLogger("featcache")

app = typer.Typer(
    name="featcache",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Embed images once, cache the embeddings with proof of origin, train classifiers on them in seconds.",
    epilog="Three commands do the whole job:\n  featcache extract photos/ -o features.h5\n"
    "  featcache fit-head features.h5 -o model/\n  featcache predict model/ new_photos/",
)
_EXAMPLES: dict[str, str] = {}  # the first of each command
for group in (
    split,
    extract,
    merge,
    audit,
    train,
    predict,
    exchange,
    pages,
    inspect,
    demo,
    examples,
):  # in the order in which the help shows them
    for command, text in group.COMMANDS.items():
        typed = text.split("  ·  ")
        _EXAMPLES[command.__name__.replace("_", "-")] = typed[0]
        lines = ["Examples:", *(f"  {example}" for example in typed)]
        app.command(cls=Command, epilog="\n".join([*lines, "-q leaves notes out, -v shows why."]))(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"featcache {__version__}", flush=True)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Leave out notes and progress, not warnings.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show why: what was measured, and where it failed.")
    ] = False,
) -> None:
    if quiet and verbose:
        raise UsageError("-q leaves things out and -v adds some; choose one")
    if is_first_process():
        log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def main() -> None:
    """Entry point: errors become one line and an exit code, with ``--json`` also an object."""
    open_missing_streams()
    _log_to_stderr()
    _collect_less()
    typed = _options_typed()
    first = [text for text in typed if _EVERYWHERE.fullmatch(text)]
    rest = [text for text in typed if not _EVERYWHERE.fullmatch(text)]
    sys.argv[1:] = [*first, *rest, *sys.argv[1 + len(typed) :]]
    sys.exit(_run(command=next(iter(rest), "")))


def _collect_less() -> None:
    """Spare Python's search for cycles what is loaded once and stays: a million objects, a quarter of the time that short commands take.

    What is new is looked through as always. At the end nothing is: all of it goes with the process.
    """
    new, older, _ = gc.get_threshold()
    gc.set_threshold(new, older, 1000)
    atexit.register(gc.freeze)


def _options_typed() -> list[str]:
    """The command and its options: the arguments before ``--``, if there is one."""
    arguments = sys.argv[1:]
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _run(*, command: str) -> int:
    """Run the command of ``sys.argv``; its exit code."""
    asked = None
    try:
        decodes = command in _DECODING or any(text.startswith("--repair") for text in sys.argv)
        _keep_stdin(read=decodes)
        if decodes and (code := supervised()) is not None:
            return code  # of a worker, which has said what there is to say
        asked = interrupt_on_signals()
        code = app(prog_name="featcache", standalone_mode=False)
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130  # also what typer makes of an interruption
    except (BrokenPipeError, SystemExit) as error:  # the reader of our output went away, as `| head` does
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise  # the other is what typer makes of it
        silence(sys.stdout)
        return 128 + getattr(signal, "SIGPIPE", 13)  # as of any program that this signal stops; no line says why
    except (FeatcacheError, OSError) as error:
        message = str(error)
        if isinstance(error, DownloadError) and error.instead:
            message += f": {with_backbone(sys.argv[1:], error.instead)}"
        say(f"error: {message}")
        return _fail(error, message)
    except Exception as error:
        return _usage_error(error)
    if code == 130:
        say("interrupted")
        return _fail(Interrupted("interrupted", asked.signal if asked else signal.SIGINT), "interrupted")
    return code if isinstance(code, int) else 0


def _keep_stdin(*, read: bool) -> None:
    """Where ``-`` is given, make stdin a file with what is piped in: each worker reads it anew, and listing it takes several passes.

    Raises UsageError: it is given as an output, or twice; nothing is piped in, or several processes would each read a part.
    """
    pairs = list(itertools.pairwise(sys.argv))
    if any(pair in (("-o", "-"), ("--output", "-")) or pair[1] in ("-o-", "--output=-") for pair in pairs):
        raise UsageError("-o takes the name of what is to be written, found -; predict without -o writes to stdout")
    places = [text for text in sys.argv[1:] if text in ("-", "--repair=-")]
    if not read or not places:
        return
    if len(places) > 1:
        raise UsageError("- is what is piped in, which can be read once; give it once")
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        raise UsageError("- is what is piped in, which several processes cannot all read; give a file")
    if sys.stdin.isatty():
        raise UsageError(
            "- is a list of images that is piped in, as by `find photos -name '*.jpg' | featcache ... -`; nothing is"
        )
    with tempfile.TemporaryFile() as kept:
        shutil.copyfileobj(sys.stdin.buffer, kept)
        kept.flush()
        os.dup2(kept.fileno(), sys.stdin.fileno())


def _fail(error: Exception, message: str, *, code: int = 1) -> int:
    """Show what has no place in the one line that was said: the way to it with ``-v``, an object with ``--json``."""
    code = int(getattr(error, "exit_code", code))
    if log.isEnabledFor(logging.DEBUG):
        for line in "".join(traceback.format_exception(error)).splitlines():
            say(line)
    found = {"type": type(error).__name__, "message": message, "exit_code": code}
    try:
        if "--json" in _options_typed() and is_first_process():
            show_result((), {**getattr(error, "facts", {}), "error": found}, as_json=True)
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    return code


def _usage_error(error: Exception) -> int:
    """Say in one line what typer refused; anything else is a bug and keeps its traceback."""
    if not hasattr(error, "show"):
        _fail(error, str(error))
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":  # it has shown the help
        return 2
    commands: Any = typer.main.get_command(app)
    message = explain(error, commands.commands, _EXAMPLES, _options_typed())
    say(f"error: {message}")
    return _fail(error, message, code=2)


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())


def _log_to_stderr() -> None:
    log.addHandler(_ToStderr())
    log.setLevel(logging.INFO if is_first_process() else logging.ERROR)
