#!/usr/bin/env bash
# One rank of a step: runs its command and writes down a bad end, `exit-RANK` in LOG_FOLDER with exit code and host.
# srun's own exit code is the largest of all, and the ranks it ends after a bad one have large ones.
set -uo pipefail
trap : USR1 TERM INT # signals reach every process of a step; the command decides
code=0
"$@" || code=$?
[ "$code" -eq 0 ] || echo "$code $(hostname)" >"$LOG_FOLDER/exit-$STEP_NAME-$SLURM_PROCID"
exit "$code"
