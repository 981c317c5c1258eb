#!/usr/bin/env bash
# How time and memory of a training step grow with batch, image size, mask ratio, depth and width, and
# what checkpointing and accumulation change: tables into FILE, pictures beside it. About 10 minutes on
# 2 CPU cores. Usage: bash scripts/bench_growth.sh FILE [NAME ...] [-- --train.precision bf16 ...]
# NAME: batch, image_size, ratio, depth, width, small32, vit_base; by default all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

file="$1"
shift
names=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do names+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#names[@]} -gt 0 ] || names=(batch image_size ratio depth width small32 vit_base)

grow() { # NAME KEY=VALUES SETTINGS...
  python -m mim bench grow --config configs/bench/small32.yaml --over "$2" --rounds 5 \
    --append "$file" --figure "$(dirname "$file")/growth_$1.png" "${@:3}"
}

memory() { # CONFIG REGIMES ROUNDS SETTINGS...
  python -m mim bench step --config "configs/bench/$1.yaml" --regimes "$2" --rounds "$3" --steps 1 \
    --append "$file" --variants '{
      "drop, checkpointed": {"train.gradient_checkpointing": true},
      "drop, 4 parts": {"train.accumulate": 4},
      "token, checkpointed": {"model.regime.name": "token", "train.gradient_checkpointing": true},
      "token, 4 parts": {"model.regime.name": "token", "train.accumulate": 4}}' "${@:4}"
}

for name in "${names[@]}"; do
  case "$name" in
    batch) grow batch data.batch_size=32,64,128,256 "$@" ;;
    image_size) grow image_size data.image_size=16,32,64,96 --data.batch_size 32 "$@" ;;
    ratio) grow ratio mask.ratio=0.25,0.5,0.75,0.9 --data.batch_size 128 "$@" ;;
    depth) grow depth model.backbone_args.depth=3,6,12,24 --data.batch_size 64 "$@" ;;
    width) grow width model.backbone_args.embed_dim=96,192,384,768 --data.batch_size 64 "$@" ;;
    small32) memory small32 drop,zero,token 5 "$@" ;;
    vit_base) memory vit_base drop,zero,token 2 "$@" ;;
    *) echo "bench_growth.sh: $name is none of batch image_size ratio depth width small32 vit_base" >&2; exit 2 ;;
  esac
done
