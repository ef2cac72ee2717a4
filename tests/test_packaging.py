# SPDX-License-Identifier: Apache-2.0
"""What is installed, who may import whom, and the start-up hook tried on stand-ins for anomalib and the plugin."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from venv import EnvBuilder

import pytest

ROOT = Path(__file__).resolve().parents[1]
AUTOLOAD = ROOT / "autoload"
PACKAGE = ROOT / "anomalib_uniass"
INSTALLED_FILES = ("_anomalib_uniass_autoload.py", "anomalib_uniass.pth", "anomalib_uniass.start")

# --- The installed package -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize("name", INSTALLED_FILES)
def test_hook_is_installed_as_it_stands_in_the_source(name: str) -> None:
    assert Path(str(distribution("anomalib-uniass").locate_file(name))).read_bytes() == (AUTOLOAD / name).read_bytes()


@pytest.mark.usefixtures("hook")
def test_distribution_owns_its_files() -> None:
    owned = {str(file) for file in distribution("anomalib-uniass").files or ()}
    assert set(INSTALLED_FILES) <= owned
    assert any(name.endswith("licenses/LICENSE") for name in owned)
    scripts = {Path(name).name for name in owned if "/bin/" in name or "Scripts" in name}
    assert "anomalib" not in scripts, "would overwrite anomalib's own command"


def test_package_is_typed() -> None:
    spec = find_spec("anomalib_uniass")
    assert spec is not None
    assert spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").is_file()


def test_one_version_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    declared = re.search(r'^version = "(\S+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert cited is not None
    assert declared is not None
    assert cited[1] == declared[1]
    try:
        assert version("anomalib-uniass") == declared[1]
    except PackageNotFoundError:
        pytest.skip("the source tree is run without installing it")


@pytest.mark.slow
@pytest.mark.parametrize("build", ["build_wheel", "build_editable"])
def test_install_and_uninstall(build: str, tmp_path: Path, run_python: Callable[..., str]) -> None:
    EnvBuilder(symlinks=True).create(tmp_path / "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    (site_packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    wheels = tmp_path / "wheels"
    wheels.mkdir()

    def start() -> str:
        code = "import sys; print([type(finder).__module__ for finder in sys.meta_path])"
        return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    # The build hooks that pip calls; calling them here needs no index.
    run_python("-c", f"import hatchling.build, os; os.chdir({str(ROOT)!r}); hatchling.build.{build}({str(wheels)!r})")
    (wheel,) = wheels.iterdir()
    run_python("-m", "pip", "--python", python, "install", "--no-index", "--no-deps", str(wheel))
    assert start().count("_anomalib_uniass_autoload") == 1
    run_python("-m", "pip", "--python", python, "uninstall", "--yes", "anomalib-uniass")
    assert "_anomalib_uniass_autoload" not in start()
    assert not [path for path in site_packages.glob("*") if path.name != "__pycache__"]


# --- Import directions -----------------------------------------------------------------------------------------------


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the dotted modules and names that a file imports, leaving out blocks under ``if TYPE_CHECKING``."""
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


FILES = sorted(PACKAGE.rglob("*.py"))
OWN = "anomalib_uniass."
PLAIN = ("layers", "models.unias", "models.uniad", "distribution")
# part of the package -> parts of the package that it may import
ALLOWED = {
    "layers": ("layers", "distribution"),  # which imports nothing of ours
    "models.unias.torch_model": PLAIN,
    "models.uniad.torch_model": PLAIN,
    "acceleration": ("acceleration", "layers", "models.unias"),
    "categories": (),
    "thresholds": ("thresholds", "arguments", "categories", "distribution", "logs", "text"),
    "deploy": ("deploy", "categories", "layers", "thresholds", "files", "logs", "metrics", "report", "text"),
    "metrics": ("metrics", "categories", "files", "distribution", "text"),
    "report": ("report", "metrics", "thresholds", "files", "logs", "distribution", "failures", "text"),
    "data": ("data", "categories", "metrics", "report", "files", "logs", "arguments", "results", "text"),
    "training": (  # which knows no model
        "training",
        "acceleration.constants",
        "arguments",
        "categories",
        "data",
        "deploy",
        "distribution",
        "files",
        "layers",
        "logs",
        "metrics",
        "prediction",
        "report",
        "thresholds",
    ),
    "prediction": (
        "prediction",
        "categories",
        "data",
        "thresholds",
        "distribution",
        "files",
        "failures",
        "results",
        "text",
    ),
}


