"""What the commands share: the two consoles, logs in the terminal, a progress bar, errors as plain sentences."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from hspsam_monai.errors import ConfigError, HspsamError
from hspsam_monai.files import NAMES

#: Results go to ``out``, everything else (logs, progress, errors) to ``err``.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

#: System errors that a user can mend.
_MENDABLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the place is read-only",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EEXIST: "a file of this name is in the way",
    errno.EISDIR: "it is a folder",
    errno.ENOENT: "no such file or folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "links lead in a circle",
    errno.EBUSY: "it is in use",
    errno.EIO: "the device reports an error",
}
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


def say(message: str, style: str = "") -> None:
    """Print a line of the result; long lines are left to the terminal."""
    out.print(Text(message, style=style), soft_wrap=True)


def tell(message: str, style: str = "") -> None:
    """Print a line beside the result, on stderr."""
    err.print(Text(message, style=style), soft_wrap=True)


class Face(TyperGroup):
    """The command group: mendable errors become one red sentence and an exit code, others keep their traceback.

    ``--debug`` is understood before and after the command's name.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move ``--debug`` to the front, where the group's own options are."""
        own = args[: args.index("--")] if "--" in args else args
        if "--debug" in own:
            args = ["--debug", *(a for a in own if a != "--debug"), *args[len(own) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            again = " Go on with the same command and --resume." if ctx.invoked_subcommand == "train" else ""
            tell(f"Interrupted.{again}", "yellow")
            raise typer.Exit(130) from None
        except Exception as error:
            plain = explain(error)
            if plain is None or ctx.params.get("debug"):
                raise
            message, code = plain
            tell(message, "bold red")
            raise typer.Exit(code) from error


def explain(error: BaseException) -> tuple[str, int] | None:
    """Find what a user can mend in an error and its causes.

    MONAI wraps what a configuration raises in RuntimeErrors; the named error is somewhere in the chain.

    Returns:
        A sentence and the exit code (2 for a wrong option, else 1), or None for a programming fault.
    """
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, HspsamError):
            return str(one), 2 if isinstance(one, ConfigError) else 1
    for one in chain:
        text = str(one)
        if isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError" or "not enough memory" in text:
            return f"Out of memory. Lower batch_size or image_size (KEY=VALUE), or use another device. ({text})", 1
        if isinstance(one, OSError) and one.errno in _MENDABLE:
            place = f"{one.filename}: " if one.filename else ""
            return f"{place}{_MENDABLE[one.errno]}. Choose another place or mend this one.", 1
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


class _TerminalHandler(logging.Handler):
    """Log lines above a running bar: ours from INFO, those of the libraries only with ``debug``."""

    def __init__(self, debug: bool) -> None:
        super().__init__(logging.INFO)
        self.debug = debug

    def emit(self, record: logging.LogRecord) -> None:
        if not self.debug and not record.name.startswith("hspsam_monai"):
            return  # ignite and MONAI tell every engine's start, and every error before it is explained below
        line = Text(self.formatter.formatTime(record, "%H:%M:%S ") if self.formatter else "", style="dim")
        err.print(line.append(record.getMessage(), _STYLES.get(record.levelno, "default")), soft_wrap=True)


def set_up_logging(debug: bool = False) -> None:
    """Send logs to the terminal; called once by every command. Files are added by the runs themselves."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=NAMES)  # a file's name may be no text
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _TerminalHandler)]:
        root.removeHandler(handler)
    handler = _TerminalHandler(debug)
    handler.setFormatter(logging.Formatter())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar in a terminal, nothing elsewhere; yields a function of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
