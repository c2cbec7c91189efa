"""The `everstep` command. Each command imports what it runs only when it runs, so that `--help` answers at once."""

import enum
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from everstep import __version__
from everstep.config import LIGHTHOUSE_PORT, LighthouseSettings, job_token
from everstep.errors import ConfigError, LighthouseRefused, LighthouseUnreachable
from everstep.exit_codes import ExitCode
from everstep.logs import configure_logging


class LogFormatOption(str, enum.Enum):
    """typer takes no Literal before 0.19."""

    TEXT = "text"
    JSON = "json"


app = typer.Typer(
    name="everstep",
    help="Keeps PyTorch training jobs stepping while machines under them fail.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: a ConfigError is one line for the operator, not a traceback."""
    try:
        if sys.argv[1:2] == ["run"]:
            _run(sys.argv[2:])  # typer would take a tenth of a second to find out that nothing of it is its own
        app()
    except ConfigError as error:
        typer.echo(f"everstep: {error}", err=True)
        sys.exit(ExitCode.CONFIGURATION)
    except LighthouseUnreachable as error:
        typer.echo(f"everstep: {error}", err=True)
        sys.exit(ExitCode.LIGHTHOUSE_UNREACHABLE)
    except LighthouseRefused as error:
        typer.echo(f"everstep: {error}", err=True)
        sys.exit(ExitCode.DO_NOT_RESTART)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"everstep {__version__}")
        raise typer.Exit


