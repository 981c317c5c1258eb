#!/usr/bin/env bash
# Set up, run the demo comparison, say where the report is. Arguments go to `mim compare`.
# Run again, it continues where it stopped and keeps what is finished.
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
setup ""
exec mim compare --config configs/compare/demo.yaml "$@"
