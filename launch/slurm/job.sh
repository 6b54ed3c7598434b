# shellcheck shell=bash
# What the jobs beside it have in common: environment, container, steps that pass signals on, restarts. Sourced, not run.
#
# Read from the environment, all optional (`internvl-megatron launch` sets them):
#   LAUNCH_FOLDER  where env.sh and slurm/ are (default: launch/ where the job was submitted)
#   JOB_FOLDER     what belongs to this job: logs, node reports, its history (default: runs/slurm-ID)
#   RUN_FOLDER     what training writes; its checkpoints tell whether an attempt got anywhere
#   PYTHON         the interpreter (default: .venv/bin/python)
#   CONTAINER      pyxis:IMAGE or apptainer:IMAGE; CONTAINER_MOUNTS, as either takes them: SRC:DST,SRC:DST
#   NODE_COUNTS    numbers of nodes the layout fits, largest first; with fewer nodes than allotted the rest stays idle
#   PREFLIGHT      on (default): look at the nodes first; bandwidth: and time their network; off
#   EXPECTED_GPUS  GPUs of a node; INSIDE_GBS, BETWEEN_GBS: all-reduce bandwidth expected inside and between nodes
#   NODE_ORDER     pipeline or data: what is near in the network (internvl_megatron/cluster/node_order.py); unset: as SLURM has them
#   WATCHDOG_SECONDS       a step that writes nothing for so long is ended (default: 1800)
#   MAX_IDLE_ATTEMPTS      attempts without a new checkpoint, after which the job gives up (default: 3)
#   MASTER_ADDR, MASTER_PORT   where ranks meet (default: the first host of the step, a port that follows from the job's id)

PYTHON=${PYTHON:-.venv/bin/python}
JOB_FOLDER=${JOB_FOLDER:-runs/slurm-$SLURM_JOB_ID}
ATTEMPT=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
LOG_FOLDER=$JOB_FOLDER/logs/$ATTEMPT
export LOG_FOLDER
mkdir -p "$LOG_FOLDER"
touch "$LOG_FOLDER/started"

say() {
    echo "$(date '+%Y-%m-%d %H:%M:%S') job $ATTEMPT: $*"
}

# The largest number of nodes that the layout fits and that there are.
nodes=$SLURM_JOB_NUM_NODES
for count in ${NODE_COUNTS:-}; do
    if [ "$count" -le "$SLURM_JOB_NUM_NODES" ]; then
        nodes=$count
        break
    fi
done
[ "$nodes" -eq "$SLURM_JOB_NUM_NODES" ] || say "$SLURM_JOB_NUM_NODES nodes allotted, the layout takes $nodes of them"

: "${SLURM_NTASKS_PER_NODE:?sbatch needs --ntasks-per-node}"
step_options=() # for srun
in_container=() # in front of the command
case ${CONTAINER:-} in
    '') ;;
    pyxis:*)
        step_options+=("--container-image=${CONTAINER#pyxis:}" "--container-workdir=$PWD"
            "--container-mounts=${CONTAINER_MOUNTS:+$CONTAINER_MOUNTS,}$PWD:$PWD")
        ;;
    apptainer:*)
        in_container=(apptainer exec --nv --pwd "$PWD" --bind "${CONTAINER_MOUNTS:+$CONTAINER_MOUNTS,}$PWD:$PWD"
            "${CONTAINER#apptainer:}")
        ;;
    *)
        say "CONTAINER=$CONTAINER: write pyxis:IMAGE or apptainer:IMAGE" >&2
        exit 2
        ;;
esac