@app.callback()
def everstep(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def lighthouse(
    port: Annotated[int, typer.Option(help="TCP port; 0 takes any free one.")] = LIGHTHOUSE_PORT,
    bind: Annotated[str, typer.Option(help="Address to listen on; beyond loopback a token is required.")] = "127.0.0.1",
    min_replicas: Annotated[int, typer.Option(help="Commit no step with fewer replica groups.")] = 1,
    join_timeout: Annotated[float, typer.Option(help="Seconds to wait for groups that do not come or answer.")] = 10.0,
    heartbeat_timeout: Annotated[float, typer.Option(help="Seconds of silence that make a member suspect.")] = 2.0,
    state_dir: Annotated[Path | None, typer.Option(help="Where to remember jobs over a restart.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File of the job token, mode 0600.")] = None,
    stuck_timeout: Annotated[
        float | None, typer.Option(help="Seconds that one group may hold all others up; learned by default.")
    ] = None,
    crash_loop_limit: Annotated[
        int, typer.Option(help="Hold, and then leave out a group that died so often in a row at one place; 0: never.")
    ] = 8,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of the certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    job: Annotated[list[str] | None, typer.Option(help="Serve only this job; may be repeated.")] = None,
    log_format: Annotated[LogFormatOption, typer.Option(help="Of the log, on stderr.")] = LogFormatOption.TEXT,
) -> None:
    """Serve the links of training jobs; SIGTERM or SIGINT ends it."""
    settings = LighthouseSettings(
        bind=bind,
        port=port,
        min_replicas=min_replicas,
        join_timeout_s=join_timeout,
        heartbeat_timeout_s=heartbeat_timeout,
        stuck_timeout_s=stuck_timeout,
        crash_loop_limit=crash_loop_limit,
        state_dir=state_dir,
        token=job_token(token_file=token_file),
        tls_cert=tls_cert,
        tls_key=tls_key,
        jobs=tuple(job or ()),
    )
    from everstep.lighthouse.app import Lighthouse, serve

    configure_logging(log_format.value)

    def announce(ready: Lighthouse) -> None:
        typer.echo(f"everstep lighthouse listening on {ready.address}")

    serve(settings, announce)


class Verbatim(typer.core.TyperCommand):
    """Its arguments are not typer's to read: they are torchrun's, and the script's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return list(args)


@app.command(cls=Verbatim, add_help_option=False)
def run(context: typer.Context) -> None:
    """Start the workers of a job and keep them running; takes every option of torchrun."""
    _run(context.args)


def _run(arguments: list[str]) -> NoReturn:
    from everstep.launcher import command

    configure_logging("text")
    sys.exit(command.run(arguments, os.environ))


config_app = typer.Typer(help="What `everstep run` would be told.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@config_app.command(cls=Verbatim, add_help_option=False)
def show(context: typer.Context) -> None:
    """Print every option of a command line of `everstep run`; --origin: and where it was said."""
    from everstep.launcher import command

    command.show(context.args, os.environ)


@config_app.command(cls=Verbatim, add_help_option=False)
def explain(context: typer.Context) -> None:
    """KEY: say what an option of `everstep run`, or a key of a fault_tolerance section, is and what becomes of it."""
    from everstep.launcher import command

    command.explain(context.args)


LighthouseOption = Annotated[str | None, typer.Option(help="host:port; EVERSTEP_LIGHTHOUSE by default.")]
JobOption = Annotated[str | None, typer.Option(help="Which job; EVERSTEP_JOB_ID, else `default`.")]
TokenOption = Annotated[Path | None, typer.Option(help="File of the job token, mode 0600.")]


@app.command()
def events(
    lighthouse: LighthouseOption = None,
    job: JobOption = None,
    token_file: TokenOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens from now on.")] = False,
    after: Annotated[str, typer.Option(help="A cursor to go on from; `oldest`: all that is kept.")] = "oldest",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with everything.")] = False,
) -> None:
    """Show what happened in a job: who joined, failed and left, and every quorum."""
    import msgspec

    from everstep.subscribe import line, subscribe_events

    subscription = subscribe_events(
        lighthouse=lighthouse, job_id=job, token_file=token_file, after=after, follow=follow, connect_timeout_s=10.0
    )
    with subscription:
        try:
            for event in subscription:
                typer.echo(msgspec.json.encode(event).decode() if as_json else line(event))
                sys.stdout.flush()
        except KeyboardInterrupt:
            return


@app.command()
def drain(
    group: Annotated[str, typer.Argument(help="The replica group's id, as in REPLICA_GROUP_ID.")],
    lighthouse: LighthouseOption = None,
    job: JobOption = None,
    token_file: TokenOption = None,
) -> None:
    """Let a group leave its job at a step boundary; no step fails anywhere."""
    from everstep.link.operate import drain_group
    from everstep.subscribe import target

    typer.echo(drain_group(target(lighthouse=lighthouse, job_id=job, token_file=token_file), group))


@app.command()
def admit(
    group: Annotated[str, typer.Argument(help="The replica group's id, as in REPLICA_GROUP_ID.")],
    lighthouse: LighthouseOption = None,
    job: JobOption = None,
    token_file: TokenOption = None,
) -> None:
    """Let a group in that is held or left out for dying again and again."""
    from everstep.link.operate import admit_group
    from everstep.subscribe import target

    typer.echo(admit_group(target(lighthouse=lighthouse, job_id=job, token_file=token_file), group))


nodes_app = typer.Typer(help="Show the nodes that scripts have excluded from a job, and why; let them in again.")
app.add_typer(nodes_app, name="nodes")


@nodes_app.callback(invoke_without_command=True)
def nodes(
    context: typer.Context,
    lighthouse: LighthouseOption = None,
    job: JobOption = None,
    token_file: TokenOption = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    from everstep.link.operate import job_status
    from everstep.subscribe import target

    excluded = job_status(target(lighthouse=lighthouse, job_id=job, token_file=token_file))["excluded_nodes"]
    for node, reason in excluded.items():
        typer.echo(f"{node}  excluded  ({reason})")
    if not excluded:
        typer.echo("no node is excluded")


@nodes_app.command("admit")
def let_node_in(
    node: Annotated[str, typer.Argument(help="As `everstep nodes` shows it.")],
    lighthouse: LighthouseOption = None,
    job: JobOption = None,
    token_file: TokenOption = None,
) -> None:
    """Let an excluded node join again."""
    from everstep.link.operate import admit_node
    from everstep.subscribe import target

    typer.echo(admit_node(target(lighthouse=lighthouse, job_id=job, token_file=token_file), node))


@app.command()
def new_history(lighthouse: LighthouseOption = None, job: JobOption = None, token_file: TokenOption = None) -> None:
    """Give up the state that a job's groups hold in memory: they end, and those started next begin a new history."""
    from everstep.link.operate import start_new_history
    from everstep.subscribe import target

    typer.echo(start_new_history(target(lighthouse=lighthouse, job_id=job, token_file=token_file)))


@app.command()
def status(
    lighthouse: LighthouseOption = None,
    job: JobOption = None,
    token_file: TokenOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, with everything.")] = False,
) -> None:
    """Show a job's members, and where each group's time went."""
    import json

    from rich.console import Console

    from everstep.link.operate import job_status
    from everstep.status import ledger_table, members_table
    from everstep.subscribe import target

    found = job_status(target(lighthouse=lighthouse, job_id=job, token_file=token_file))
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    console.print(members_table(found))
    console.print(ledger_table(found["ledger"]))


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one last JSON line.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the instant of the kill; random by default.")] = None,
) -> None:
    """Train a small GPT in 3 replica groups here, kill one, and see it come back."""
    import dataclasses
    import json
    import random

    from rich.console import Console

    from everstep.demo.display import Display
    from everstep.demo.run import Demo, DemoFailed, describe
    from everstep.status import ledger_table

    console = Console(stderr=as_json)
    try:
        with Display(console) as display:
            summary = Demo(display, os.environ, random.Random(seed)).run()
    except DemoFailed as error:
        typer.echo(f"everstep: {error}", err=True)
        raise typer.Exit(1) from error
    console.print(describe(summary), highlight=False, soft_wrap=True)
    console.print(ledger_table(summary.ledger))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary)))
    if not summary.replicas_identical:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
