# SPDX-License-Identifier: Apache-2.0
"""Compare exported models with their checkpoint on labelled images, before they are shipped.

    anomalib-uniass validate-export CKPT model.xml --data DIR

Runs every test image through PyTorch and through each exported file, and writes ``validation.json`` and
``report.html``: all metrics of both, the largest difference, images that are decided otherwise, and how long one takes
here. Ends with exit code 1 if a file exceeds a tolerance.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from anomalib_uniass.data import Unified
from anomalib_uniass.deploy.validation import CHECKPOINT, DEFAULT_PRECISION, Tolerance, compare, write
from anomalib_uniass.models.uniad.lightning_model import UniAD
from anomalib_uniass.models.unias.lightning_model import UniAS

MODELS: dict[str, type[UniAS] | type[UniAD]] = {"UniAS": UniAS, "UniAD": UniAD}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if a tolerance is exceeded.
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
        "--precision", nargs="+", default=["f32", DEFAULT_PRECISION], help="f32, bf16, f16, or the device's own default"
    )
    parser.add_argument("--device", default="CPU", help="device of OpenVINO")
    parser.add_argument("--metric_drop", type=float, default=1.0, help="points that the mean of a metric may lose")
    parser.add_argument("--decisions", type=float, default=0.01, help="share of images that may be decided otherwise")
    parser.add_argument("--difference", type=float, help="largest difference of a score or a map; any by default")
    parser.add_argument("--out", type=Path, default=Path("validation"))
    args = parser.parse_args(arguments)
    for path in (args.checkpoint, args.data, *args.exported):
        if not path.exists():
            parser.error(f"{path} does not exist")
    model = MODELS[args.model].load_from_checkpoint(args.checkpoint, map_location="cpu", visualizer=False)
    if model.model.tiling is not None:
        parser.error("the checkpoint cuts photographs into tiles; an exported tile is not what it predicts")
    tolerance = Tolerance(args.metric_drop, args.decisions, args.difference)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        datamodule = Unified(root=args.data, eval_batch_size=1, num_workers=0)
        found = compare(model, datamodule, args.exported, precisions=args.precision, device=args.device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    facts = {"checkpoint": str(args.checkpoint), "data": str(args.data), "processor": processor(args.device)}
    problems = write(args.out, found, tolerance, facts)
    for name, findings in found.items():
        other = "no thresholds" if findings.decisions is None else f"{len(findings.decisions)} other decisions"
        print(
            f"{name}: pixel AP {100 * findings.table['mean']['pixel_AP']:.2f} %, largest difference "
            f"{findings.largest_difference:.1e}, {other}, {findings.milliseconds(50):.1f} ms (median), "
            f"{findings.milliseconds(95):.1f} ms (95 %)"
        )
    print(f"{args.out / 'report.html'} and validation.json: {facts['processor']}")
    for problem in problems:
        print(f"FAILS {problem}")
    if len(found) > 1 and not problems:
        print(f"All {len(found) - 1} agree with the {CHECKPOINT}.")
    return 1 if problems else 0


def processor(device: str) -> str:
    """Return the name of a device of OpenVINO."""
    import openvino as ov

    return str(ov.Core().get_property(device, "FULL_DEVICE_NAME"))
