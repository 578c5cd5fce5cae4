#!/usr/bin/env bash
# Trains on a Cloud TPU VM: makes it, runs on all its hosts, goes on after a preemption.
#
#   launch/tpu_vm.sh create --name=NAME --accelerator=v5litepod-16 [--spot] [--queued]
#   launch/tpu_vm.sh run    --name=NAME --accelerator=v5litepod-16 [OPTION ...] -- --config=FILE ...
#   launch/tpu_vm.sh logs | status | stop | delete --name=NAME
#
# `run` makes the VM where there is none, copies this checkout's last commit to all hosts, installs
# it, starts jaxreason.main with what follows `--`, and prints the first host's log. The run goes on
# without this command; the same command follows it again. When the run was told to stop (exit code
# 75) or the VM is gone, `run` makes a new VM where it must and starts again: run.dir must be in a
# bucket. `stop` lets the run save and end; `delete` gives the VM back. Options:
#   --project=P --zone=Z    gcloud's own settings by default
#   --accelerator=TYPE      such as v5litepod-16, v5p-64, v6e-16 (see `--help` of gcloud)
#   --version=VERSION       of the VM's image; chosen by the accelerator by default
#   --spot                  cheaper, may be preempted at any time
#   --queued                wait in the queue of queued resources until there is room
#   --gcloud=OPTION         any other option of gcloud's create, such as --gcloud=--network=mine; may
#                           be repeated
#   --internal_ip           connect over the VM's internal address
#   --restarts=N            how often `run` starts again; 100 by default
#   --poll=SECONDS          between two looks at what is being waited for; 30 by default
#   --worker=N              whose log `logs` prints, a number or `all`; 0 by default
#   --dry-run               print the commands instead of running them
#
# Exit codes: 0 done, 2 bad input, 75 preempted more often than --restarts, else the run's or 1.

set -u

fail() { # MESSAGE [CODE]
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

say() {
    printf '%s\n' "$1" >&2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
# shellcheck source=launch/show.sh
. "$root/launch/show.sh"
name='' project='' zone='' accelerator='' version='' spot='' queued='' internal='' worker=0
restarts=100 poll=30 dry='' more=() action=${1:-}
case $action in
    create | run | logs | status | stop | delete) shift ;;
    --help | -h)
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) fail "got command '$action'; expected create, run, logs, status, stop or delete (--help)" ;;
esac
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    value=${1#*=}
    case $1 in
        --name=*) name=$value ;;
        --project=*) project=$value ;;
        --zone=*) zone=$value ;;
        --accelerator=*) accelerator=$value ;;
        --version=*) version=$value ;;
        --spot) spot=1 ;;
        --queued) queued=1 ;;
        --gcloud=*) more+=("$value") ;;
        --internal_ip) internal=1 ;;
        --restarts=*) restarts=$value ;;
        --poll=*) poll=$value ;;
        --worker=*) worker=$value ;;
        --dry-run) dry=1 ;;
        *) fail "unknown option '$1'; launch/tpu_vm.sh --help lists them (jaxreason.main's go after --)" ;;
    esac
    shift
