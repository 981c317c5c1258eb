#!/usr/bin/env bash
# All that a GPU must tell, in ten minutes of one card, the most important first; each table is
# added to a file as soon as it is there, and the file is printed at the end:
#   masks and losses beside the CPU's, waits of a step; images a second, share of the matrix rate and
#   memory of ViT-B/16 and ViT-L/16 under each regime, as they are and compiled, beside other
#   codebases; fp8; the loader with all cores.
# It needs the package with its extras `bench` and `float8`. What fails, or takes longer than its
# share of the time, is noted, and the rest is measured. Arguments are settings of all.
#
#   BENCH_OUTPUT   the file for the tables
#   PEERS          other codebases; by default Hugging Face's and vit-pytorch where installed
#   MAE_PATH       a checkout of facebookresearch/mae, to be timed too
#   BATCH          images of a step
#   MIM_BENCH_TINY=1  a dry run of every part at a tiny size, for a machine without a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

table="${BENCH_OUTPUT:-$(mktemp -d)/bench_gpu.md}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$(dirname "$table")"
card="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || echo none)"
{ printf '# %s: %s\n\n' "$(date -u +%F)" "$card"; printf '`%s`\n' "bash scripts/bench_gpu.sh $*"; } > "$table"

there() { python -c "import importlib.util as i, sys; sys.exit(not i.find_spec('$1'))"; }
peers="$(there transformers && printf hf || true)"
if there vit_pytorch; then peers="${peers:+$peers,}vit-pytorch"; fi
compiled="${peers:+${peers//,/-compiled,}-compiled}"
peers="${PEERS-$peers}"
mae=()
if [ -n "${MAE_PATH:-}" ]; then
  peers="${peers:+$peers,}mae"
  mae=(--mae-path "$MAE_PATH")
fi
common=("$@" --data.batch_size "${BATCH:-256}")
timing=(--rounds 5 --steps 10)
sizes="vit_base vit_large"
photos=1536 workers="$(nproc)" rounds=3 watched=10 patience=1 failed=0
if [ -n "${MIM_BENCH_TINY:-}" ]; then
  common=(
    --data.image_size 32 --data.batch_size 8
    --model.backbone vit_tiny_patch16_224 --model.backbone_args '{"patch_size": 8, "depth": 1}'
    --model.decoder.transformer.width 64 --model.decoder.transformer.depth 1
    --model.decoder.transformer.heads 2 --mask.aligned.unit 8 --mask.target_blocks.min_keep 2 "$@"
  )
  timing=(--rounds 1 --steps 1)
  sizes="vit_base" photos=64 workers=0 rounds=1 watched=1 patience=10
fi

measure() { # seconds, title, command...
  local seconds="$1" title="$2"
  shift 2
  printf '\n## %s\n\n' "$title" >> "$table"
  printf '%s (%s s so far)\n' "$title" "$SECONDS" >&2
  timeout "$((seconds * patience))" python -m "$@" --append "$table" > /dev/null \
    2> "$scratch/errors" || missed "$?"
}
missed() { # exit status
  failed=1
  local why
  why="$(tail -n 1 "$scratch/errors")"
  if [ "$1" = 124 ]; then why="it takes too long"; fi
  printf 'Not measured: %s\n' "$why" | tee -a "$table" >&2
}
step() { # seconds, title, config, regimes, peers, settings...
  local seconds="$1" title="$2" config="configs/bench/$3.yaml" regimes="$4" beside="$5"
  shift 5
  measure "$seconds" "$title" mim bench step --config "$config" --regimes "$regimes" \
    "${timing[@]}" ${beside:+--peer "$beside"} "${mae[@]}" "${common[@]}" \
    --train.precision bf16 "$@"
}

measure 120 "Beside the CPU, and waits" benchmarks gpu --config configs/bench/vit_base.yaml \
  --steps "$watched" "${common[@]}" --train.precision bf16
for size in $sizes; do
  step 90 "$size" "$size" drop,zero,token "$peers"
done
if [ -z "${MIM_BENCH_TINY:-}" ]; then # compiling alone takes a minute on a CPU
  step 150 "vit_base, compiled" vit_base drop,zero,token "$compiled" --train.compile true
  step 120 "vit_large, compiled" vit_large drop "" --train.compile true
fi
step 60 "${size}, fp8" "$size" drop "" --train.precision fp8

python - "$scratch/photos" "$photos" << 'END'
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

folder, count = Path(sys.argv[1]), int(sys.argv[2])
draw = np.random.default_rng(0)
for number in range(count):
    photo = Image.fromarray(load_sample_images().images[number % 2])
    left, top = (int(draw.integers(0, room)) for room in (140, 52))
    path = folder / f"train/{number % 4}/{number}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.crop((left, top, left + 500, top + 375)).save(path, quality=90)
(folder / "val").symlink_to("train")
END
measure 60 "The loader" mim bench data --config configs/bench/data_photos.yaml \
  --rounds "$rounds" --images "$photos" --data.path "$scratch/photos" --data.workers "$workers"
printf '\n%s s in all.\n' "$SECONDS" >> "$table"
cat "$table"
if [ -n "${MIM_BENCH_TINY:-}" ]; then exit "$failed"; fi # a dry run fails where a part does
