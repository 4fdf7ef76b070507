#!/usr/bin/env bash
# All folds of a run, one process a fold, one fold a GPU at a time. A complete fold is skipped, an incomplete one
# resumes, a failed one does not stop the others. Ctrl-C and SIGTERM stop every fold: it saves a checkpoint at the end
# of its step, for which there are two minutes; a second Ctrl-C does not wait.
#
#   scripts/launch_folds.sh recipes/qwen3-8b/anchor.yaml --augmented_file augmented.jsonl
#   JOBS=2 scripts/launch_folds.sh recipes/minilm/demo.yaml --output_dir outputs/demo
#   scripts/launch_folds.sh RECIPE --jobs l4x1 --timeout 6h --hub_namespace ORG --hub_name NAME --dry_run
#
# With --jobs each fold is a Job on the Hub, on a machine of that flavor: scripts/launch_jobs.py.
# Flags behind the recipe go to every fold. `fold: K` in the recipe, or --fold K, launches that fold alone.
# Logs: OUTPUT_DIR/logs/fold-K.log. Exit status: 0, 1 (a fold failed), 2 (a mistake in the recipe or the flags, or every fold
# that failed says that the user can mend it), 129, 130 or 143 (stopped).
#
# Environment:
#   GPUS    the GPUs to use, "0 1 2". Default: CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists. Empty: the CPU.
#   JOBS    folds at a time on the CPU (1)
#   PYTHON  the interpreter (.venv/bin/python of this repository, or python3)
#   SCRIPT  what trains a fold (run_classification.py of this repository)
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=${0##*/}

die() {
    echo "$name: error: $1" >&2
    exit 2
}

[ $# -gt 0 ] || die "usage: $name RECIPE [flags of run_classification.py]"
for word in "$@"; do
    if [[ $word =~ ^(-h|--help)$ ]]; then
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit 0
    fi
done
recipe=$1
shift
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
script=${SCRIPT:-$root/run_classification.py}
[ -f "$script" ] || die "$script: no such script"
jobs=${JOBS:-1}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || die "JOBS must be a positive number, not '$jobs'"

# The folds' number and place: the last flag wins over the recipe, as in the script itself.
settings=$(PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" - "$name" "$recipe" "$@" <<'PY'
import sys

from rareturn.command_line import read_recipe, run
from rareturn.errors import InputError


def main() -> None:
    recipe, *flags = sys.argv[1:]
    settings = {"num_folds": 5, **read_recipe(recipe)}
    for position, flag in enumerate(flags):
        key, given, value = flag.partition("=")
        key = key.replace("-", "_").removeprefix("__") if key.startswith("--") else ""
        if key in ("fold", "num_folds", "output_dir", "validation_file"):
            settings[key] = value if given else (flags[position + 1 :] or [""])[0]
    if settings.get("validation_file"):
        settings["num_folds"] = 1  # one model, judged on that file
    elif not str(settings["num_folds"]).isdecimal() or int(settings["num_folds"]) < 2:
        raise InputError(f"num_folds must be a number from 2 up, not {settings['num_folds']!r}")
    if not settings.get("output_dir"):
        raise InputError(f"{recipe}: output_dir is neither in the recipe nor among the flags")
    first, end = 0, int(settings["num_folds"])
    if "fold" in settings:
        if str(settings["fold"]) not in map(str, range(end)):
            raise InputError(f"fold must be one of 0 to {end - 1}, not {settings['fold']!r}")
        first, end = int(settings["fold"]), int(settings["fold"]) + 1
    print(f"{first} {end} {settings['output_dir']}")


sys.argv = sys.argv[1:]  # this shell script's name, for the error's line
run(main)
PY
) || exit $?
read -r first_fold end_fold output_dir <<<"$settings"

# A slot is a GPU's number, or "cpu": each runs one fold at a time.
if [ -z "${GPUS+set}" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        GPUS=$CUDA_VISIBLE_DEVICES
    else
        # Where there is a driver but no GPU, nvidia-smi says so in words.
        GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+' | tr '\n' ' ')
    fi
fi
read -r -a slots <<<"${GPUS//,/ }"
if [ ${#slots[@]} -eq 0 ]; then
    for ((job = 0; job < jobs; job++)); do slots+=(cpu); done
    if [ "$jobs" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
        cores=$(getconf _NPROCESSORS_ONLN)
        export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
    fi
fi

# The recipe is read before the help is shown: a typing error is said once, not once per fold, and nothing is written.
if [ -z "${SCRIPT:-}" ]; then
    "$PYTHON" "$script" --config "$recipe" --help_all >/dev/null || exit 2
fi

for flag in "$@"; do
    if [[ $flag =~ ^--jobs(=|$) ]]; then
        exec "$PYTHON" "$root/scripts/launch_jobs.py" "$recipe" "$first_fold" "$end_fold" "$output_dir" "$@"
    fi
done

mkdir -p "$output_dir/logs" || die "$output_dir: cannot be written"
stamps=$(mktemp -d) || exit 1
metric=score                           # the name of what a fold's metrics hold
failure=2                              # the exit status where folds fail: 2 if all that fail end so
pid_in=() fold_in=()                  # by the slot's position
began=() seconds=() status=() score=() # by fold

# shellcheck disable=SC2317  # the traps call it
signal_folds() {
    local group signalled=1
    for group in $groups; do
        kill "-$1" -- "-$group" 2>/dev/null && signalled=0
    done
    return "$signalled"
}

# shellcheck disable=SC2317
stop_folds() {
    local groups tick
    groups=$(jobs -p) # not pid_in: the signal may come before a fold that has just started is noted there
    trap 'signal_folds KILL; exit 137' INT TERM HUP
    echo "$name: stopping folds ${fold_in[*]} at their next checkpoint; again to kill them" >&2
    signal_folds TERM
    # Two minutes to end by themselves, workers included.
    for ((tick = 0; tick < 600; tick++)); do
        signal_folds 0 || exit "$1"
        sleep 0.2
    done
    signal_folds KILL
    exit "$1"
}
trap 'rm -rf "$stamps"' EXIT
trap 'stop_folds 130' INT
trap 'stop_folds 143' TERM
trap 'stop_folds 129' HUP

# The words of a command, the value of every --…_token hidden: logs are shown around.
without_secrets() {
    local word hide='' shown=()
    for word in "$@"; do
        if [ -n "$hide" ]; then
            shown+=('***')
            hide=''
        elif [[ $word =~ ^(--([a-zA-Z_-]+[_-])?token)= ]]; then
            shown+=("${BASH_REMATCH[1]}=***")
        else
            shown+=("$word")
            [[ ! $word =~ ^--([a-zA-Z_-]+[_-])?token$ ]] || hide=yes
        fi
    done
    echo "${shown[*]}"
}

start_fold() {
    local fold=$1 slot=$2 log=$output_dir/logs/fold-$1.log
    local command=("$PYTHON" "$script" --config "$recipe" --fold "$fold" "${@:3}") devices=${slots[$2]}
    devices=${devices#cpu}
    # A log grows: the lines of a fold's training stay when the complete fold is launched again.
    printf '== %s: %s\n' "$(date '+%F %T')" "$(without_secrets "${command[@]}")" >>"$log"
    touch "$stamps/$fold"
    began[fold]=$SECONDS
    # Job control gives each fold a process group of its own, workers included, that can be stopped as one.
    set -m
    CUDA_VISIBLE_DEVICES=$devices "${command[@]}" >>"$log" 2>&1 </dev/null &
    pid_in[slot]=$!
    set +m
    fold_in[slot]=$fold
    echo "fold $fold (${slots[$slot]}): started, log in $log"
}

read_score() {
    "$PYTHON" - "$output_dir/fold-$1/metrics.json" <<'PY'
import json
import sys


def find(content):
    if not isinstance(content, dict):
        return None
    metric = content.get("metric", "macro_f1_positive")
    if isinstance(content.get(metric), (int, float)):
        return metric, content[metric]
    return next((found for value in content.values() if (found := find(value))), None)


try:
    with open(sys.argv[1], encoding="utf-8") as file:
        found = find(json.load(file))
except (OSError, ValueError):
    found = None
print("{} {:.4f}".format(*found) if found else "score -")
PY
}

finish_fold() {
    local slot=$1 fold=${fold_in[$1]} exit_status=$2 metrics=$output_dir/fold-${fold_in[$1]}/metrics.json
    kill -KILL -- "-${pid_in[slot]}" 2>/dev/null # workers that outlived their fold
    unset "pid_in[slot]" "fold_in[slot]"
    seconds[fold]=$((SECONDS - began[fold]))
    score[fold]=-
    if [ "$exit_status" -ne 0 ]; then
        status[fold]=failed
        [ "$exit_status" -eq 2 ] || failure=1
    else
        # A script that finds its fold complete leaves the metrics as they are.
        status[fold]='done'
        [ ! -e "$metrics" ] || [ "$metrics" -nt "$stamps/$fold" ] || status[fold]=skipped
        read -r metric "score[fold]" <<<"$(read_score "$fold")"
    fi
    echo "fold $fold (${slots[$slot]}): ${status[fold]} after ${seconds[fold]} s, $metric ${score[fold]}"
}

next=$first_fold
while [ "$next" -lt "$end_fold" ] || [ ${#pid_in[@]} -gt 0 ]; do
    for slot in "${!slots[@]}"; do
        if [ -n "${pid_in[slot]:-}" ] && ! kill -0 "${pid_in[slot]}" 2>/dev/null; then
            wait "${pid_in[slot]}" 2>/dev/null
            finish_fold "$slot" $?
        fi
        if [ -z "${pid_in[slot]:-}" ] && [ "$next" -lt "$end_fold" ]; then
            start_fold "$next" "$slot" "$@"
            next=$((next + 1))
        fi
    done
    [ ${#pid_in[@]} -eq 0 ] || sleep 0.2
done

failed=()
printf '\n%4s  %-7s  %8s  %8s\n' fold status seconds "$metric"
for ((fold = first_fold; fold < end_fold; fold++)); do
    printf '%4s  %-7s  %8s  %8s\n' "$fold" "${status[fold]}" "${seconds[fold]}" "${score[fold]}"
    [ "${status[fold]}" != failed ] || failed+=("$fold")
done
[ ${#failed[@]} -gt 0 ] || exit 0
for fold in "${failed[@]}"; do
    log=$output_dir/logs/fold-$fold.log
    printf '\n%s: fold %s failed; %s ends:\n' "$name" "$fold" "$log" >&2
    tail -n 8 "$log" | sed 's/^/    /' >&2
done
echo "$name: error: failed folds: ${failed[*]}" >&2
exit "$failure"