@pytest.mark.parametrize("part", ALLOWED)
def test_import_direction_of_parts(part: str) -> None:
    may_import = [OWN + allowed for allowed in ALLOWED[part]]
    for path in FILES:
        if within(".".join(path.relative_to(PACKAGE).with_suffix("").parts), part):
            wrong = [
                name for name in imports(path) if within(name, "anomalib_uniass") and not within(name, *may_import)
            ]
            assert not wrong, f"{path} imports {wrong}"


BOXES = ("torch_model", "pixel_decoder", "source_embedding", "queries", "decoder", "heads", "loss")
PLAIN_FILES = [
    *(PACKAGE / "models" / "unias" / f"{box}.py" for box in BOXES),
    *(PACKAGE / "models" / "unias" / "detector").glob("[a-oq-z]*.py"),
    PACKAGE / "models" / "unias" / "detector" / "parts.py",  # pseudo-defects, which are drawn on the CPU, see no model
    *(PACKAGE / "models" / "uniad").glob("[a-k]*.py"),
    PACKAGE / "models" / "uniad" / "torch_model.py",
    *(PACKAGE / "layers").glob("*.py"),
]


@pytest.mark.parametrize("path", PLAIN_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_plain_model_knows_neither_acceleration_nor_lightning(path: Path) -> None:
    wrong = [name for name in imports(path) if "lightning" in name or within(name, OWN + "acceleration", OWN + "data")]
    assert not wrong, f"{path} imports {wrong}"
    words = r"fold(ed|s|ing)?\b|recompu|checkpoint\(|is_cpu|is_cuda|compil|\bdevice|memory_format"
    said = [match[0] for match in re.finditer(words, path.read_text())]
    assert not said or "models" not in path.parts, f"{path} says {said}"


@pytest.mark.parametrize("path", PLAIN_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_forwards_of_the_plain_model_fit_in_25_lines(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and function.name == "forward":
            body = function.body[1:]  # without the docstring
            assert body[-1].end_lineno - body[0].lineno < 25, f"{path}: {function.lineno}"  # type: ignore[operator]


def test_only_registration_changes_the_registries() -> None:
    reads = PACKAGE / "data" / "sources.py"  # asks which packages a configuration may name
    for path in FILES:
        if path not in (PACKAGE / "registration.py", reads):
            assert "ALLOWED_MODULES" not in path.read_text(), path
    initial = PACKAGE / "__init__.py"
    assert all(path == initial or not any(within(n, OWN + "registration") for n in imports(path)) for path in FILES)


@pytest.mark.parametrize("heavy", ["openvino", "nncf"])
def test_exporters_are_imported_where_used(heavy: str) -> None:
    for path in FILES:
        assert not any(within(name, heavy) for name in imports(path, top_level_only=True)), path


def requirements(extra: str) -> set[str]:
    """Return the names listed in an array of pyproject.toml, without versions."""
    block = re.search(rf"^{extra} = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    return set(re.findall(r'^ *"([a-z0-9-]+)', block[1], re.MULTILINE))


def third_party(*, top_level_only: bool) -> set[str]:
    """Return the names of the distributions that the package imports from."""
    modules = {name.partition(".")[0] for path in FILES for name in imports(path, top_level_only=top_level_only)}
    named_otherwise = {
        "PIL": "pillow",
        "cv2": "opencv-python-headless",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
    }
    return {named_otherwise.get(name, name) for name in modules - sys.stdlib_module_names - {"anomalib_uniass"}}


def test_declared_dependencies_are_the_imported_ones() -> None:
    assert third_party(top_level_only=True) == requirements("dependencies")


def test_optional_imports_are_those_of_exporters() -> None:
    exporters = {"openvino", "nncf"}  # with anomalib[openvino]
    assert third_party(top_level_only=False) - requirements("dependencies") == exporters


# --- The start-up hook -----------------------------------------------------------------------------------------------

PLUGIN = """
import anomalib.data
def register():
    print("registered")
    anomalib.data.MVTec = "plugin's MVTec"
register()
"""


class Site:
    """A folder of site-packages with the hook and stand-ins for anomalib and the plugin."""

    def __init__(self, folder: Path, run_python: Callable[..., str]) -> None:
        self.folder = folder
        self.run_python = run_python
        for name in ("anomalib", "anomalib.models", "anomalib.data"):
            self.write(name, "")
        self.write("anomalib_uniass", PLUGIN)
        for name in INSTALLED_FILES:
            (folder / name).write_bytes((AUTOLOAD / name).read_bytes())

    def write(self, package: str, code: str) -> None:
        path = self.folder.joinpath(*package.split("."), "__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)

    def run(self, code: str, **environment: str) -> str:
        """Run ``code`` in a Python that has this folder and nothing else on top of the standard library."""
        start = f"import site; site.addsitedir({str(self.folder)!r})\n"
        return self.run_python("-ISB", "-c", start + code, **environment)


@pytest.fixture
def site(tmp_path: Path, run_python: Callable[..., str]) -> Site:
    return Site(tmp_path / "site", run_python)


def test_hook_and_registration_name_the_same_datamodules() -> None:
    def datamodules(path: Path) -> object:
        assignments = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))
        return next(
            ast.literal_eval(node.value) for node in assignments if ast.unparse(node.targets[0]) == "DATAMODULES"
        )

    assert datamodules(AUTOLOAD / "_anomalib_uniass_autoload.py") == datamodules(PACKAGE / "registration.py")


def test_start_up_loads_nothing_but_the_hook(site: Site) -> None:
    add_site = f"site.addsitedir({str(site.folder)!r})"
    code = f"import site, sys; before = set(sys.modules); {add_site}; print(set(sys.modules) - before)"
    assert site.run_python("-ISB", "-c", code) == "{'_anomalib_uniass_autoload'}\n"


def test_plugin_is_loaded_after_models(site: Site) -> None:
    site.write("anomalib.models", "print('models')")
    assert (
        site.run("import anomalib; print('anomalib'); import anomalib.models")
        == "anomalib\nmodels\nregistered\nregistered\n"
    )


def test_datamodules_are_loaded_when_asked_for(site: Site) -> None:
    code = """
import sys, anomalib.data
print(hasattr(anomalib.data, "other"), "anomalib_uniass" in sys.modules)
from anomalib.data import MVTec
print(MVTec, hasattr(anomalib.data, "VisA"))
"""
    printed = site.run(code).replace("registered\n", "")
    assert printed == "False False\nplugin's MVTec False\n"


def test_attribute_error_reads_like_pythons(site: Site) -> None:
    code = """
import anomalib.data
try:
    anomalib.data.other
except AttributeError as error:
    print(error)
"""
    assert site.run(code) == "module 'anomalib.data' has no attribute 'other'\n"


@pytest.mark.parametrize(
    "plugin",
    [
        "import no_such_module",
        "def broken(:",
        "raise RuntimeError('broken')",
        "def register(): raise AttributeError('no registry')",
        "raise AssertionError",
    ],
)
@pytest.mark.parametrize("warning_filter", ["default", "always"])
def test_broken_plugin_costs_one_warning(plugin: str, warning_filter: str, site: Site) -> None:
    site.write("anomalib_uniass", plugin)
    site.write("anomalib.models", "Padim = 'Padim'")
    code = f"""
import warnings; warnings.simplefilter("{warning_filter}")
import anomalib.data
print(hasattr(anomalib.data, "MVTec"), hasattr(anomalib.data, "VisA"))
import anomalib.models
print(anomalib.models.Padim)
"""
    printed = site.run(code)
    assert printed.startswith("False False\nPadim\n")
    assert printed.count("RuntimeWarning: anomalib-uniass could not be loaded") == 1
    assert "ANOMALIB_UNIASS_AUTOLOAD=0" in printed


def test_missing_plugin_costs_one_warning(site: Site) -> None:
    (site.folder / "anomalib_uniass" / "__init__.py").unlink()
    (site.folder / "anomalib_uniass").rmdir()
    assert site.run("import anomalib.models, anomalib.data").count("No module named 'anomalib_uniass'") == 1


def test_broken_plugin_still_fails_when_imported_by_name(site: Site) -> None:
    site.write("anomalib_uniass", "import anomalib.models, no_such_module")
    code = """
try:
    import anomalib_uniass
except ImportError as error:
    print(error)
"""
    assert site.run(code) == "No module named 'no_such_module'\n"


def test_error_of_anomalib_itself_is_passed_on(site: Site) -> None:
    site.write("anomalib.models", "raise ImportError('anomalib is broken')")
    code = """
try:
    import anomalib.models
except ImportError as error:
    print(error)
"""
    assert site.run(code) == "anomalib is broken\n"


def test_opt_out(site: Site) -> None:
    code = """
import anomalib.models, anomalib.data, sys
print(hasattr(anomalib.data, "MVTec"), "anomalib_uniass" in sys.modules)
print(any(type(finder).__module__ == "_anomalib_uniass_autoload" for finder in sys.meta_path))
"""
    assert site.run(code, ANOMALIB_UNIASS_AUTOLOAD="0") == "False False\nFalse\n"


def test_left_behind_pth_is_silent(site: Site) -> None:
    (site.folder / "_anomalib_uniass_autoload.py").unlink()
    assert site.run("print('started')") == "started\n"


def test_pth_and_start_file_call_the_same_function(site: Site) -> None:
    # Stands in for Python 3.15, which runs the entry points of .start files.
    module, _, function = (AUTOLOAD / "anomalib_uniass.start").read_text().strip().partition(":")
    code = f"import {module}, sys; {module}.{function}(); print([type(f).__module__ for f in sys.meta_path])"
    assert site.run(code).count(module) == 1


def test_install_twice_adds_one_finder(site: Site) -> None:
    code = """
import _anomalib_uniass_autoload as hook, importlib, sys
hook.install()
importlib.reload(hook).install()
print(sum(type(finder).__module__ == hook.__name__ for finder in sys.meta_path))
"""
    assert site.run(code) == "1\n"


@pytest.mark.parametrize(
    "shipped",
    [
        "MVTec = 'shipped'",
        "def __getattr__(name):\n    if name == 'MVTec': return 'shipped'\n    raise AttributeError(name)",
    ],
    ids=["class", "lazy"],
)
def test_datamodule_of_anomalib_is_kept(shipped: str, site: Site) -> None:
    site.write("anomalib.data", shipped)
    assert site.run("import anomalib.data; print(anomalib.data.MVTec)") == "shipped\n"


def test_lazy_attributes_of_anomalib_and_plugin_together(site: Site) -> None:
    site.write(
        "anomalib.data", "def __getattr__(name):\n    if name == 'Own': return 'own'\n    raise AttributeError(name)"
    )
    code = "import anomalib.data as d; print(d.Own, hasattr(d, 'other')); print(d.MVTec)"
    assert site.run(code).replace("registered\n", "") == "own False\nplugin's MVTec\n"


def test_reload(site: Site) -> None:
    code = """
import importlib, anomalib.models, anomalib.data
getter = anomalib.data.__getattr__
print("reload")
importlib.reload(anomalib.models)
print(importlib.reload(anomalib.data).__getattr__ is getter)
"""
    assert site.run(code).partition("reload\n")[2] == "registered\nTrue\n"


def test_plugin_imported_first_registers_once_it_is_complete(site: Site) -> None:
    site.write("anomalib_uniass", "import anomalib.models, anomalib.data\nprint('imported')" + PLUGIN)
    assert site.run("import anomalib_uniass") == "imported\nregistered\n"


def test_two_threads_import_plugin_and_models(site: Site) -> None:
    site.write("anomalib.models", "import time; time.sleep(0.2)")
    site.write("anomalib_uniass", "import time; time.sleep(0.1); import anomalib.models" + PLUGIN)
    code = """
import importlib, threading, sys
names = ["anomalib.models", "anomalib_uniass", "anomalib.data"]
threads = [threading.Thread(target=importlib.import_module, args=[name]) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join(20)
print(any(thread.is_alive() for thread in threads), sys.modules["anomalib.data"].MVTec)
"""
    printed = site.run(code)
    assert printed.endswith("False plugin's MVTec\n")
    assert "Warning" not in printed


def test_module_keeps_its_own_loader(site: Site) -> None:
    code = """
import importlib.machinery, importlib.util, inspect
print(importlib.util.find_spec("anomalib.models").loader.get_source("anomalib.models") == "")
import anomalib.models, anomalib.data
for module in (anomalib.models, anomalib.data):
    print(type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader)
"""
    assert site.run(code).replace("registered\n", "") == "True\nTrue\nTrue\n"


@pytest.mark.parametrize("position", [0, 1])
def test_another_hook_that_asks_all_finders(position: int, site: Site) -> None:
    code = f"""
import sys
class Other:
    def find_spec(self, *arguments):
        others = (finder for finder in sys.meta_path if finder is not self)
        return next(filter(None, (finder.find_spec(*arguments) for finder in others)), None)
sys.meta_path.insert({position}, Other())
import anomalib.data
try:
    import anomalib.models.no_such_module
except ModuleNotFoundError:
    print(anomalib.data.MVTec)
"""
    assert site.run(code).endswith("plugin's MVTec\n")
