# SPDX-License-Identifier: Apache-2.0
"""Pages in one file each, that need no network and no JavaScript."""

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from anomalib_uniass.files import replace_text

PICTURE_BYTES = 7_000_000
"""Bytes of all pictures of a page, of which a hundred categories make one, too."""

HEADINGS = {
    "misses": "Worst misses: defective images of the lowest scores",
    "false alarms": "Worst false alarms: good images of the highest scores",
    "hits": "Surest hits: defective images of the highest scores",
}

PACKAGES = ("anomalib-uniass", "anomalib", "torch", "lightning", "timm", "openvino")


def write_page(path: Path, template: str, **content: Any) -> None:
    """Write a page in one step.

    Args:
        path: File to write, in a folder that exists.
        template: Name of its template, such as ``test``.
        content: What the template shows; text is escaped there.

    Raises:
        OSError: If the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("anomalib_uniass.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    replace_text(path, environment.get_template(f"{template}.html.j2").render(content))


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def worst_first(pixel_ap: Mapping[str, float | None]) -> list[str]:
    """Return categories by their pixel AP, the lowest first and unknown ones last: pictures go to these first."""
    return sorted(pixel_ap, key=lambda name: math.inf if (value := pixel_ap[name]) is None or value != value else value)
