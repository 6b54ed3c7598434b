#!/usr/bin/env bash
# Train on this machine: launch/run_local.sh NUM_RANKS RECIPE [section.field=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: $0 NUM_RANKS RECIPE [section.field=value ...]" >&2; exit 2; }
source launch/env.sh
ranks=$1
shift
exec "${PYTHON:-.venv/bin/python}" -m internvl_megatron train "$@" --nproc "$ranks"
