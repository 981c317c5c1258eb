#!/usr/bin/env bash
# A pre-training over several hosts with torchrun; call it on each of them, all at once:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash scripts/launch/torchrun.sh --config FILE --output RUN
#   NODES=2 NODE_RANK=1 MASTER_ADDR=host0 bash scripts/launch/torchrun.sh --config FILE --output RUN
# PROCESSES: on each host; by default one a GPU. torchrun ends with 1 whatever ended mim, whose own
# line stands above; call all again to go on.
set -euo pipefail
: "${NODES:?how many hosts}" "${NODE_RANK:?which of them this is, from 0}"
: "${MASTER_ADDR:?the host of rank 0}"
exec python -m torch.distributed.run --nnodes "$NODES" --node-rank "$NODE_RANK" \
  --nproc-per-node "${PROCESSES:-gpu}" --master-addr "$MASTER_ADDR" \
  --master-port "${MASTER_PORT:-29400}" -m mim pretrain --resume auto "$@"
