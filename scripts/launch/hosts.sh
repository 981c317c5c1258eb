#!/usr/bin/env bash
# A pre-training over a list of hosts, by ssh without a password; the rest goes to `mim pretrain`:
#   bash scripts/launch/hosts.sh hosts.txt --config configs/pretrain/photos.yaml --output runs/x
# hosts.txt: a host a line, and how many processes it has (GPUs; 1 by default). All hosts have this
# folder, this Python and the run folder under the same paths. Ends with mim's own exit code: the
# first that is neither 0 nor 75 (another process was lost), if there is one. Ctrl-C and SIGTERM save
# first. MIM_SSH names another program that is given a host and a command; MASTER_PORT another port;
# MASTER_ADDR another name of the first host.
set -euo pipefail

hosts_file="${1:?a file with a host a line}"
shift
names=() counts=() world=0
while read -r name count _ || [ -n "${name:-}" ]; do
  case "$name" in '' | '#'*) continue ;; esac
  names+=("$name")
  counts+=("${count:-1}")
  world=$((world + ${count:-1}))
done < "$hosts_file"
[ "$world" -gt 0 ] || { echo "hosts.sh: $hosts_file names no host" >&2; exit 2; }

# What the processes need to know of this shell.
passed=""
for variable in PATH PYTHONPATH VIRTUAL_ENV OMP_NUM_THREADS ACCELERATE_USE_CPU GLOO_SOCKET_IFNAME \
  NCCL_SOCKET_IFNAME NCCL_DEBUG WANDB_MODE; do
  if [ -n "${!variable:-}" ]; then passed+=" $variable=$(printf %q "${!variable}")"; fi
done
arguments="$(printf ' %q' "$@")"
read -r -a connect <<< "${MIM_SSH:-ssh -tt -o BatchMode=yes}"

pids=() rank=0
for index in "${!names[@]}"; do
  for ((local = 0; local < counts[index]; local++)); do
    environment="MASTER_ADDR=${MASTER_ADDR:-${names[0]}} MASTER_PORT=${MASTER_PORT:-29400}"
    environment+=" WORLD_SIZE=$world RANK=$rank LOCAL_RANK=$local LOCAL_WORLD_SIZE=${counts[index]}"
    # A connection that ends is a signal to save: the terminal hangs up.
    command="cd $(printf %q "$PWD") && { env$passed $environment python -m mim pretrain --resume auto"
    command+="$arguments & process=\$!; trap 'kill -TERM \$process' HUP INT TERM; wait \$process"
    command+="; code=\$?; while kill -0 \$process 2> /dev/null; do wait \$process; code=\$?; done"
    command+="; exit \$code; }"
    "${connect[@]}" "${names[index]}" "$command" < /dev/null &
    pids+=($!)
    rank=$((rank + 1))
  done
done

trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' INT TERM
result=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2> /dev/null; do # a signal ended the waiting alone
    code=0
    wait "$pid" || code=$?
  done
  if [ "$code" != 0 ] && { [ "$result" = 0 ] || [ "$result" = 75 ]; }; then result=$code; fi
done
exit "$result"
