# SPDX-License-Identifier: Apache-2.0
"""Start-up hook that lets the stock ``anomalib`` command know UniAS and its datamodules by their short names.

anomalib has no plugin mechanism: it finds short names only among classes that something has imported. So
``anomalib_uniass.pth`` (``anomalib_uniass.start`` from Python 3.15 on, PEP 829) calls :func:`install` when Python
starts. That adds a finder to ``sys.meta_path`` which does nothing until the program itself imports anomalib:

* once ``anomalib.models`` is executed, ``anomalib_uniass`` is imported, which registers itself;
* ``anomalib.data`` gets a ``__getattr__`` that imports ``anomalib_uniass`` when one of its datamodules is asked for.

A plugin that cannot be loaded costs one warning and leaves anomalib as it is. ``ANOMALIB_UNIASS_AUTOLOAD=0`` in the
environment switches the hook off; full class paths (``--model anomalib_uniass.UniAS``) never need it.

Every Python of the environment runs this file, hence it imports nothing but ``sys`` before anomalib is imported.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Kept equal to anomalib_uniass.registration.DATAMODULES by a test; that module is too heavy to import here.
DATAMODULES = ("MVTec", "VisA", "Unified")

_plugin_failed = False


def install() -> None:
    """Add the finder to ``sys.meta_path``, once, unless ``ANOMALIB_UNIASS_AUTOLOAD`` is ``0``."""
    import os  # site has imported it already

    installed = any(type(finder).__module__ == __name__ for finder in sys.meta_path)
    if not installed and os.environ.get("ANOMALIB_UNIASS_AUTOLOAD") != "0":
        sys.meta_path.insert(0, _AnomalibFinder())


class _AnomalibFinder:
    """Finds ``anomalib.models`` and ``anomalib.data`` through the other finders, adds a step after their execution."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        after_exec = _AFTER_EXEC.get(name)
        # Another import hook may ask all finders in turn, this one included: answer only the outermost search.
        if after_exec is None or name in self._searching:
            return None
        self._searching.add(name)
        try:
            others = [finder for finder in sys.meta_path if finder is not self]
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _NotifyingLoader(spec.loader, after_exec)  # type: ignore[assignment]
        return spec


class _NotifyingLoader:
    """Stands in for a module's own loader until the module is executed, then runs ``after_exec(module)``."""

    def __init__(self, loader: "Loader", after_exec: "Callable[[ModuleType], None]") -> None:
        self._loader = loader
        self._after_exec = after_exec

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._after_exec(module)


def _after_models(_: "ModuleType") -> None:
    _load_plugin()


def _after_data(data: "ModuleType") -> None:
    shipped = vars(data).get("__getattr__")
    if getattr(shipped, "__module__", None) == __name__:  # importlib.reload keeps a module's attributes
        return

    def __getattr__(name: str) -> object:  # noqa: N807
        if shipped is not None:
            try:
                return shipped(name)  # what anomalib ships goes first
            except AttributeError:
                pass
        if name in DATAMODULES:
            _load_plugin()
        if name in vars(data):
            return vars(data)[name]
        msg = f"module {data.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    vars(data)["__getattr__"] = __getattr__


_AFTER_EXEC: "dict[str, Callable[[ModuleType], None]]" = {
    "anomalib.models": _after_models,
    "anomalib.data": _after_data,
}


def _load_plugin() -> None:
    """Import and register ``anomalib_uniass``; on failure warn once and never try again."""
    global _plugin_failed
    if _plugin_failed:
        return
    try:
        plugin = __import__("anomalib_uniass")
        # Absent while the plugin itself is importing anomalib: then it registers at the end of its own import.
        # A second call, after importlib.reload(anomalib.models), restores what the reload dropped.
        register = getattr(plugin, "register", None)
        if register is not None:
            register()
    except Exception as error:  # whatever is wrong with the plugin, anomalib must keep working
        _plugin_failed = True
        import warnings

        warnings.warn(
            f"anomalib-uniass could not be loaded and is disabled: {type(error).__name__}: {error}. anomalib itself is "
            "not affected. Repair it (`python -c 'import anomalib_uniass'` shows the full error), uninstall it "
            "(`pip uninstall anomalib-uniass`) or set ANOMALIB_UNIASS_AUTOLOAD=0 to silence this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
