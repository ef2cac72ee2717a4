# SPDX-License-Identifier: Apache-2.0
"""``anomalib-uniass validate-export`` on good exports, on wrong ones, and on what it cannot compare."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.engine import Engine
from openvino import opset13

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.__main__ import main as command
from anomalib_uniass.cli.validate_export import main
from anomalib_uniass.deploy import validation
from anomalib_uniass.deploy.precision import compile_openvino, computed
from anomalib_uniass.deploy.validation import Decision, Findings, Outputs, Predict, Tolerance, exported_model
from anomalib_uniass.metrics.functional import METRICS
from tests.helpers import distributed_run
from tests.helpers.datasets import make_mvtec_layout

SMALL = distributed_run.SMALL | {"channel_branch": False, "visualizer": False}
SIZE = (128, 128)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model and export it to OpenVINO and ONNX; a second checkpoint has other weights."""
    folder = tmp_path_factory.mktemp("exports")
    make_mvtec_layout(folder / "DIR", ["bolt", "cap"], (90, 70), train=8, good=3, defective=3)
    model = UniAS(**SMALL, seed=0)
    engine = Engine(default_root_dir=folder / "runs", accelerator="cpu", max_epochs=1, logger=False)
    data = Unified(root=folder / "DIR", train_batch_size=4, eval_batch_size=4, num_workers=0)
    engine.fit(model, datamodule=data)
    engine.trainer.save_checkpoint(folder / "CKPT")
    content = torch.load(folder / "CKPT", weights_only=False)
    content["state_dict"]["model.norm.weight"] *= 1.5
    torch.save(content, folder / "OTHER")
    model.to_openvino(folder)
    model.to_onnx(folder)
    return folder


def openvino(folder: Path) -> Path:
    return folder / "weights" / "openvino" / "model.xml"


def validate(
    folder: Path, out: Path, *exported: Path, options: tuple[str, ...] = (), checkpoint: str = "CKPT"
) -> tuple[int, dict[str, Any]]:
    words = [str(folder / checkpoint), *map(str, exported), "--data", str(folder / "DIR"), "--out", str(out), *options]
    return main(words), json.loads((out / "validation.json").read_text())


def test_good_exports_agree_with_their_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = trained / "weights" / "onnx" / "model.onnx"
    strict = ("--precision", "f32", "--difference", "1e-4")
    code, found = validate(trained, tmp_path, openvino(trained), onnx, options=strict)
    assert code == 0
    assert found["images"] == 12
    assert len(found["models"]) == 3
    for model in found["models"].values():
        assert model["problems"] == []
        assert model["other_decisions"] == 0
        assert model["largest_difference"] < 1e-4
        assert 0 < model["median_ms"] <= model["p95_ms"]
        assert set(model["metrics"]) >= set(METRICS)
    assert found["facts"]["processor"]
    assert "All 2 agree" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="pass"') == 3
    assert "<script" not in page


def test_metrics_are_those_of_the_deployed_maps(trained: Path, tmp_path: Path) -> None:
    """Beside a loop of its own over the test images."""
    _, found = validate(trained, tmp_path, openvino(trained), options=("--precision", "f32"))
    model = UniAS.load_from_checkpoint(trained / "CKPT", visualizer=False).eval()
    data = Unified(root=trained / "DIR", num_workers=0)
    data.setup()
    right, pairs = 0.0, 0
    for category in ("bolt", "cap"):
        items = [item for item in data.test_data if f"/{category}/" in item.image_path]
        with torch.no_grad():
            scores = [(float(model(item.image[None]).pred_score), bool(item.gt_label)) for item in items]
        bad, good = ([score for score, label in scores if label is wanted] for wanted in (True, False))
        right += sum((b > g) + 0.5 * (b == g) for b in bad for g in good)
        pairs += len(bad) * len(good)
    (checkpoint, *_) = found["models"].values()
    assert checkpoint["metrics"]["image_AUROC"] == pytest.approx(right / pairs, abs=1e-6)


