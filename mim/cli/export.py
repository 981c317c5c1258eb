"""``mim export``."""

from __future__ import annotations

import argparse

from mim.cli.options import Verb, say

LAYOUTS = ("timm", "hf", "safetensors", "onnx", "mae")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--to", choices=LAYOUTS, default="timm", help="the layout")
    parser.add_argument("--output", required=True, help="the file, or for timm and hf the folder")
    parser.add_argument(
        "--part",
        choices=("encoder", "model"),
        help="by default the encoder; hf and mae: the model, where it is an MAE",
    )


def _run(options: argparse.Namespace) -> int:
    from mim.interop import export_run

    exported = export_run(options.run, options.to, options.output, options.part)
    say(f"model card: {exported.card}")
    say(exported.usage)  # last: scripts read the line that loads it
    return 0


VERB = Verb(
    "export",
    "Write a run's weights as files that others load, with a model card.",
    _options,
    _run,
    "Write a run's weights for others, and a model card beside them.\n\n"
    "timm         file for timm.create_model(..., checkpoint_path=FILE); .safetensors; or a\n"
    "             folder, with size, mean, deviation and pooling, ready to push to a hub\n"
    "hf           folder for transformers' from_pretrained\n"
    "safetensors  timm's keys, or with --part model all of them; .safetensors\n"
    "onnx         images to tokens and features, any batch size; .onnx\n"
    "mae          facebookresearch/mae's keys; .pth",
)
