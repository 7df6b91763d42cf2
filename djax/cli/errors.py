"""One line for wrong input: what the command line prints instead of a traceback, and its exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from djax.cli import interrupt as cli_interrupt
from djax.errors import ArgumentError, one_line, shown

WRONG_INPUT = 2
FAILED = 1
INTERRUPTED = 130
_LONGEST = 600

# typer 0.29 carries its own click and earlier ones import it: both are reached through what typer exports.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


_ALIASES = {
    "prompts": ("token_ids", "messages", "prompt", "template"), "messages": ("messages", "prompt"),
    "token_ids": ("token_ids", "template"), "key": ("seed",), "source": ("source", "model")}
"""Parameters of commands that an argument of the library may come from, where the names differ."""


class _Refused(typer.BadParameter):
    """A value that a flag cannot take, described in full."""


def refused(flag: str, value: object, allowed: str) -> Exception:
    """The error of a flag's parser: typer lets it through, where it would rephrase an `ArgumentError`."""
    return _Refused(_sentence(ArgumentError(flag, shown(value), allowed=allowed)))


class OneLineCommand(TyperCommand):
    """A command whose errors name what was typed: the flag, or the argument's metavar."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, as typer does; too many of them are an `ArgumentError`."""
        ctx.allow_extra_args = True
        try:
            rest = super().parse_args(ctx, args)
        except _UsageError as error:
            error.ctx = ctx  # type: ignore[attr-defined]
            raise
        if rest:
            raise ArgumentError("arguments", f"{shown(' '.join(rest))} too many", allowed="what the command takes",
                                advice=_see(ctx))
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error about an argument of the library comes out as one about a flag."""
        try:
            return super().invoke(ctx)
        except ArgumentError as error:
            raise error.renamed(self._typed(error.name, ctx.params)) from error

    def _typed(self, name: str, given: Mapping[str, Any]) -> str:
        """`max_new_tokens` -> `--max-new-tokens`, `prompts[3]` -> `--token-ids[3]`; other names as they are."""
        end = min((name.index(mark) for mark in "[." if mark in name), default=len(name))
        own = {parameter.name: parameter for parameter in self.params}
        found = [one for one in _ALIASES.get(name[:end], (name[:end],)) if one in own]
        if not found:
            return name
        return _field(own[next((one for one in found if given.get(one) is not None), found[-1])]) + name[end:]


class OneLineGroup(TyperGroup):
    """The command group of `djax`: exit code 2 and one line on stderr for anything wrong in the input.

    `--debug`, anywhere before `--`, lets exceptions through with their traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a KeyboardInterrupt ends it with what was reached (`djax.cli.interrupt`)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(cli_interrupt.report()) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is named first; options that stand there are typer's to refuse."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise ArgumentError("COMMAND", shown(args[0]), allowed=", ".join(self.list_commands(ctx)),
                                advice=_see(ctx))
        return super().resolve_command(ctx, args)

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
                print(f"djax: {one_line(message, _LONGEST)}", file=sys.stderr)
        sys.exit(code)


def _describe(error: Exception) -> tuple[int, str] | None:
    """Exit code and message for an exception that the input can cause; None for a bug."""
    if isinstance(error, typer.Abort):
        return INTERRUPTED, ""
    if isinstance(error, _ClickException):
        usage = _usage(error)
        return WRONG_INPUT, _sentence(usage) if isinstance(usage, ArgumentError) else usage
    if isinstance(error, ArgumentError):
        return WRONG_INPUT, _sentence(error)
    if isinstance(error, OSError):
        return WRONG_INPUT, _system(error)
    if isinstance(error, ValueError | NotImplementedError):
        return WRONG_INPUT, str(error) or type(error).__name__
    distributed = sys.modules.get("djax.devices.distributed")
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


def _usage(error: Exception) -> ArgumentError | str:
    """typer's usage errors in the words of the others."""
    if isinstance(error, _Refused):
        return error.message
    context = getattr(error, "ctx", None)
    command, see = context.command_path if context is not None else "djax", _see(context)
    option, kind = getattr(error, "option_name", None), type(error).__name__
    if kind == "NoSuchOption":
        near = getattr(error, "possibilities", None)
        return ArgumentError(option or "option", "an option that does not exist", allowed=f"the options of '{command}'",
                             advice=f"did you mean {' or '.join(sorted(near))}?" if near else see)
    parameter = getattr(error, "param", None)
    if kind == "BadOptionUsage" and context is not None:
        parameter = next((one for one in context.command.params if option in (*one.opts, *one.secondary_opts)), None)
        if getattr(parameter, "is_flag", False):
            return ArgumentError(option or "option", "a value", allowed="no value", advice=f"drop it, {see}")
    if kind in ("BadOptionUsage", "MissingParameter") and parameter is not None:
        return ArgumentError(option or _field(parameter), "nothing", allowed="one value", advice=f"give it, {see}")
    message = one_line(getattr(error, "message", "") or str(error)).rstrip(".")
    return ArgumentError(option or ("arguments" if parameter is None else _field(parameter)),
                         f"a wrong use ({message})", allowed="the documented one", advice=see)


def _see(context: Any) -> str:
    return f"see '{context.command_path if context is not None else 'djax'} --help'"


def _sentence(error: ArgumentError) -> str:
    """One line: what came, what is allowed, and always what to do."""
    return str(error if error.advice else ArgumentError(error.name, error.got, allowed=error.allowed,
                                                        advice="change it"))


def _field(parameter: Any) -> str:
    options = [name for name in getattr(parameter, "opts", ()) if name.startswith("--")]
    return options[0] if options else parameter.metavar or (parameter.name or "argument").upper()


def _close_stdout() -> None:
    """The reader has gone: keep the interpreter from complaining when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
