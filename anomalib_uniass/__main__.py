# SPDX-License-Identifier: Apache-2.0
"""anomalib's own command line with this plugin loaded, for environments where the start-up hook is off.

``anomalib-uniass train ...`` and ``python -m anomalib_uniass train ...`` take the arguments of ``anomalib train ...``.
``benchmark`` builds all entries of its file before it trains the first, and ``validate-export`` compares exported
models with their checkpoint (:mod:`anomalib_uniass.validate_export`). Importing this module imports the package,
which registers its classes.
"""

import argparse
import sys

from anomalib.cli import cli

from anomalib_uniass import validate_export
from anomalib_uniass.benchmark import check_entries


def main() -> None:
    """Run anomalib's command line.

    Raises:
        SystemExit: If an entry of a benchmark's file cannot be built, at the end of ``validate-export``, or for
            anomalib's reasons.
    """
    if sys.argv[1:2] == ["validate-export"]:
        sys.exit(validate_export.main(sys.argv[2:]))
    if sys.argv[1:2] == ["benchmark"]:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--config")
        config = parser.parse_known_args(sys.argv[2:])[0].config
        if config is not None:  # anomalib says what is missing
            try:
                check_entries(config)
            except (OSError, ValueError) as error:
                sys.exit(str(error))
    cli.main()


if __name__ == "__main__":
    main()
