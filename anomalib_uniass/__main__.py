# SPDX-License-Identifier: Apache-2.0
"""anomalib's own command line with this plugin loaded, for environments where the start-up hook is off.

``anomalib-uniass train ...`` and ``python -m anomalib_uniass train ...`` take the arguments of ``anomalib train ...``.
``benchmark`` builds all entries of its file before it trains the first; ``calibrate`` and ``validate-export`` are our
own (:mod:`anomalib_uniass.cli`). Importing this module imports the package, which registers its classes.
"""

import argparse
import sys
from difflib import get_close_matches

from anomalib.cli import cli
from anomalib.cli.pipelines import pipeline_subcommands

from anomalib_uniass.cli import calibrate, validate_export
from anomalib_uniass.cli.benchmark import check_entries

COMMANDS = {
    "calibrate": "Take the thresholds of a trained model anew: from other good images, or for other rates.",
    "validate-export": "Compare exported models with their checkpoint on labelled images: may they be deployed?",
    "benchmark": "Compare models as anomalib's command does, after building every entry of the file once.",
}
"""Commands of this package, and what they do."""

OWN = {"calibrate": calibrate.main, "validate-export": validate_export.main}
"""Those that anomalib does not have: each takes its arguments and returns the exit code."""


def main() -> None:
    """Run anomalib's command line.

    Raises:
        SystemExit: If there is no such command, if an entry of a benchmark's file cannot be built, at the end of
            one of our own, or for anomalib's reasons.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(own_help())
        sys.argv[1:2] = ["--help"]
    elif not command.startswith("-"):
        check_command(command)
    if command in OWN:
        sys.exit(OWN[command](sys.argv[2:]))
    if command == "benchmark":
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--config")
        config = parser.parse_known_args(sys.argv[2:])[0].config
        if config is not None:  # anomalib says what is missing
            try:
                check_entries(config)
            except (OSError, ValueError) as error:
                sys.exit(str(error))
    cli.main()


def own_help() -> str:
    """Return the commands of this package, a line each; anomalib's help follows."""
    lines = [f"  {name:<18}{words}" for name, words in COMMANDS.items()]
    return "\n".join(
        [
            "anomalib-uniass: the command line of anomalib with UniAS, UniAD and datamodules that join all categories.",
            "",
            "Commands of its own (each with --help):",
            *lines,
            "",
            "All others are anomalib's:",
            "",
        ]
    )


def check_command(command: str) -> None:
    """Refuse a command that there is not.

    Raises:
        SystemExit: With code 2, after a line that names the commands there are.
    """
    anomalib = cli.AnomalibCLI
    known = [
        *COMMANDS,
        "install",
        *anomalib.anomalib_subcommands(),
        *anomalib.subcommands(),
        *(name for name in pipeline_subcommands() if name not in COMMANDS),
    ]
    if command not in known:
        near = get_close_matches(command, known, n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        print(f"anomalib-uniass has no command {command!r}.{guess} It has: {', '.join(known)}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