# Ends the job's steps when none of its logs has grown for WATCHDOG_SECONDS: a hang that no time limit of a collective sees.
watch_logs() {
    local limit=${WATCHDOG_SECONDS:-1800} newest
    while sleep $((limit < 120 ? limit / 4 + 1 : 30)); do
        newest=$(find "$LOG_FOLDER" ${RUN_FOLDER:+"$RUN_FOLDER"} -maxdepth 1 -type f -printf '%T@\n' | sort -n | tail -n 1) || continue # a file that is just renamed
        if [ $(($(date +%s) - ${newest%.*})) -gt "$limit" ]; then
            say "nothing was written for $limit seconds: ending the step"
            squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep -v '[a-z]' | xargs --no-run-if-empty scancel
            return
        fi
    done
}

noticed='' cancelled=''

# run_step NAME SRUN_OPTION... -- COMMAND...: one rank per task, a log for each; passes the signals on that this script gets.
# Returns the exit code of the rank that ended badly first.
run_step() {
    local name=$1 options=() step watchdog code signalled first host distribution=block:block
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    [ -z "${SLURM_HOSTFILE:-}" ] || distribution=arbitrary
    # Block by block: tensor-parallel ranks are neighbours, so they stay inside a node.
    srun --job-name="$name" --nodes="$nodes" --ntasks=$((nodes * SLURM_NTASKS_PER_NODE)) \
        --distribution="$distribution" --kill-on-bad-exit=1 \
        --output="$LOG_FOLDER/$name-%t.log" ${step_options[@]+"${step_options[@]}"} ${options[@]+"${options[@]}"} \
        --export="ALL,STEP_NAME=$name" bash "$LAUNCH_FOLDER/slurm/rank.sh" \
        ${in_container[@]+"${in_container[@]}"} "$@" &
    step=$!
    watch_logs &
    watchdog=$!
    trap 'say "the time limit is near: the run saves and stops"; kill -USR1 "$step"; signalled=yes noticed=yes' USR1
    # This script gets SIGTERM with its steps when the job is cancelled, and at the time limit, of which there was notice; not at
    # a preemption. SLURM would requeue a cancelled job if asked to.
    trap 'say "asked to end"; kill -TERM "$step"; signalled=yes; [ -n "$noticed" ] || cancelled=yes' TERM
    while :; do # a signal ends `wait`, not the step
        code=0 signalled=
        wait "$step" || code=$?
        [ -n "$signalled" ] || break
    done
    trap - USR1 TERM
    kill "$watchdog" 2>/dev/null || true
    if [ "$code" -ne 0 ]; then # what came first is the reason; by the clock of the file system
        first=$(find "$LOG_FOLDER" -name "exit-$name-*" -printf '%T@ %p\n' | sort -n | head -n 1)
        if [ -n "$first" ]; then
            read -r code host <"${first#* }"
            say "$name: rank ${first##*-} on $host ended first, with exit code $code"
        fi
    fi
    return "$code"
}

newest_checkpoint() {
    [ -d "${RUN_FOLDER:-}/checkpoints" ] || return 0
    find "$RUN_FOLDER/checkpoints" -maxdepth 1 -regex '.*/step-[0-9]+' -printf '%f\n' | sort | tail -n 1
}

# Counts attempts since the newest checkpoint changed, and gives up when there were too many.
count_attempt() {
    local newest last=- idle=0
    newest=$(newest_checkpoint)
    [ ! -f "$JOB_FOLDER/progress" ] || read -r last idle <"$JOB_FOLDER/progress"
    [ "${newest:-none}" = "$last" ] && idle=$((idle + 1)) || idle=0
    echo "${newest:-none} $idle" >"$JOB_FOLDER/progress.writing"
    mv "$JOB_FOLDER/progress.writing" "$JOB_FOLDER/progress"
    say "on $nodes of $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), from checkpoint ${newest:-none}"
    if [ "$idle" -ge "${MAX_IDLE_ATTEMPTS:-3}" ]; then
        say "$idle attempts in a row ended before a new checkpoint: giving up; see $JOB_FOLDER/logs" >&2
        exit 1
    fi
}

