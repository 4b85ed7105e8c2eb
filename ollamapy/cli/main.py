"""The `ollamapy` command: every subcommand and its flags. Starts fast: a command imports what it needs when it runs."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ollamapy import __version__, env
from ollamapy.cli.command import PROGRAM, Command, Group, RunCommand, arguments, invoke
from ollamapy.errors import BadRequest, NotFound, NotSupported, Unreachable

if TYPE_CHECKING:
    from ollamapy.api.client import Client

_PARTS = ("license", "modelfile", "parameters", "system", "template")


def main() -> NoReturn:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale that cannot show a character
    sys.exit(invoke(cli, sys.argv[1:]))


def connect(settings: env.Settings | None = None) -> Client:
    """A client of the server at OLLAMA_HOST; nothing is sent yet."""
    from ollamapy.api.address import Address
    from ollamapy.api.client import Client

    settings = settings or env.load()
    return Client(Address.parse(settings.host), settings.api_key)


def _print_version(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """The server's version, and the client's where it is another."""
    if not asked:
        return
    server = ""
    try:
        with connect() as client:
            server = client.version()
        print(f"{PROGRAM} version is {server}")
    except Unreachable:
        print(f"Warning: could not connect to a running {PROGRAM} instance")
    if server != __version__:
        print(f"Warning: client version is {__version__}")
    ctx.exit()


@click.group(
    cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("-v", "--version", is_flag=True, expose_value=False, callback=_print_version, help="Show version information")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run large language models on this machine."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


_OF_CLIENTS = ("OLLAMA_API_KEY", "OLLAMA_EDITOR", "OLLAMA_NOHISTORY")


class _Serve(Command):
    environment = tuple(name for name in env.Settings().describe() if name not in _OF_CLIENTS)


@cli.command(cls=_Serve)
@click.option("--precise", is_flag=True, help="Compute to the precision of float32 (OLLAMAPY_PRECISE)")
def serve(precise: bool) -> int:
    """Start the server (also: start)"""
    from ollamapy.server.start import start

    settings = env.load()
    return start(replace(settings, precise=precise or settings.precise))


@cli.command()
@arguments("MODEL", 1, 1)
@click.option("-f", "--file", default="", help='Name of the Modelfile (default "Modelfile"; - is stdin)')
@click.option("-q", "--quantize", default="", help="Quantize the model to this level (e.g. q4_K_M)")
@click.option("--draft-quantize", default="", help="Quantize the draft model to this level")
@click.option("--experimental", is_flag=True, help="Import safetensors on this side (not supported yet)")
def create(words: tuple[str, ...], file: str, quantize: str, draft_quantize: str, experimental: bool) -> None:
    """Create a model from a Modelfile"""
    from ollamapy.cli.create import create, read_modelfile
    from ollamapy.names import ModelName

    if experimental:
        raise NotSupported("create --experimental: not supported yet")
    ModelName.parse(words[0])
    source, base = read_modelfile(file)
    with connect() as client:
        create(client, words[0], source, base, quantize, draft_quantize)


@cli.command()
@arguments("MODEL", 1, 1)
@click.option("--license", is_flag=True, help="Show license of a model")
@click.option("--modelfile", is_flag=True, help="Show Modelfile of a model")
@click.option("--parameters", is_flag=True, help="Show parameters of a model")
@click.option("--system", is_flag=True, help="Show system message of a model")
@click.option("--template", is_flag=True, help="Show template of a model")
@click.option("-v", "--verbose", is_flag=True, help="Show detailed model information")
def show(words: tuple[str, ...], verbose: bool, **parts: bool) -> None:
    """Show information for a model"""
    from ollamapy.api.types import ModelRequest
    from ollamapy.cli.show import one, summary

    chosen = [part for part in _PARTS if parts[part]]
    if len(chosen) > 1:
        names = ", ".join(f"'--{part}'" for part in _PARTS[:-1])
        raise BadRequest(f"only one of {names}, or '--{_PARTS[-1]}' can be specified")
    with connect() as client:
        info = client.show(ModelRequest(model=words[0], verbose=verbose))
    print(one(info, chosen[0]) if chosen else summary(info, verbose=verbose), end="\n" if chosen else "")


@cli.command(cls=RunCommand)
@arguments("MODEL [PROMPT]", 1)
@click.option("--keepalive", default="", metavar="DURATION", help="How long the model stays loaded (e.g. 5m)")
@click.option("--verbose", is_flag=True, help="Show timings for response")
@click.option("--insecure", is_flag=True, help="Accepted; for registries without TLS")
@click.option("--nowordwrap", is_flag=True, help="Don't wrap words to the next line automatically")
@click.option("--format", default="", help="Response format (json, or a JSON schema)")
@click.option("--think", default=None, metavar="[=LEVEL]", help="Thinking: true, false, low, medium, high or max")
@click.option("--hidethinking", is_flag=True, help="Hide thinking output (if provided)")
@click.option("--precise", is_flag=True, help="Compute to the precision of float32")
@click.option("--truncate", default=None, type=bool, metavar="[=BOOL]", help="Cut input that is too long (embedding models)")
@click.option("--dimensions", default=0, metavar="N", help="Cut embeddings to this size (embedding models)")
def run(words: tuple[str, ...], **flags: Any) -> None:
    """Run a model

    What is piped in stands before the prompt. Without either, a conversation begins.
    """
    from ollamapy.cli import run
    from ollamapy.cli.session import Session, parse_think

    session = Session(
        words[0],
        keep_alive=run.parse_keep_alive(flags["keepalive"]),
        format=run.parse_format(flags["format"]),
        think=None if flags["think"] is None else parse_think(flags["think"]),
        word_wrap=not flags["nowordwrap"] and run.on_terminal(),
        verbose=flags["verbose"],
        hide_thinking=flags["hidethinking"],
        options={"precise": True} if flags["precise"] else {},
    )
    settings, embed = env.load(), run.EmbedFlags(flags["truncate"], flags["dimensions"])
    with connect(settings) as client:
        run.run(client, settings, session, [*run.piped_input(), *words[1:]], embed)


@cli.command()
@arguments("MODEL", 1, 1)
def stop(words: tuple[str, ...]) -> None:
    """Stop a running model"""
    with connect() as client:
        try:
            client.load(words[0], keep_alive=0)
        except NotFound:
            raise NotFound(f'couldn\'t find model "{words[0]}" to stop') from None


@cli.command("list")
@arguments("[PREFIX]", 0, 1)
def list_models(words: tuple[str, ...]) -> None:
    """List models (also: ls)"""
    from ollamapy.cli.listing import listing

    with connect() as client:
        print(listing(client.tags(), *words))


@cli.command()
@arguments("[PREFIX]", 0, 1)
@click.option("--verbose", is_flag=True, help="Show what each engine is and does")
def ps(words: tuple[str, ...], verbose: bool) -> None:
    """List running models"""
    from ollamapy.cli.listing import running

    with connect() as client:
        print(running(client.ps(verbose=verbose), *words, verbose=verbose))


@cli.command()
@arguments("SOURCE DESTINATION", 2, 2)
def cp(words: tuple[str, ...]) -> None:
    """Copy a model"""
    with connect() as client:
        client.copy(*words)
    print(f"copied '{words[0]}' to '{words[1]}'")


@cli.command()
@arguments("MODEL [MODEL...]", 1)
def rm(words: tuple[str, ...]) -> None:
    """Remove a model"""
    with connect() as client:
        for name in words:
            with suppress(NotFound):  # the deletion will say it
                client.load(name, keep_alive=0)  # its engine, if there is one, ends first
            client.delete(name)
            print(f"deleted '{name}'")


class _QuickStart(RunCommand):
    environment = ("OLLAMA_HOST", "OLLAMA_MODELS")


@cli.command(cls=_QuickStart)
@arguments("[PROMPT]", 0)
@click.option("--verbose", is_flag=True, help="Show timings for response")
def quickstart(words: tuple[str, ...], verbose: bool) -> None:
    """Start the server and a small model, and run it"""
    from ollamapy.cli import run
    from ollamapy.cli.quickstart import MODEL, prepare
    from ollamapy.cli.session import Session

    settings = env.load()
    with connect(settings) as client:
        prepare(client, settings)
        run.run(client, settings, Session(MODEL, verbose=verbose), words, run.EmbedFlags())


@cli.command("help")
@arguments("[COMMAND]", 0, 1)
@click.pass_context
def show_help(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Help about any command"""
    parent = ctx.parent
    assert parent is not None
    command = cli.get_command(parent, words[0]) if words else cli
    if command is None:
        raise click.ClickException(f'unknown command "{words[0]}" for "{PROGRAM}"')
    click.echo(command.get_help(click.Context(command, parent, words[0]) if words else parent))


def _unbuilt(name: str, summary: str, *, hidden: bool = False) -> None:
    """A command of Ollama's that is not built yet says so, whatever follows it."""

    @cli.command(name, help=f"{summary} (not supported yet)", hidden=hidden, context_settings={"ignore_unknown_options": True})
    @arguments("[ARGUMENTS]", 0)
    def refuse(words: tuple[str, ...]) -> None:
        raise NotSupported(f"{name}: not supported yet")


_unbuilt("pull", "Pull a model from a registry")
_unbuilt("push", "Push a model to a registry")
_unbuilt("signin", "Sign in to ollama.com")
_unbuilt("signout", "Sign out from ollama.com")
_unbuilt("launch", "Launch an integration")
cli.aliases = {"start": "serve", "ls": "list", "login": "signin", "logout": "signout"}
