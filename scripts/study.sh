#!/usr/bin/env bash
# Repeat the study of docs/study.md on the images of a folder: bash scripts/study.sh DIR
# DIR holds CIFAR-10 as train/CLASS/* and val/CLASS/*. Run again, it goes on where it stopped.
[ $# -eq 1 ] || { echo "usage: bash scripts/study.sh DIR" >&2; exit 2; }
images="$(realpath "$1")"
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
setup ""
# Rates are chosen on a split of the training images: the comparison never sees val.
mim compare --config configs/study/tune.yaml --base.data.path "$images/train"
mim compare --config configs/study/cifar10.yaml --base.data.path "$images"
mim compare --config configs/study/cifar10.yaml --config configs/study/short.yaml --base.data.path "$images"
exec python -m benchmarks.study runs/study/tune runs/study/cifar10 runs/study/short
