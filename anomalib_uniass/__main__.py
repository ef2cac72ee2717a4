# SPDX-License-Identifier: Apache-2.0
"""anomalib's own command line with this plugin loaded, for environments where the start-up hook is off.

``anomalib-uniass train ...`` and ``python -m anomalib_uniass train ...`` take the arguments of ``anomalib train ...``.
Importing this module imports the package, which registers its classes.
"""

from anomalib.cli.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