done
[ "${1:-}" != -- ] || shift
if [ "$action" = run ]; then
    [ $# -ge 1 ] || fail "no run is named; expected the arguments of jaxreason.main after --: -- --config=FILE"
else
    [ $# -eq 0 ] || fail "$action takes no arguments of a run, got '$1'"
fi
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    fail "--name is '$name'; expected a letter, then letters, digits and hyphens, all lower case, 63 at most"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is '$restarts'; expected a whole number"
[[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--poll is '$poll'; expected seconds"
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker is '$worker'; expected a number or all"
case $action in
    create | run)
        [ -n "$accelerator" ] || fail "--accelerator is not set; expected a type such as v5litepod-16"
        case ${version:+given}/$accelerator in
            given/*) ;;
            /v5litepod-*) version=v2-alpha-tpuv5-lite ;;
            /v5p-*) version=v2-alpha-tpuv5 ;;
            /v6e-*) version=v2-alpha-tpuv6e ;;
            /v[234]-*) version='tpu-ubuntu2204-base' ;;
            *) fail "no image is known for --accelerator=$accelerator; name one with --version=" ;;
        esac
        ;;
esac
if [ -z "$dry" ]; then
    command -v gcloud >/dev/null || fail "gcloud is not on the PATH; install the Google Cloud CLI, or use --dry-run"
    if [ "$action" = run ]; then
        git -C "$root" rev-parse --verify -q HEAD >/dev/null 2>&1 ||
            fail "$root is no git checkout with a commit; run copies the last commit to the hosts"
    fi
fi

place=()
[ -z "$project" ] || place+=(--project="$project")
[ -z "$zone" ] || place+=(--zone="$zone")
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
patience=1 # questions to gcloud that may fail in a row; more once a run is under way
worker_py='python3 jaxreason/launch/tpu_worker.py'
scratch=''
[ -n "$dry" ] || scratch=$(mktemp -d) || exit 1
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT

# Runs a command, or prints it in a dry run.
do_() {
    if [ -n "$dry" ]; then show "$@"; else "$@"; fi
}

# Asks gcloud for one value: $answer, MISSING where there is no such thing. A dry run prints the
# question and takes what is given first as the answer.
ask() { # DRY_ANSWER COMMAND ...
    local pretended=$1 tries=0
    shift
    if [ -n "$dry" ]; then
        show "$@"
        answer=$pretended
        return 0
    fi
    while ! answer=$("$@" 2>"$scratch/err"); do
        if grep -qiE 'NOT_FOUND|not found' "$scratch/err"; then
            answer=MISSING
            return 0
        fi
        tries=$((tries + 1))
        if [ "$tries" -ge "$patience" ]; then
            tail -n 3 "$scratch/err" >&2
            fail "gcloud cannot say how $name is, see above (logged in? right project and zone?)" 1
        fi
        sleep "$poll"
    done
    [ -n "$answer" ] || answer=UNKNOWN
}

ask_vm() { # DRY_ANSWER
    ask "$1" "${tpu[@]}" describe "$name" ${place[@]+"${place[@]}"} '--format=value(state)'
}

ask_queue() { # DRY_ANSWER
    ask "$1" "${queue[@]}" describe "$name" ${place[@]+"${place[@]}"} '--format=value(state.state)'
}

on() { # WORKER COMMAND: runs a command line on one host, or on all
    local via=()
    [ -z "$internal" ] || via+=(--internal-ip)
    do_ "${tpu[@]}" ssh "$name" ${place[@]+"${place[@]}"} ${via[@]+"${via[@]}"} --worker="$1" \
        --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 --command="$2"
}

# Removes the VM and its place in the queue, as far as they are there.
remove() {
    local vm
    ask_vm READY
    vm=$answer
    ask_queue "$([ -n "$queued" ] && echo ACTIVE || echo MISSING)"
    if [ "$answer" != MISSING ]; then
        do_ "${queue[@]}" delete "$name" ${place[@]+"${place[@]}"} --force --quiet
    elif [ "$vm" != MISSING ]; then
        do_ "${tpu[@]}" delete "$name" ${place[@]+"${place[@]}"} --quiet
    else
        say "$name is not there; nothing was deleted"
    fi
}

# Runs a create command; where it fails, what it may have begun is removed.
try_create() {
    local code
    if [ -n "$dry" ]; then
        show "$@"
        return 0
    fi
    "$@" 2>&1 | tee "$scratch/create" >&2
    code=${PIPESTATUS[0]}
    [ "$code" -ne 0 ] || return 0
    if grep -qiE 'ALREADY_EXISTS|already exists' "$scratch/create"; then
        fail "$name has just been made by someone else; nothing was changed" 1
    fi
    remove
    return 1
}

# Makes the VM and waits until it is there; 1 where it could not, with nothing left behind.
make_vm() {
    if [ -z "$queued" ]; then
        try_create "${tpu[@]}" create "$name" ${place[@]+"${place[@]}"} \
            --accelerator-type="$accelerator" --version="$version" ${spot:+--spot} ${more[@]+"${more[@]}"}
        return
    fi
    ask_queue MISSING
    if [ "$answer" = ACTIVE ]; then # its VM may show in a moment
        sleep "$poll"
        ask_vm MISSING
        [ "$answer" = MISSING ] || return 0
        answer=ACTIVE
    fi
    case $answer in
        ACTIVE | FAILED | SUSPENDED | SUSPENDING) # its VM is gone, and it makes no other
            say "the request for $name is $answer and its VM is gone; asking anew"
            remove || return 1
            answer=MISSING
            ;;
    esac
    if [ "$answer" = MISSING ]; then
        try_create "${queue[@]}" create "$name" --node-id="$name" ${place[@]+"${place[@]}"} \
            --accelerator-type="$accelerator" --runtime-version="$version" ${spot:+--spot} \
            ${more[@]+"${more[@]}"} || return 1
    fi
    while ask_queue ACTIVE; [ "$answer" != ACTIVE ]; do
        case $answer in
            FAILED | SUSPENDED | SUSPENDING | DELETING | MISSING)
                say "the request for $name is $answer"
                remove
                return 1
                ;;
        esac
        say "the request for $name is $answer; looking again in $poll s"
        sleep "$poll"
    done
}

install() {
    local archive="$scratch/jaxreason.tar.gz"
    if [ -n "$dry" ]; then
        archive=jaxreason.tar.gz
    elif [ -n "$(git -C "$root" status --porcelain 2>/dev/null)" ]; then
        say "uncommitted changes of $root are not copied"
    fi
    do_ git -C "$root" archive --format=tar.gz -o "$archive" HEAD &&
        do_ "${tpu[@]}" scp "$archive" "$name:jaxreason.tar.gz" ${place[@]+"${place[@]}"} \
            ${internal:+--internal-ip} --worker=all &&
        on all "mkdir -p jaxreason && find jaxreason -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + && tar -xzf jaxreason.tar.gz -C jaxreason && $worker_py install"
}

# How the run on the first host is: $answer is none, running ID, exited CODE ID, gone ID (the host
# was restarted under it), or LOST (no answer).
host_status() { # DRY_ANSWER
    local ask_it="if [ -e jaxreason/launch/tpu_worker.py ]; then $worker_py status; else echo none; fi"
    if [ -n "$dry" ]; then
        on 0 "$ask_it"
        answer=$1
    else
        answer=$(on 0 "$ask_it" 2>"$scratch/err" | grep -E '^(none|running .+|gone .+|exited [0-9]+ .+)$' | tail -n 1)
        [ -n "$answer" ] || answer=LOST
    fi
}

# Counts what went wrong on the way to the hosts; gives up after ten in a row.
lose() {
    lost=$((lost + 1))
    if [ "$lost" -ge 10 ]; then
        [ ! -s "$scratch/err" ] || tail -n 3 "$scratch/err" >&2
        fail "$1, ten times in a row; $name is kept, see: launch/tpu_vm.sh status --name=$name" 1
    fi
    say "$1; trying again in $poll s"
    sleep "$poll"
}

# Spends a restart, or ends with exit code 75.
again() {
    [ "$left" -gt 0 ] || fail "$1; not started again after $restarts restarts (--restarts)" 75
    left=$((left - 1))
    say "$1; starting again ($left more restarts allowed)"
    sleep "$poll" # what takes the VM away may take a moment to show
}

run() {
    local left=$restarts lost=0 installed='' begun='' id='' arguments code
    arguments=$(printf '%q ' "$@")
    while :; do
        ask_vm "$([ -n "$begun" ] && echo READY || echo MISSING)"
        case $answer in
            READY) ;;
            MISSING)
                if make_vm; then
                    installed=''
                elif [ -n "$begun" ]; then
                    again "$name could not be made"
                else
                    fail "$name could not be made; see the lines above" 1
                fi
                begun=1
                continue
                ;;
            PREEMPTED | TERMINATED)
                begun=1
                again "$name is $answer"
                remove || lose "$name could not be deleted"
                continue
                ;;
            CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | DELETING)
                say "$name is $answer; looking again in $poll s"
                sleep "$poll"
                continue
                ;;
            *) fail "$name is $answer; start it, or delete it with launch/tpu_vm.sh delete" 1 ;;
        esac
        begun=1 patience=10
        host_status none
        case $answer in
            LOST)
                lose "the first host of $name does not answer"
                continue
                ;;
            running\ *)
                id=${answer#running }
                say "a run is under way on $name; following it (stop it to start another)"
                ;;
            exited\ *" $id") ;; # the one that was followed has ended out of sight
            *)
                if [ -z "$installed" ] && ! install; then
                    lose "the hosts of $name could not be set up"
                    continue
                fi
                installed=1
                id=$(date +%Y%m%d-%H%M%S)-$$-$left-$lost
                if ! on all "JAXREASON_COMMIT=$commit $worker_py start $id $arguments"; then
                    # The same ID: hosts on which it has begun do not begin again.
                    sleep "$poll"
                    on all "JAXREASON_COMMIT=$commit $worker_py start $id $arguments" || {
                        lose "the run could not be started on all hosts of $name"
                        continue
                    }
                fi
                ;;
        esac
        while :; do
            on 0 "$worker_py follow" || say "the connection to $name was lost"
            host_status 'exited 0 -'
            case $answer in
                running\ *) sleep "$poll" ;; # only the connection has ended
                *) break ;;
            esac
        done
        case $answer in
            exited\ *)
                lost=0
                code=${answer#exited }
                code=${code%% *}
                ;;
            gone\ *) code=gone ;;
            *)
                lose "the first host of $name does not say how the run is"
                continue
                ;;
        esac
        id=''
        case $code in
            0)
                [ -z "$dry" ] || say "dry run: nothing was done; when told to stop, or when $name is gone, run begins again at the first line"
                [ -n "$dry" ] || say "done; $name still runs and costs: launch/tpu_vm.sh delete --name=$name"
                return 0
                ;;
            75) again "the run was told to stop, and has saved" ;;
            gone) again "the first host was restarted under the run" ;;
            *)
                # A host that goes down under a run leaves any code at all.
                ask_vm READY
                [ "$answer" != READY ] || fail "the run failed with exit code $code; its end: launch/tpu_vm.sh logs --name=$name --worker=all" "$code"
                ;;
        esac
    done
}

case $action in
    create)
        ask_vm MISSING
        [ "$answer" = MISSING ] || fail "$name is there already, it is $answer" 1
        make_vm || fail "$name could not be made; see the lines above" 1
        ;;
    run)
        commit=$(git -C "$root" describe --always --abbrev=12 2>/dev/null)
        trap 'say "the run goes on without this command; the same command follows it again"; exit 130' INT
        run "$@"
        ;;
    logs) on "$worker" "$worker_py follow 20000" ;;
    stop) on all "$worker_py stop" ;;
    status)
        ask_vm READY
        say "$name is $answer"
        if [ "$answer" = READY ]; then
            host_status none
            say "its run: $answer"
        fi
        ;;
    delete) remove ;;
esac