def test_an_export_of_other_weights_fails(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--precision", "f32", "--difference", "1e-4")
    code, found = validate(trained, tmp_path, openvino(trained), options=options, checkpoint="OTHER")
    assert code == 1
    (_, wrong) = found["models"].values()
    assert any("outputs differ" in problem for problem in wrong["problems"])
    assert "FAILS" in capsys.readouterr().out
    assert 'class="fail"' in (tmp_path / "report.html").read_text()


def test_other_thresholds_beside_the_export_are_other_decisions(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(openvino(trained).parent, copy)
    thresholds = json.loads((copy / "category_thresholds.json").read_text())
    thresholds["image"]["cap"] = 0.0
    (copy / "category_thresholds.json").write_text(json.dumps(thresholds))
    model = UniAS.load_from_checkpoint(trained / "CKPT", visualizer=False).eval()
    data = Unified(root=trained / "DIR", num_workers=0)
    data.setup()
    items = [item for item in data.test_data if "/cap/" in item.image_path]
    own = model.post_processor.exported_thresholds()["image"]["cap"]
    with torch.no_grad():
        good = sum(float(model(item.image[None]).pred_score) <= own for item in items)
    assert good > 0, "the test needs an image that the checkpoint calls good"
    code, found = validate(trained, tmp_path / "out", copy / "model.xml", options=("--precision", "f32"))
    assert code == 1
    (_, other) = found["models"].values()
    assert other["other_decisions"] == good
    assert f"{good} of {len(data.test_data)} decisions differ, allowed are 1 %" in other["problems"][0]
    assert "Decided otherwise by" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_without_thresholds_nothing_is_decided(trained: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(trained / "CKPT", weights_only=False)
    model = UniAS(**SMALL)
    weights = {
        name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("post_processor.")
    }
    model.load_state_dict(weights, strict=False)
    trainer = Engine(accelerator="cpu", max_epochs=1, limit_train_batches=0, limit_val_batches=0, logger=False)
    trainer.fit(model, datamodule=Unified(root=trained / "DIR", num_workers=0))
    trainer.trainer.save_checkpoint(tmp_path / "CKPT")
    (tmp_path / "DIR").symlink_to(trained / "DIR")
    path = model.to_openvino(tmp_path / "export")
    code, found = validate(tmp_path, tmp_path / "out", path, options=("--precision", "f32"))
    assert code == 0
    assert {model["other_decisions"] for model in found["models"].values()} == {None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CKPT", "none.xml", "--data", "DIR"], "none.xml does not exist"),
        (["CKPT", "CKPT", "--data", "DIR"], "OpenVINO cannot load"),
        (["CKPT", "weights/openvino/model.xml", "--data", "DIR", "--decisions", "nan"], "must be a number at least 0"),
        (["CKPT", "weights/openvino/model.xml", "--data", "weights"], "holds no category"),
        (["CKPT", "weights/openvino/model.xml", "--data", "DIR", "--out", "CKPT/out"], "CKPT"),
    ],
)
def test_what_cannot_be_compared_is_said(
    trained: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "i4"], "choose from"),
        (["--device", "ABACUS"], "cannot compute on ABACUS"),
        (["--device", "AUTO:ABACUS"], "cannot compute on AUTO:ABACUS"),
        (["--device", "CPU.7"], "cannot compute on CPU.7"),
    ],
)
def test_what_the_device_cannot_do_is_said_before_any_work(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CKPT", "model.xml"):  # neither is read
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        main(["CKPT", "model.xml", "--data", ".", *options])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    if "--device" in options:
        assert "It has CPU (" in said
    assert not (tmp_path / "validation").exists()


def test_files_that_are_no_models_of_ours_are_said(trained: Path, tmp_path: Path) -> None:
    one = opset13.parameter([1, 3, -1, -1], np.float32)
    ov.save_model(ov.Model([opset13.relu(one)], [one]), tmp_path / "other.xml")
    with pytest.raises(ValueError, match=r"other.xml gives no anomaly_map and no pred_score"):
        exported_model(tmp_path / "other.xml", "f32", "CPU")


# --- Precisions ------------------------------------------------------------------------------------------------------


def own_precision(**config: str) -> str:
    """Ask OpenVINO itself what this processor makes of a hint."""
    one = opset13.parameter([1, 1], np.float32)
    graph = ov.Model([opset13.matmul(one, one, False, False)], [one])
    return ov.Core().compile_model(graph, "CPU", config).get_property("INFERENCE_PRECISION_HINT").get_type_name()


def test_precisions_have_the_names_of_what_is_computed(trained: Path, tmp_path: Path) -> None:
    asked = ["f32", "bf16", "f16", "default"]
    computed = [own_precision(), *(own_precision(INFERENCE_PRECISION_HINT=one) for one in asked[:3])]
    _, found = validate(trained, tmp_path, openvino(trained), options=("--precision", *asked))
    (_, *exports) = found["models"].items()
    assert {model["precision"] for _, model in exports} == set(computed)
    assert len(exports) == len(set(computed)), "what is computed alike runs once"
    for name, model in exports:
        assert name.startswith(f"{openvino(trained).as_posix()} ({model['precision']}")
        assert model["decides"] and model["devices"] == ["CPU"]
    of_wish = {wish: model["precision"] for _, model in exports for wish in model["asked"]}
    assert of_wish == dict(zip(["default", *asked[:3]], computed, strict=True))


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "MULTI:CPU", "HETERO:CPU", "cpu"])
def test_devices_that_choose_others_are_named_by_these(device: str, trained: Path, tmp_path: Path) -> None:
    code, found = validate(trained, tmp_path, openvino(trained), options=("--device", device))
    assert code == 0
    full_name = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
    assert found["facts"]["processor"] == f"{full_name} (CPU)"
    (_, exact, *_) = found["models"].values()
    assert (exact["precision"], exact["devices"]) == ("f32", ["CPU"])


