"""The entry point of the `jaxalign` command: configures the process before it loads JAX."""

from __future__ import annotations

from jaxalign.commands.startup.huge_pages import restart_with_huge_pages


def main() -> int:
    """Restarts the process with huge pages if they help, then runs the command line.

    Only the `jaxalign` command and `python -m jaxalign` call this. Importing the package, or
    calling `jaxalign.commands.cli.main`, never replaces a process.
    """
    restart_with_huge_pages()

    from jaxalign.commands.cli import main

    return main()