# Back into the queue as the same job, or as a new one where nodes are to be left out or the site forbids requeueing.
start_again() {
    local exclude=() new
    if [ -n "$cancelled" ]; then
        say "cancelled: not started again"
        return
    fi
    if [ -s "$JOB_FOLDER/excluded_nodes" ]; then
        exclude=("--exclude=$(sort -u "$JOB_FOLDER/excluded_nodes" | paste -sd,)")
    elif scontrol requeue "$SLURM_JOB_ID"; then
        sleep 60 # the end comes from outside
        return
    fi
    if [ ! -f "$JOB_FOLDER/job.sbatch" ]; then
        say "cannot be requeued: submit it again" >&2
        return
    fi
    # What SLURM said of this job must not be said of the next.
    new=$(for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
        sbatch --parsable --dependency="afterany:${ATTEMPT%-*}" ${exclude[@]+"${exclude[@]}"} "$JOB_FOLDER/job.sbatch")
    echo "${new%%;*}" >>"$JOB_FOLDER/jobs"
    say "goes on as job ${new%%;*} ${exclude[*]:-}"
}

# order_nodes RECIPE_OR_CONFIG [section.field=value ...]: the next steps have their ranks on the nodes in the order of NODE_ORDER, for
# the layout of a run that gets these arguments.
order_nodes() {
    local addresses=$LOG_FOLDER/addresses hosts
    # shellcheck disable=SC2016 # the nodes know where they are
    srun --job-name=addresses --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        bash -c 'echo "$SLURMD_NODENAME ${SLURM_TOPOLOGY_ADDR:-$SLURMD_NODENAME}"' >"$addresses"
    hosts=$(srun --job-name=order --nodes=1 --ntasks=1 ${step_options[@]+"${step_options[@]}"} \
        ${in_container[@]+"${in_container[@]}"} "$PYTHON" -m internvl_megatron.cluster.node_order \
        "$1" "$addresses" "$NODE_ORDER" "$SLURM_NTASKS_PER_NODE" "${@:2}")
    export SLURM_HOSTFILE=$LOG_FOLDER/hosts MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
    while read -r host; do
        for ((task = 0; task < SLURM_NTASKS_PER_NODE; task++)); do echo "$host"; done
    done <<<"$hosts" >"$SLURM_HOSTFILE"
}

# Looks at all nodes; those that are not fit are written down, and the job goes on without them as another one.
preflight() {
    local reports=$LOG_FOLDER/nodes started bad code=0
    started=$(date +%s)
    # A node that cannot even run this has no report.
    srun --job-name=preflight --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --output="$LOG_FOLDER/nodes-%t.log" ${step_options[@]+"${step_options[@]}"} ${in_container[@]+"${in_container[@]}"} \
        "$PYTHON" -m tools.preflight node "$reports" --run-folder "${RUN_FOLDER:-$JOB_FOLDER}" \
        ${EXPECTED_GPUS:+--gpus "$EXPECTED_GPUS"} || say "preflight ended with exit code $?"
    if [ "$PREFLIGHT" = bandwidth ]; then
        run_step bandwidth -- "$PYTHON" -m tools.preflight bandwidth "$reports" || say "the network could not be timed"
    fi
    bad=$(srun --job-name=judge --nodes=1 --ntasks=1 ${step_options[@]+"${step_options[@]}"} \
        ${in_container[@]+"${in_container[@]}"} "$PYTHON" -m tools.preflight judge "$reports" --started "$started" \
        --hosts "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" \
        ${INSIDE_GBS:+--inside-gbs "$INSIDE_GBS"} ${BETWEEN_GBS:+--between-gbs "$BETWEEN_GBS"}) || code=$?
    case $code in
        0) return ;;
        1) ;;
        *)
            say "the nodes could not be judged (exit code $code); PREFLIGHT=off goes on without" >&2
            exit 2
            ;;
    esac
    echo "$bad" >>"$JOB_FOLDER/excluded_nodes"
    say "bad nodes: $(echo "$bad" | paste -sd,)"
    start_again
    exit 1
}