class OtherProcessor:
    """An exported model on a processor with bfloat16 and without float16, whose bfloat16 decides otherwise."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.compiled = compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)

    def get_property(self, name: str) -> Any:
        return ov.Type.bf16 if name == "INFERENCE_PRECISION_HINT" else self.compiled.get_property(name)

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self.compiled(image)
        return {"anomaly_map": outputs["anomaly_map"], "pred_score": 1 - outputs["pred_score"]}


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_there(path: Path, precision: str, device: str) -> Any:
        compiled = compile_openvino(path, "f32", device)
        return compiled if precision == "f32" else OtherProcessor(compiled)

    monkeypatch.setattr(validation, "compile_openvino", compile_there)


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        ([], 0, {"f32": True, "bf16, the default here": False}),
        (["--precision", "default"], 1, {"bf16, the default here": True, "f32": False}),
        (["--precision", "bf16"], 1, {"bf16, the default here": True, "f32": False}),
        (["--precision", "f16"], 1, {"bf16, the default here, asked for f16": True, "f32": False}),
    ],
)
def test_what_will_be_deployed_decides(
    options: list[str],
    code: int,
    names: dict[str, bool],
    trained: Path,
    tmp_path: Path,
    with_bfloat16: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended, found = validate(trained, tmp_path, openvino(trained), options=tuple(options))
    (_, *exports) = found["models"].items()
    path = openvino(trained).as_posix()
    assert {name: model["decides"] for name, model in exports} == {
        f"{path} ({name})": yes for name, yes in names.items()
    }
    assert ended == code
    printed, said = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    last = printed.splitlines()[-1]
    assert ("NOT COMPUTED f16: this device takes bf16 for it." in printed) == ("f16" in options)
    if code:
        assert last.startswith("Do not deploy: 1 of 1 differ")
        assert 'class="fail"' in said
    else:
        assert last.startswith("All 1 agree") and "in f32" in last
        assert 'class="fail"' not in said and "for information: would fail" in said
        assert "OpenVINO takes bf16 by itself on this device" in printed
        assert '{"INFERENCE_PRECISION_HINT": "f32"}' in printed


class Told:
    """A compiled model that tells only some properties."""

    def __init__(self, **properties: Any) -> None:
        self.properties = properties

    def get_property(self, name: str) -> Any:
        if name not in self.properties:
            raise RuntimeError(name)
        return self.properties[name]

    def get_runtime_model(self) -> Any:
        raise RuntimeError


HINT = "INFERENCE_PRECISION_HINT"


@pytest.mark.parametrize(
    ("properties", "precision", "devices"),
    [
        ({HINT: ov.Type.bf16, "EXECUTION_DEVICES": ["CPU"]}, "bf16", ("CPU",)),
        ({"EXECUTION_DEVICES": ["(CPU)"], "DEVICE_PROPERTIES": {"CPU": {HINT: ov.Type.f32}}}, "f32", ("CPU",)),
        (
            {
                "EXECUTION_DEVICES": ["GPU.0", "CPU"],
                "DEVICE_PROPERTIES": {"CPU": {HINT: ov.Type.f32}, "GPU.0": {HINT: ov.Type.f16}},
            },
            "f16, f32",
            ("GPU.0", "CPU"),
        ),
        ({HINT: ov.Type.dynamic, "EXECUTION_DEVICES": ["NPU"]}, "unknown", ("NPU",)),
        ({}, "unknown", ()),
    ],
)
def test_devices_are_asked_for_what_they_tell(
    properties: dict[str, Any], precision: str, devices: tuple[str, ...]
) -> None:
    assert computed(Told(**properties)) == (precision, devices)


def test_the_graph_is_asked_where_the_accuracy_mode_leaves_it_to_it() -> None:
    one = opset13.parameter([4, 4], np.float32)
    graph = ov.Model([opset13.matmul(one, one, False, False)], [one])
    compiled = ov.Core().compile_model(graph, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    assert compiled.get_property(HINT) == ov.Type.dynamic
    assert computed(compiled) == ("f32", ("CPU",))


def test_whole_numbers_are_named() -> None:
    image = opset13.parameter([1, 16, 8, 8], np.float32)
    weights = np.random.default_rng(0).normal(size=(16, 16, 3, 3)).astype(np.float32)

    def quantized(tensor: Any, low: float, high: float, levels: int) -> Any:
        limits = [np.float32(one) for one in (low, high, low, high)]
        return opset13.fake_quantize(tensor, *map(opset13.constant, limits), levels)

    convolution = opset13.convolution(
        quantized(image, 0, 2.55, 256),
        quantized(opset13.constant(weights), -1.27, 1.27, 255),
        [1, 1],
        [1, 1],
        [1, 1],
        [1, 1],
    )
    graph = ov.Model([opset13.relu(convolution)], [image])
    compiled = ov.Core().compile_model(graph, "CPU", {HINT: "f32"})
    assert computed(compiled).precision == "INT8, f32"


@pytest.mark.slow
def test_an_export_for_another_size_is_said(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = UniAS.load_from_checkpoint(trained / "CKPT", visualizer=False)
    path = model.to_openvino(tmp_path, input_size=(100, 100))
    with pytest.raises(SystemExit):
        validate(trained, tmp_path, path)
    assert "export it for any size" in capsys.readouterr().err


def test_the_command_ends_with_the_exit_code(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(trained / "OTHER"), str(openvino(trained)), "--data", str(trained / "DIR"), "--out", str(tmp_path)]
    options = ["--precision", "f32", "--difference", "1e-9"]
    monkeypatch.setattr(sys, "argv", ["anomalib-uniass", "validate-export", *words, *options])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 1


# --- Tolerances ------------------------------------------------------------------------------------------------------


def findings(metric: float, *, decisions: int | None = 0, difference: float = 0.0) -> Findings:
    table = {"mean": dict.fromkeys(METRICS, metric)}
    listed = None if decisions is None else [Decision("a.png", True, 0.6, 0.4, 0.5)] * decisions
    return Findings(table, [0.1] * 100, difference, listed)


@pytest.mark.parametrize(
    ("found", "problems"),
    [
        (findings(0.5), 0),
        (findings(0.4901), 0),
        (findings(0.4899), len(METRICS)),
        (findings(0.9), 0),
        (findings(float("nan")), len(METRICS)),
        (findings(0.5, decisions=1), 0),
        (findings(0.5, decisions=2), 1),
        (findings(0.5, decisions=None), 0),
        (findings(0.5, difference=0.02), 1),
        (findings(0.5, difference=float("inf")), 1),
    ],
)
def test_tolerances_are_held_to(found: Findings, problems: int) -> None:
    assert len(found.problems(findings(0.5), Tolerance(1.0, 0.01, 0.01))) == problems


def test_a_metric_that_neither_has_is_no_problem() -> None:
    undefined = findings(float("nan"))
    assert not undefined.problems(undefined, Tolerance(1.0, 0.01, 0.01))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", ["score", "map", "both"])
def test_what_is_not_finite_never_agrees(
    spoilt: str, value: float, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any tolerance; the page and the JSON are written."""

    def outputs(*_: object) -> Predict:
        def predict(_: torch.Tensor) -> Outputs:
            anomaly_map = np.full(SIZE, 0.25, np.float32)
            if spoilt == "map":
                anomaly_map[0, 0] = value
            return Outputs(anomaly_map, 0.25 if spoilt == "map" else value)

        return predict

    monkeypatch.setattr(validation, "compiled_model", outputs)
    if spoilt == "both":
        monkeypatch.setattr(validation, "checkpoint_model", outputs)
    generous = ("--precision", "f32", "--metric_drop", "100", "--decisions", "1")
    code, found = validate(trained, tmp_path, openvino(trained), options=generous)
    row = next(row for name, row in found["models"].items() if "model.xml" in name)
    assert code == 1
    assert row["largest_difference"] is None
    assert any("of 12 images are not finite" in problem and ".png" in problem for problem in row["problems"])
    assert "not finite" in (tmp_path / "report.html").read_text()


def test_a_defect_whose_score_is_not_finite_is_another_decision(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Outputs(np.zeros(SIZE, np.float32), 0.0)
    monkeypatch.setattr(validation, "checkpoint_model", lambda *_: lambda _: good)
    monkeypatch.setattr(validation, "compiled_model", lambda *_: lambda _: good._replace(score=float("nan")))
    _, found = validate(trained, tmp_path, openvino(trained), options=("--precision", "f32"))
    row = next(row for name, row in found["models"].items() if "model.xml" in name)
    assert row["other_decisions"] == found["images"] == 12


def test_first_images_do_not_count_in_the_times() -> None:
    found = Findings(seconds=[9.0, 9.0, 9.0, *np.linspace(0.1, 0.2, 11)])
    assert found.milliseconds(50) == pytest.approx(150)
    assert found.milliseconds(95) == pytest.approx(195)
    assert Findings(seconds=[0.5]).milliseconds(50) == 500
