# SPDX-License-Identifier: Apache-2.0
"""Sphinx builds README, these pages and those of the API: `make docs`. The source folder is the project's."""

from importlib.metadata import version as installed

project = "anomalib-uniass"
author = "The anomalib-uniass authors"
project_copyright = f"2026, {author}"
version = release = installed("anomalib-uniass")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "MODEL_CARD.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md"]
include_patterns += ["benchmarks/README.md", "benchmarks/results/*.md"]
exclude_patterns = [".venv"]
html_theme = "furo"
myst_heading_anchors = 3
suppress_warnings = ["toc.not_included"]  # results are reached from the pages that cite them

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
