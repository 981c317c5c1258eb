#!/usr/bin/env bash
# Time whole pre-training steps of ViT-B/16 and ViT-L/16 on a GPU in bfloat16, compiled and not,
# beside other codebases; the table is printed last. It needs an environment with the package and its
# extra `bench`; PEERS names the peers that are installed, MAE_PATH a checkout of facebookresearch/mae,
# BENCH_OUTPUT a file for the table, BATCH the images of a step. Other arguments are settings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

peers="${PEERS-hf,lightly,vit-pytorch}"
mae=()
if [ -n "${MAE_PATH:-}" ]; then
  peers="${peers:+$peers,}mae"
  mae=(--mae-path "$MAE_PATH")
fi
table="${BENCH_OUTPUT:-$(mktemp -d)/bench_gpu.md}"
for size in vit_base vit_large; do
  # All regimes as they are; then drop compiled, which takes a minute before the first step.
  for call in "drop,zero,token false" "drop true"; do
    read -r regimes compiled <<< "$call"
    python -m mim bench step --config "configs/bench/$size.yaml" --regimes "$regimes" \
      --rounds 5 --steps 10 --no-products --peer "$peers" "${mae[@]}" --append "$table" \
      --data.batch_size "${BATCH:-256}" --train.precision bf16 --train.compile "$compiled" "$@" \
      > /dev/null
  done
done
cat "$table"
