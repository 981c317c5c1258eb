#!/usr/bin/env bash
# Repeat the study of docs/study.md on the images of two folders: bash scripts/study.sh CIFAR10 TINY
# CIFAR10 holds CIFAR-10 and TINY 100 classes of Tiny-ImageNet, each as train/CLASS/* and val/CLASS/*.
# Run again, it goes on where it stopped.
[ $# -eq 2 ] || { echo "usage: bash scripts/study.sh CIFAR10 TINY" >&2; exit 2; }
cifar="$(realpath "$1")" tiny="$(realpath "$2")"
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
setup ""
compare() {  # FOLDER "NAME..." [OPTION...]: of the images in FOLDER, by the files configs/study/NAME.yaml
  local images="$1" files=() name
  for name in $2; do files+=(--config "configs/study/$name.yaml"); done
  mim compare "${files[@]}" --base.data.path "$images" "${@:3}"
}
labels() {  # PERCENT FRACTION EPOCHS WARMUP: the encoders of nine epochs, fine-tuned on a share of the labels
  local folder="runs/study/labels-$1" tuned="--evaluations.finetune"
  [ -d "$folder" ] || cp -r runs/study/long "$folder"
  compare "$cifar" "cifar10 long" --output "$folder" --primary finetune \
    "$tuned.fraction" "$2" "$tuned.epochs" "$3" "$tuned.warmup_epochs" "$4"
}
# Rates are chosen on a split of the training images: the comparison never sees val.
compare "$cifar/train" tune
compare "$cifar" cifar10
compare "$cifar" "cifar10 short"
compare "$cifar" "cifar10 long"
labels 1 0.01 60 6
labels 100 1.0 1 0.1
compare "$tiny/train" "tune tiny_tune"
compare "$tiny" "cifar10 tiny"
exec python -m benchmarks.study runs/study/{tune,cifar10,short,long,labels-1,labels-100,tiny-tune,tiny}
