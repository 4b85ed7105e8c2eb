"""What the commands have in common on the way in and out: arguments, help with environment variables, errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ollamapy.env import help_text
from ollamapy.errors import OllamapyError

PROGRAM = "ollamapy"
INTERRUPTED = 130  # the exit status of a process that Ctrl+C ended, by the shell's rule
_F = TypeVar("_F", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose help lists the variables it reads."""

    environment: tuple[str, ...] = ("OLLAMA_HOST",)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.environment:
            formatter.write_paragraph()
            formatter.write(help_text(self.environment) + "\n")


class RunCommand(Command):
    """Has options whose value may be left out, and is never the next word: `--think`, `--think=low`."""

    environment: tuple[str, ...] = ("OLLAMA_EDITOR", "OLLAMA_HOST", "OLLAMA_NOHISTORY")
    bare = ("--think", "--truncate")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        given = [f"{arg}=true" if arg in self.bare else arg for arg in args[:end]]
        return super().parse_args(ctx, given + args[end:])


class Group(click.Group):
    """Finds commands by alias, too, and shows them in the order they were made."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aliases: dict[str, str] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.ClickException(f'unknown command "{args[0]}" for "{PROGRAM}"')
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f'\nUse "{PROGRAM} [command] --help" for more information about a command.\n')


def arguments(metavar: str, least: int, most: int | None = None) -> Callable[[_F], _F]:
    """The words of a command, as `words`: from `least` to `most` of them."""

    def check(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
        if least <= len(words) and (most is None or len(words) <= most):
            return words
        if least == most:
            raise click.ClickException(f"accepts {least} arg(s), received {len(words)}")
        if len(words) < least:
            raise click.ClickException(f"requires at least {least} arg(s), only received {len(words)}")
        raise click.ClickException(f"accepts at most {most} arg(s), received {len(words)}")

    return click.argument("words", nargs=-1, metavar=metavar, callback=check)


def invoke(command: click.Command, args: Sequence[str]) -> int:
    """Runs a command line and returns the exit status; errors go to stderr as `Error: ...`."""
    try:
        status = command.main(args=list(args), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.NoSuchOption as error:
        return _fail(f"unknown flag: {error.option_name}")
    except click.ClickException as error:
        return _fail(error.format_message())
    except OllamapyError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # `ollamapy list | head -1`; what is still buffered must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(text: str) -> int:
    print(f"Error: {text}", file=sys.stderr)
    return 1
