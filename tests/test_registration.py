# SPDX-License-Identifier: Apache-2.0
"""Short names through all of anomalib's mechanisms, with anomalib itself (see test_packaging.py for the hook alone)."""

from collections.abc import Callable
from pathlib import Path

import anomalib.data
import anomalib.models
import pytest
from anomalib.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.models import AnomalibModule, UnknownModelError, get_model, list_models
from lightning.pytorch import LightningDataModule

import anomalib_uniass
from anomalib_uniass import registration

MODELS = [getattr(anomalib_uniass, name) for name in registration.MODELS]
DATAMODULES = [getattr(anomalib_uniass, name) for name in registration.DATAMODULES]


@pytest.fixture
def empty_constructors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the classes be created without weights or data: here only which class is found matters."""
    for model in MODELS:
        monkeypatch.setattr(model, "__init__", lambda _self: None)
    for datamodule in DATAMODULES:
        monkeypatch.setattr(datamodule, "__init__", lambda self: LightningDataModule.__init__(self))


@pytest.mark.parametrize("model", MODELS)
def test_model_is_a_direct_subclass(model: type) -> None:
    # get_model("name") and list_models() look no deeper.
    assert AnomalibModule in model.__bases__


@pytest.mark.parametrize("datamodule", DATAMODULES)
def test_datamodule_is_a_subclass(datamodule: type) -> None:
    assert issubclass(datamodule, AnomalibDataModule)


def test_list_models() -> None:
    assert set(registration.MODELS) <= list_models("pascal")
    assert {"uni_a_s", "uni_a_d", "bounded_patchcore"} <= list_models()


@pytest.mark.usefixtures("empty_constructors")
@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("UniAS", ["unias", "UniAS", "uni_as", "uni_a_s"]),
        ("UniAD", ["uniad", "UniAD", "uni_ad", "uni_a_d"]),
        ("BoundedPatchcore", ["boundedpatchcore", "BoundedPatchcore", "bounded_patchcore"]),
    ],
)
def test_get_model_by_name(model: str, names: list[str]) -> None:
    for name in names:
        assert type(get_model(name)) is getattr(anomalib_uniass, model)


@pytest.mark.usefixtures("empty_constructors")
@pytest.mark.parametrize("prefix", ["", "anomalib_uniass.", "anomalib.models."])
@pytest.mark.parametrize("model", MODELS)
def test_get_model_by_class_path(prefix: str, model: type) -> None:
    assert type(get_model({"class_path": prefix + model.__name__})) is model


@pytest.mark.usefixtures("empty_constructors")
@pytest.mark.parametrize("prefix", ["", "anomalib_uniass.", "anomalib.data."])
@pytest.mark.parametrize("datamodule", DATAMODULES)
def test_get_datamodule(prefix: str, datamodule: type) -> None:
    assert type(get_datamodule({"class_path": prefix + datamodule.__name__})) is datamodule


def test_unknown_names_stay_unknown() -> None:
    with pytest.raises(UnknownModelError):
        get_model({"class_path": "anomalib_uniass.registration.UniAS"})
    assert not hasattr(anomalib.data, "NoSuchDataModule")


@pytest.mark.parametrize("datamodule", registration.DATAMODULES)
@pytest.mark.parametrize("model", registration.MODELS)
def test_cli_short_names(model: str, datamodule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(args=["train", "--model", model, "--data", datamodule, "--print_config"])
    assert stop.value.code in {0, None}
    printed = capsys.readouterr().out
    assert f"class_path: anomalib_uniass.{model}" in printed
    assert f"class_path: anomalib_uniass.{datamodule}" in printed


def test_cli_config_file_with_short_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  class_path: UniAS\ndata:\n  class_path: MVTec\n")
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(args=["test", "--config", str(config), "--print_config"])
    assert stop.value.code in {0, None}
    printed = capsys.readouterr().out
    assert "class_path: anomalib_uniass.UniAS" in printed
    assert "class_path: anomalib_uniass.MVTec" in printed


def test_register_twice_changes_nothing() -> None:
    before = dict(vars(anomalib.models)), dict(vars(anomalib.data)), set(anomalib.models.ALLOWED_MODULES)
    anomalib_uniass.register()
    assert before == (vars(anomalib.models), vars(anomalib.data), anomalib.models.ALLOWED_MODULES)


def test_register_leaves_names_that_anomalib_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {anomalib.models: "UniAS", anomalib.data: "MVTec"}
    for module, name in shipped.items():
        monkeypatch.setattr(module, name, object())
    expected = {module: vars(module)[name] for module, name in shipped.items()}
    registration.register()
    assert {module: vars(module)[name] for module, name in shipped.items()} == expected


def test_register_after_reload_of_anomalib_models(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: set[str] = set()
    monkeypatch.setattr(anomalib.models, "ALLOWED_MODULES", allowed)
    monkeypatch.delattr(anomalib.models, "UniAS")
    registration.register()
    assert allowed == {"anomalib_uniass"}
    assert anomalib.models.UniAS is anomalib_uniass.UniAS


# Each of the following starts Python anew, which takes anomalib some ten seconds.


def test_import_without_hook_registers(run_python: Callable[..., str]) -> None:
    code = """
