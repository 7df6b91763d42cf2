"""One line for wrong input: what the command line prints instead of a traceback, and its exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from djax import cli_interrupt

WRONG_INPUT = 2
FAILED = 1
INTERRUPTED = 130
_LONGEST = 600

# typer 0.29 carries its own click and earlier ones import it: both are reached through what typer exports.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class WrongInput(ValueError):
    """Wrong input, in the four parts of every message: the field, what came, what is allowed, what to do."""

    def __init__(self, field: str, got: object, *, allowed: str, do: str) -> None:
        self.field = field
        super().__init__(f"{field}: got {got}; allowed {allowed}; {do}")


class _Refused(typer.BadParameter):
    """A value that a flag cannot take, described in full."""


def refused(field: str, got: object, allowed: str) -> Exception:
    """What a flag's parser raises: typer lets it through, where it would rephrase a `WrongInput`."""
    return _Refused(str(WrongInput(field, shown(got), allowed=allowed, do="correct it")))


def one_line(text: str) -> str:
    """`text` on one line of bounded length, without control characters."""
    line = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def shown(value: object) -> str:
    """`repr(value)`, shortened, for the "got" of a message."""
    text = one_line(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


class OneLineGroup(TyperGroup):
    """The command group of `djax`: exit code 2 and one line on stderr for anything wrong in the input.

    `--debug`, anywhere before `--`, lets exceptions through with their traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a KeyboardInterrupt ends it with what was reached (`djax.cli_interrupt`)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(cli_interrupt.report()) from None

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command line and exit with its code; `standalone_mode` is accepted and has no effect."""
        args = list(sys.argv[1:] if args is None else args)
        before_dashes = args[: args.index("--")] if "--" in args else args
        extra["standalone_mode"] = False
        try:
            result = super().main(args, "djax", **extra)
            sys.stdout.flush()
            code = result if isinstance(result, int) else 0
        except BrokenPipeError:
            _close_stdout()
            code = FAILED
        except Exception as error:
            if "--debug" in before_dashes:
                raise
            described = _describe(error)
            if described is None:
                raise
            code, message = described
            if message:
                print(f"djax: {one_line(message)}", file=sys.stderr)
        sys.exit(code)


def _describe(error: Exception) -> tuple[int, str] | None:
    """Exit code and message for an exception that the input can cause; None for a bug."""
    if isinstance(error, typer.Abort):
        return INTERRUPTED, ""
    if isinstance(error, _ClickException):
        return WRONG_INPUT, _usage(error)
    if isinstance(error, OSError):
        return WRONG_INPUT, _system(error)
    if isinstance(error, ValueError | NotImplementedError):
        return WRONG_INPUT, str(error) or type(error).__name__
    distributed = sys.modules.get("djax.distributed")
    if distributed is not None and isinstance(error, distributed.PeerLost):
        return FAILED, str(error)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(error, jax.errors.JaxRuntimeError):
        text = str(error)
        if "RESOURCE_EXHAUSTED" in text:
            return FAILED, ("device memory: got a request that does not fit; allowed what fits the device; lower "
                            f"--max-new-tokens or the number of prompts ({text})")
        return FAILED, f"device: {text}"
    return None


def _system(error: OSError) -> str:
    # Errors raised with a message of their own (missing checkpoint files, ...) already read well.
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    name = error.filename if error.filename is not None else "file"
    return f"{name}: got an error from the system ({error.strerror}); allowed a path that can be used; check it"


def _usage(error: Exception) -> str:
    """typer's usage errors in the words of the others."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "djax"
    see = f"see '{command} --help'"
    option = getattr(error, "option_name", None)
    message = one_line(getattr(error, "message", "") or str(error)).rstrip(".")
    if isinstance(error, _Refused):
        return message
    missing = re.match(r"Option '?(--[\w-]+)'? requires an argument", message)
    if missing:
        return f"{missing[1]}: got nothing; allowed one value; give it, {see}"
    if type(error).__name__ == "NoSuchOption":
        near = getattr(error, "possibilities", None)
        do = f"did you mean {' or '.join(sorted(near))}?" if near else see
        return f"{option}: got an option that does not exist; allowed the options of '{command}'; {do}"
    parameter = getattr(error, "param", None)
    if parameter is None:
        unknown = re.match(r"No such command '(.*?)'", message)
        if unknown:
            names = ", ".join(context.command.list_commands(context)) if context is not None else "a command"
            return f"COMMAND: got {shown(unknown[1])}; allowed {names}; {see}"
        extra = re.match(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", message)
        if extra:
            return f"arguments: got {shown(extra[1])} too many; allowed what the command takes; {see}"
        field = option or "arguments"
        return f"{field}: got a wrong use ({message}); allowed the documented use; {see}"
    field = _field(parameter)
    if type(error).__name__ == "MissingParameter":
        return f"{field}: got nothing; allowed one value; give it, {see}"
    return f"{field}: got a wrong value ({message}); allowed the documented values; {see}"


def _field(parameter: Any) -> str:
    options = [name for name in getattr(parameter, "opts", ()) if name.startswith("--")]
    return options[0] if options else (parameter.metavar or parameter.name or "argument").upper()


def _close_stdout() -> None:
    """The reader has gone: keep the interpreter from complaining when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
