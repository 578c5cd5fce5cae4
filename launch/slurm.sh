#!/usr/bin/env bash
# Submits a training run to SLURM; it saves and queues itself again when it is told to stop.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 [OPTION ...] -- --config=FILE ...
#
# What follows `--` are the arguments of jaxreason.main; run.dir must be a folder (or bucket) that
# all nodes see. Options:
#   --nodes=N           nodes; 1 by default
#   --gpus=N            GPUs of each node; 8 by default, 0 for a run on CPUs
#   --per=gpu|node      a process for each GPU (default, what JAX advises) or one for all of a node
#   --cpus=N            CPU cores of each process
#   --time=LIMIT        of one start, as SLURM writes it: 24:00:00, 2-00:00:00
#   --name=NAME         of the job; jaxreason by default
#   --partition=P  --account=A
#   --sbatch=OPTION     any other option of sbatch, such as --sbatch=--qos=high; may be repeated
#   --save_seconds=N    the tasks are told to save so long before the limit; 120 by default
#   --wait=N            seconds the other tasks have after the first has ended; 60 by default
#   --restarts=N        how often the job queues itself again; 100 by default
#   --log=FILE          of the job, with SLURM's %j; NAME-%j.log by default
#   --python=FILE       interpreter on the nodes; .venv/bin/python of this checkout by default
#   --dry-run           print the command instead of running it
#
# Exit codes: 0 submitted, 2 bad input, else that of sbatch.

set -u

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

whole() { # NAME VALUE LEAST: the value, if it is a whole number
    case $2 in
        '' | *[!0-9]*) fail "--$1 is '$2'; expected a whole number" ;;
    esac
    [ "$2" -ge "$3" ] || fail "--$1 is $2; expected $3 or more"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
# shellcheck source=launch/show.sh
. "$root/launch/show.sh"
nodes=1 gpus=8 per=gpu cpus='' time='' name=jaxreason partition='' account='' save_seconds=120
wait=60 restarts=100 log='' python="$root/.venv/bin/python" dry='' more=()

while [ $# -gt 0 ] && [ "$1" != -- ]; do
    value=${1#*=}
    case $1 in
        --help | -h)
            sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --dry-run) dry=1 ;;
        --nodes=*) nodes=$value ;;
        --gpus=*) gpus=$value ;;
        --per=*) per=$value ;;
        --cpus=*) cpus=$value ;;
        --time=*) time=$value ;;
        --name=*) name=$value ;;
        --partition=*) partition=$value ;;
        --account=*) account=$value ;;
        --sbatch=*) more+=("$value") ;;
        --save_seconds=*) save_seconds=$value ;;
        --wait=*) wait=$value ;;
        --restarts=*) restarts=$value ;;
        --log=*) log=$value ;;
        --python=*) python=$value ;;
        *) fail "unknown option '$1'; launch/slurm.sh --help lists them (jaxreason.main's go after --)" ;;
    esac
    shift
done
[ $# -ge 2 ] || fail "no run is named; expected the arguments of jaxreason.main after --: -- --config=FILE"
shift

whole nodes "$nodes" 1
whole gpus "$gpus" 0
whole save_seconds "$save_seconds" 1
whole wait "$wait" 1
whole restarts "$restarts" 0
[ -z "$cpus" ] || whole cpus "$cpus" 1
[ -n "$name" ] || fail "--name is empty; expected the job's name"
case $per in
    gpu) tasks=$gpus ;;
    node) tasks=1 ;;
    *) fail "--per is '$per'; expected gpu or node" ;;
esac
[ "$tasks" -ge 1 ] || tasks=1
case $python in # a bare name is looked for on the nodes' PATH
    */*) [ -n "$dry" ] || [ -x "$python" ] || fail "--python is '$python', which cannot be run; make venv builds .venv" ;;
esac

settings=(
    "JAXREASON_DIR=$root" "JAXREASON_PYTHON=$python"
    "JAXREASON_RESTARTS=$restarts" "JAXREASON_WAIT=$wait"
)
if [ "$per" = node ] && [ "$gpus" -gt 1 ]; then
    # Under SLURM JAX gives each process one GPU unless told which.
    settings+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))")
fi
options=(
    --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" --export=ALL
    --signal="TERM@$save_seconds" --output="${log:-${name//\//_}-%j.log}"
)
[ "$gpus" -eq 0 ] || options+=(--gpus-per-node="$gpus")
[ -z "$cpus" ] || options+=(--cpus-per-task="$cpus")
[ -z "$time" ] || options+=(--time="$time")
[ -z "$partition" ] || options+=(--partition="$partition")
[ -z "$account" ] || options+=(--account="$account")

command=(env "${settings[@]}" sbatch "${options[@]}" ${more[@]+"${more[@]}"} "$root/launch/slurm.sbatch" "$@")
if [ -n "$dry" ]; then
    show "${command[@]}"
    exit 0
fi
command -v sbatch >/dev/null || fail "sbatch is not on the PATH; run this on a login node of the cluster, or with --dry-run"
"${command[@]}"
code=$?
[ "$code" -eq 0 ] || printf 'error: sbatch failed with exit code %s; nothing was submitted\n' "$code" >&2
exit "$code"