import anomalib_uniass, anomalib.models, anomalib.data
from anomalib_uniass.registration import DATAMODULES, MODELS
assert all(getattr(anomalib.models, name) is getattr(anomalib_uniass, name) for name in MODELS)
assert all(getattr(anomalib.data, name) is getattr(anomalib_uniass, name) for name in DATAMODULES)
assert "anomalib_uniass" in anomalib.models.ALLOWED_MODULES
"""
    assert "RuntimeWarning" not in run_python("-c", code, ANOMALIB_UNIASS_AUTOLOAD="0")


@pytest.mark.usefixtures("hook")
def test_hook_registers_with_anomalib(run_python: Callable[..., str]) -> None:
    code = """
import sys
from importlib import reload
import anomalib.data
assert not hasattr(anomalib.data, "NoSuchDataModule")
assert "anomalib.models" not in sys.modules and "anomalib_uniass" not in sys.modules
from anomalib.models import UniAS, list_models
import anomalib_uniass, anomalib.models
assert UniAS is anomalib_uniass.UniAS and "uni_a_s" in list_models()
assert anomalib.data.MVTec is anomalib_uniass.MVTec
reload(anomalib.models)
assert "anomalib_uniass" in anomalib.models.ALLOWED_MODULES
"""
    assert "RuntimeWarning" not in run_python("-c", code)


@pytest.mark.slow
@pytest.mark.usefixtures("hook")
def test_hook_provides_datamodules_before_models(run_python: Callable[..., str]) -> None:
    code = """
import sys
from anomalib.data import MVTec
import anomalib_uniass
assert MVTec is anomalib_uniass.MVTec
assert sys.modules["anomalib.models"].UniAS is anomalib_uniass.UniAS
"""
    assert "RuntimeWarning" not in run_python("-c", code)


# The plugin is imported as soon as anomalib.models is executed. Each of these modules imports anomalib.models and is
# itself unfinished at that moment, so the plugin must not need it.
@pytest.mark.slow
@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize(
    "first",
    [
        "anomalib.callbacks",
        "anomalib.cli",
        "anomalib.engine",
        "anomalib.models.image.padim",
        "anomalib.pipelines",
        "anomalib_uniass.data",
    ],
)
def test_hook_works_whatever_is_imported_first(first: str, run_python: Callable[..., str]) -> None:
    code = f"""
import {first}, anomalib.models, anomalib.data
assert "UniAS" in vars(anomalib.models) and "MVTec" in vars(anomalib.data)
"""
    assert "RuntimeWarning" not in run_python("-c", code)


@pytest.mark.slow
@pytest.mark.usefixtures("hook")
def test_spawned_worker_gets_a_datamodule_class(tmp_path: Path, run_python: Callable[..., str]) -> None:
    script = tmp_path / "spawn.py"
    script.write_text("""
from multiprocessing import get_context

if __name__ == "__main__":
    from anomalib.data import MVTec

    with get_context("spawn").Pool(1) as pool:
        print(pool.apply(repr, [MVTec]))
""")
    assert "<class 'anomalib_uniass." in run_python(str(script))


@pytest.mark.slow
@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize(
    ("start", "autoload"),
    [
        ("from anomalib.cli.cli import main; main()", "1"),  # the stock script
        ("from anomalib_uniass.__main__ import main; main()", "0"),  # the script anomalib-uniass
        ("import runpy; runpy.run_module('anomalib_uniass', run_name='__main__')", "0"),  # python -m anomalib_uniass
    ],
)
def test_three_commands(start: str, autoload: str, run_python: Callable[..., str]) -> None:
    arguments = ["train", "--model", "UniAS", "--data", "MVTec", "--print_config"]
    printed = run_python("-c", start, *arguments, ANOMALIB_UNIASS_AUTOLOAD=autoload)
    assert "class_path: anomalib_uniass.UniAS" in printed
    assert "class_path: anomalib_uniass.MVTec" in printed
