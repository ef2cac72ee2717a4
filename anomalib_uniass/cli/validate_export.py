# SPDX-License-Identifier: Apache-2.0
"""Compare exported models with their checkpoint on labelled images: may they be deployed?

    anomalib-uniass validate-export CKPT model.xml --data DIR

Runs every test image through PyTorch and through each exported file, and writes ``validation.json`` and
``report.html``: all metrics of both, the largest difference, images that are decided otherwise, and how long one takes
here. Ends with exit code 1 if a file exceeds a tolerance in the precision that will be deployed: f32, which
examples/openvino_predict.py asks for, or those that ``--precision`` names. f32 and what the device takes by itself are
measured too, for information. A precision has the name of what was computed, whatever was asked for.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from anomalib_uniass.arguments import check_number
from anomalib_uniass.data import Unified
from anomalib_uniass.deploy.precision import DEFAULT_PRECISION, PRECISIONS, check_device, device_name
from anomalib_uniass.deploy.validation import CHECKPOINT, Findings, Tolerance, compare, write
from anomalib_uniass.models.uniad.lightning_model import UniAD
from anomalib_uniass.models.unias.lightning_model import UniAS

MODELS: dict[str, type[UniAS] | type[UniAD]] = {"UniAS": UniAS, "UniAD": UniAD}

EXACT = "f32"
"""Precision of the example and of the documentation's lines, in which thresholds were taken."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if a tolerance is exceeded in a precision that will be deployed.
    """
    parser = argparse.ArgumentParser(
        prog="anomalib-uniass validate-export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("exported", type=Path, nargs="+", help="model.xml or model.onnx")
    parser.add_argument("--data", type=Path, required=True, help="folder in MVTec AD layout; its test images are used")
    parser.add_argument("--model", choices=MODELS, default="UniAS", help="class of the checkpoint")
    parser.add_argument(
        "--precision",
        nargs="+",
        type=str.lower,
        choices=PRECISIONS,
        default=[EXACT],
        help="what will be deployed: f32 (unless given), bf16, f16, or the device's own default",
    )
    parser.add_argument(
        "--device", type=str.upper, default="CPU", help="device of OpenVINO: CPU, GPU, AUTO, AUTO:GPU,CPU ..."
    )
    parser.add_argument("--metric_drop", type=float, default=1.0, help="points that the mean of a metric may lose")
    parser.add_argument("--decisions", type=float, default=0.01, help="share of images that may be decided otherwise")
    parser.add_argument("--difference", type=float, help="largest difference of a score or a map; any by default")
    parser.add_argument("--out", type=Path, default=Path("validation"))
    args = parser.parse_args(arguments)
    for path in (args.checkpoint, args.data, *args.exported):
        if not path.exists():
            parser.error(f"{path} does not exist")
    tolerance = Tolerance(args.metric_drop, args.decisions, args.difference)
    try:
        for name, value in tolerance._asdict().items():
            if value is not None:
                check_number(f"--{name}", value, at_least=0)
        own = check_device(args.device, args.precision)
        args.out.mkdir(parents=True, exist_ok=True)
        datamodule = Unified(root=args.data, eval_batch_size=1, num_workers=0)
        datamodule.prepare_data()  # says what is wrong with the folder before the models are read
        model = MODELS[args.model].load_from_checkpoint(args.checkpoint, map_location="cpu", visualizer=False)
        if model.model.tiling is not None:
            parser.error("the checkpoint cuts photographs into tiles; an exported tile is not what it predicts")
        found = compare(
            model,
            datamodule,
            args.exported,
            precisions=args.precision,
            information=(EXACT, DEFAULT_PRECISION),
            device=args.device,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = ", ".join(f"{device_name(device)} ({device})" for device in own.devices)
    facts = {"checkpoint": str(args.checkpoint), "data": str(args.data), "processor": names}
    problems = write(args.out, found, tolerance, facts)
    for name, findings in found.items():
        other = "no thresholds" if findings.decisions is None else f"{len(findings.decisions)} other decisions"
        print(
            f"{name}: pixel AP {100 * findings.table['mean']['pixel_AP']:.2f} %, largest difference "
            f"{findings.largest_difference:.1e}, {other}, {findings.milliseconds(50):.1f} ms (median), "
            f"{findings.milliseconds(95):.1f} ms (95 %)"
        )
    print(f"{args.out / 'report.html'} and validation.json: {facts['processor']}")
    for line in verdict(found, problems):
        print(line)
    return 1 if any(problems[name] for name, findings in found.items() if findings.decides) else 0


def verdict(found: Mapping[str, Findings], problems: Mapping[str, list[str]]) -> list[str]:
    """Answer whether the exported models may be deployed.

    Args:
        found: Findings by model.
        problems: What exceeds the tolerance, by model.

    Returns:
        Lines: what fails, what was not computed as asked, what is for information, and the answer last.
    """
    exports = {name: findings for name, findings in found.items() if findings.computed is not None}
    deciding = {name: findings for name, findings in exports.items() if findings.decides}
    lines = [f"FAILS {name}: {problem}" for name in deciding for problem in problems[name]]
    for name, findings in exports.items():
        precision = findings.computed.precision if findings.computed else ""
        wishes = [one for one in findings.asked if one not in (DEFAULT_PRECISION, *precision.split(", "))]
        if wishes and findings.decides:
            lines.append(f"NOT COMPUTED {' and '.join(wishes)}: this device takes {precision} for it. Measured: {name}")
        if problems[name] and not findings.decides:
            advice = ""
            if DEFAULT_PRECISION in findings.asked:
                advice = (
                    f" OpenVINO takes {precision} by itself on this device, so deploy with the hint: "
                    f'{{"INFERENCE_PRECISION_HINT": "{EXACT}"}}, as examples/openvino_predict.py does.'
                )
            lines.append(f"For information, {name} would fail: {'; '.join(problems[name])}.{advice}")
    wrong = [name for name in deciding if problems[name]]
    if wrong:
        lines.append(f"Do not deploy: {len(wrong)} of {len(deciding)} differ from the {CHECKPOINT}.")
    elif deciding:
        precisions = " and ".join(dict.fromkeys(one.computed.precision for one in deciding.values() if one.computed))
        lines.append(f"All {len(deciding)} agree with the {CHECKPOINT} in {precisions}: may be deployed so.")
    return lines
