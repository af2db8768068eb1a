"""The command `baton`. Flags are the settings of shared/settings.py; what a command does is its own module's."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from deploy.listening import bind, raise_file_limit
from shared import log, settings, threads
from shared.errors import BrokenEnvironment
from shared.settings import API_ONLY, SERVE_ONLY, WORKER_ONLY, Settings

EXIT_BROKEN = 2                                         # the environment is at fault: starting again won't help

EVERY = frozenset(Settings.model_fields) - {"model"}
FLAGS = {
    "serve": EVERY,
    "api": EVERY - WORKER_ONLY - SERVE_ONLY,
    "worker": EVERY - API_ONLY - SERVE_ONLY,
}


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except BrokenEnvironment as error:
        print(f"baton: {error}", file=sys.stderr)
        return EXIT_BROKEN
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton", description="OpenAI-compatible chat whose streams cannot be lost.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, "serve", _serve, "Redis, API and workers on this machine", takes_model=True)
    api = _command(commands, "api", _api, "one API pod")
    api.add_argument("--fd", type=int, help=argparse.SUPPRESS)      # a socket that `baton serve` listens on
    _command(commands, "worker", _worker, "one worker", takes_model=True)
    jobs = commands.add_parser("jobs", help="what is queued, what runs where, and the dead letters",
                               description="Lists jobs, or does something about one.")
    jobs.add_argument("action", nargs="?", default="list", choices=("list", "show", "cancel", "requeue", "dead"))
    jobs.add_argument("job_id", nargs="?", default="", metavar="ID", help="a completion id")
    _add_flags(jobs, ("redis_url",))
    jobs.set_defaults(run=_jobs)
    chat = commands.add_parser("chat", help="chat in the terminal", description="Chat in the terminal.")
    chat.add_argument("--url", default="http://127.0.0.1:30000", help="where the API is (%(default)s)")
    chat.add_argument("--model", help="name of a model; the first of /v1/models otherwise")
    chat.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "EMPTY"), help="OPENAI_API_KEY otherwise")
    chat.set_defaults(run=_chat)
    return parser


def _command(commands: Any, name: str, run: Any, text: str, *, takes_model: bool = False) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.",
        epilog="Each flag is a variable too: --max-num-seqs is BATON_MAX_NUM_SEQS.")
    if takes_model:
        command.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
                             help=Settings.model_fields["model"].description)
    _add_flags(command, (field for field in Settings.model_fields if field in FLAGS[name]))
    command.set_defaults(run=run)
    return command


def _add_flags(command: argparse.ArgumentParser, names: Iterable[str]) -> None:
    for name in names:
        field = Settings.model_fields[name]
        shape: dict[str, Any] = {"metavar": name.rpartition("_")[2].upper()}
        if field.annotation is bool:
            shape = {"action": argparse.BooleanOptionalAction}
        elif isinstance(field.default, tuple):
            shape["nargs"] = "+"
        elif choices := [choice for choice in get_args(field.annotation) if isinstance(choice, str)]:
            shape = {"choices": choices}
        default = "" if field.default in ((), "", None) else f" ({field.default})"
        command.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                             help=f"{field.description}{default}", **shape)


def _settings(args: argparse.Namespace) -> Settings:
    return settings.load({name: value for name, value in vars(args).items() if name in Settings.model_fields})


def _refuse_model_among_keys(args: argparse.Namespace) -> None:
    """A flag that takes several words takes a MODEL behind it as well. Raises BrokenEnvironment."""
    _, *others = getattr(args, "api_key", [""])
    if not hasattr(args, "model") and any("/" in key for key in others):
        raise BrokenEnvironment("a word behind --api-key looks like a model: put MODEL before the flags, "
                                "or separate keys with commas")


def _serve(args: argparse.Namespace) -> int:
    from deploy.local import serve

    _refuse_model_among_keys(args)
    return serve(_settings(args))


def _api(args: argparse.Namespace) -> None:
    import uvloop

    from api.server import serve

    read = _settings(args)
    log.configure("api", read.log_level)
    raise_file_limit()
    with socket.socket(fileno=args.fd) if args.fd is not None else bind(read.host, read.port) as listening:
        uvloop.run(serve(read, listening))


def _worker(args: argparse.Namespace) -> int:
    read = _settings(args)
    log.configure("worker", read.log_level)
    threads.spin_briefly()                              # before torch is loaded
    from worker.model.folder import ModelRefused
    from worker.serve import serve

    try:
        return asyncio.run(serve(read))
    except ModelRefused as error:
        raise BrokenEnvironment(str(error)) from None


def _jobs(args: argparse.Namespace) -> None:
    from deploy.jobs import run

    asyncio.run(run(_settings(args), args.action, args.job_id))


def _chat(args: argparse.Namespace) -> None:
    from deploy.chat import chat

    chat(args.url, args.model, args.api_key)


if __name__ == "__main__":
    sys.exit(main())
