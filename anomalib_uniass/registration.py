# SPDX-License-Identifier: Apache-2.0
"""Makes the plugin's classes known to anomalib under their short names.

The only module that knows anomalib's registries. anomalib 2.7 resolves names in four ways:

* CLI and YAML (``--model UniAS``, ``class_path: MVTec``): subclasses of ``AnomalibModule`` and ``AnomalibDataModule``
  that have been imported, so importing :mod:`anomalib_uniass` is enough;
* ``get_model("unias")`` and ``list_models()``: direct subclasses of ``AnomalibModule``, likewise;
* ``get_model({"class_path": ...})``, also used by ``anomalib benchmark``: attributes of :mod:`anomalib.models`, or of a
  package named in ``anomalib.models.ALLOWED_MODULES``;
* ``get_datamodule({"class_path": ...})``: attributes of :mod:`anomalib.data`.
"""

import sys
from importlib import import_module
from types import ModuleType

PLUGIN = "anomalib_uniass"
MODELS = ("UniAS", "UniAD", "BoundedPatchcore")
# Kept equal to _anomalib_uniass_autoload.DATAMODULES by a test.
DATAMODULES = ("MVTec", "VisA", "Unified")


def register() -> None:
    """Register every model and datamodule of the plugin with anomalib.

    Calling it again changes nothing, and a name that anomalib ships itself is left alone. It is called at the end of
    ``import anomalib_uniass``, which may happen while ``anomalib.models`` is about to finish its own import.
    """
    plugin = sys.modules[PLUGIN]
    # Not `import anomalib.models`: the attribute of the parent package is bound only when that import has finished.
    models = import_module("anomalib.models")
    _offer(plugin, MODELS, models)
    _offer(plugin, DATAMODULES, import_module("anomalib.data"))
    models.ALLOWED_MODULES.add(PLUGIN)


def _offer(plugin: ModuleType, names: tuple[str, ...], registry: ModuleType) -> None:
    """Set the plugin's classes as attributes of ``registry`` where it has none of that name."""
    for name in names:
        if name not in vars(registry):
            setattr(registry, name, getattr(plugin, name))
