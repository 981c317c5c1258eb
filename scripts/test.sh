#!/usr/bin/env bash
# Set up with the test tools and run the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
setup dev
# One thread a worker: two workers on two cores would otherwise wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n "${MIM_TEST_WORKERS:-2}" "$@"
