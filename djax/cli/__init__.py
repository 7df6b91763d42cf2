"""The command line: commands, flags, one-line errors, the live view."""

from __future__ import annotations


def main() -> None:
    """Run the command line; see `djax.cli.app.main` for the exit codes."""
    from djax.cli.app import main as run

    run()
