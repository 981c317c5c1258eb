#!/usr/bin/env bash
# Set up with the test tools and run the tests. Arguments go to pytest.
# `bash scripts/test.sh faults` kills, tears and fills instead, and prints a table of trials.
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
setup dev
# One thread a worker: two workers on two cores would otherwise wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${1:-}" = faults ]; then
  shift
  export MIM_FAULT_TRIALS="${MIM_FAULT_TRIALS:-60}" MIM_FUZZ_EXAMPLES="${MIM_FUZZ_EXAMPLES:-2000}"
  export MIM_LOST_TRIALS="${MIM_LOST_TRIALS:-5}"
  export MIM_FUZZ_SECONDS="${MIM_FUZZ_SECONDS:-60}" MIM_LONG_RESTARTS="${MIM_LONG_RESTARTS:-300}"
  exec python -m pytest tests/faults -m "" "$@"
fi
exec python -m pytest -n "${MIM_TEST_WORKERS:-2}" "$@"
