"""Commands: what runs here (doctor), is it right here (verify), and how fast is it on your model (bench)."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from fused_adamp.backends import ENVIRONMENT, check_name
from fused_adamp.commands import RefusedError
from fused_adamp.commands.bench import bench
from fused_adamp.commands.doctor import doctor
from fused_adamp.commands.verify import verify

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """An error is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fused_adamp", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="{doctor,verify,bench}", parser_class=_Parser)

    def add(name: str, meaning: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)

    command = add("doctor", "versions, devices, which backend runs here and why the others do not")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.set_defaults(run=lambda given: doctor(as_json=given.json))

    command = add("verify", "compares every backend with the reference; exit code 1 on a wrong number")
    extent = command.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="cases from all over the table, under 30 s (the default)")
    extent.add_argument("--full", action="store_true", help="every case; says how long it will take")
    command.set_defaults(run=lambda given: verify(full=given.full))

    command = add("bench", "times steps on your model against torch's optimizer, in turns in one process")
    command.add_argument(
        "model", metavar="module:function", help="a function without arguments that returns the model or its parameters"
    )
    command.add_argument("--optimizer", choices=("adamp", "sgdp"), default="adamp", help="default adamp")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of the optimizer, such as weight_decay=0.01 or max_grad_norm=1.0; may be repeated",
    )
    command.add_argument("--device", default="cpu", help="where the model is moved; default cpu")
    command.add_argument("--rounds", type=_positive, default=30, help="steps of each optimizer; default 30")
    command.add_argument("--plot", metavar="FILE", help="write the chart to an image, by matplotlib")
    command.set_defaults(
        run=lambda given: bench(
            given.model, given.optimizer, given.set, device=given.device, rounds=given.rounds, plot=given.plot
        )
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _check_environment() -> None:
    if forced := os.environ.get(ENVIRONMENT):
        try:
            check_name(forced, f"the environment variable {ENVIRONMENT}")
        except ValueError as error:
            raise RefusedError(error) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code; 2 is a mistake of the caller's, 130 an interruption."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        _check_environment()
        status: int = given.run(given)
        sys.stdout.flush()
    except RefusedError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
