#!/usr/bin/env bash
# Runs benchmark/slurm.sbatch on a real Slurm: a cluster of this machine alone, set up in a temporary folder.
#
#   tests/slurm_test.sh              PYTHON is the interpreter that has the packages; python if unset
#
# An array of four short runs is submitted. One task is requeued, one gets the signal that comes before a time limit,
# and two are preempted by a job of higher priority. Then every run must have all its rows, each once, and the same
# bytes as a run that nobody disturbed. Takes one to three minutes. Needs slurmctld, slurmd and munged; installs
# Debian's slurm-wlm and munge if it can (root, apt-get), and otherwise says SKIP and exits with 77.
set -euo pipefail

export PATH=$PATH:/usr/sbin PYTHON=${PYTHON:-python}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ======== Slurm ========

installed() {
    command -v slurmctld && command -v slurmd && command -v munged
} >/dev/null

install_slurm() {
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return
    echo "installing Debian's slurm-wlm and munge"
    apt-get update -q >/dev/null || return
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge >/dev/null
}

if ! installed && ! { install_slurm && installed; }; then
    echo "SKIP: there is no Slurm here, and it cannot be installed"
    exit 77
fi

work=$(mktemp -d)
export SLURM_CONF=$work/slurm.conf
daemons=()

clean_up() {
    local pid end=$((SECONDS + 20))
    if [[ ${daemons[*]} ]]; then
        scancel --user="$(id -un)" || :
        until no_jobs || ((SECONDS > end)); do sleep 0.1; done
    fi
    # The last started first: munged serves the others until they have ended.
    for pid in "${daemons[@]}"; do
        kill "$pid" 2>/dev/null || :
        wait "$pid" 2>/dev/null || :
    done
    rm -rf "$work"
}
trap clean_up EXIT

fail() {
    echo "FAILED: $*" >&2
    tail -n 20 "$work"/*.log "$work"/slurm-*.out >&2 || :
    exit 1
}

# Waits so many seconds at most for a command to succeed.
wait_for() {
    local end=$((SECONDS + $1))
    while ! "${@:2}"; do
        ((SECONDS < end)) || fail "no ${*:2} within $1 s"
        sleep 0.1
    done
}

no_jobs() {
    local jobs
    jobs=$(squeue --noheader) && [[ ! $jobs ]]
}
node_is_idle() { [[ $(sinfo --noheader --format=%t 2>/dev/null) == *idle* ]]; }
munge_answers() { munge --socket="$work/munge.socket" --no-input >/dev/null 2>&1; }

start_cluster() {
    local user host ports
    user=$(id -un) host=$(hostname -s)
    read -r -a ports < <("$PYTHON" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*[server.getsockname()[1] for server in sockets])')
    mkdir "$work/state" "$work/spool"
    (umask 077 && head -c 1024 /dev/urandom >"$work/munge.key")
    # Requeued tasks start again after cred_expire; memory and CPUs are what this file says.
    cat >"$SLURM_CONF" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$work/completed
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=2
EOF
    munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" \
        --pid-file="$work/munged.pid" --seed-file="$work/munged.seed" --log-file="$work/munged.log" \
        >/dev/null 2>&1 &
    daemons=("$!")
    wait_for 20 munge_answers
    slurmctld -D -L "$work/slurmctld.log" >/dev/null 2>&1 &
    daemons=("$!" "${daemons[@]}")
    slurmd -D -L "$work/slurmd.log" >/dev/null 2>&1 &
    daemons=("$!" "${daemons[@]}")
    wait_for 60 node_is_idle
    echo "$(sinfo --version), one node, $(sinfo --noheader --format=%C) CPUs (allocated/idle/other/total)"
}

# ======== The test ========

export ALGORITHMS="ddpg sac" ENVS=InvertedPendulum-v4 SEEDS="1 2" TOTAL_TIMESTEPS=6000
flags=(--learning-starts 200 --batch-size 64 --hidden-dim 64 --buffer-size 6000 --log-frequency 50
    --eval-frequency 3000 --eval-episodes 1)

folder_of() { printf '%s' "$1/${cells[$2]}"; }
rows() { { wc -l <"$1" || echo 0; } 2>/dev/null; }

# Whether a task has begun to learn, and is not about to end.
is_learning() {
    local count
    count=$(rows "$(folder_of "$work/results" "$1")/losses.csv")
    ((count > 100)) && fail "task $1 was too fast to be interrupted"
    ((count > 2))
}

# Whether a task is in its run number $2 + 1.
has_restarted() {
    [[ $(grep -c ' starts on ' "$work/slurm-${job}_$1.out") -gt $2 ]]
}

check_cell() {
    local folder reference name stops
    folder=$(folder_of "$work/results" "$1") reference=$(folder_of "$work/reference" "$1")
    for name in episodes evaluations losses; do
        cmp "$folder/$name.csv" "$reference/$name.csv" || fail "task $1 differs from an undisturbed run"
    done
    cmp <(cut -d , -f 1 "$folder/timing.csv") <(echo global_step && seq 50 50 6000) || fail "task $1 has wrong rows"
    [[ $(grep -c '^6,000 of 6,000 steps are done' "$folder/output.log") == 1 ]] || fail "task $1 ended not once"
    stops=$(sed -n 's/^\([0-9,]*\) of 6,000 steps are done.*/\1/p' "$folder/output.log" | grep -v '^6,000$' | xargs)
    [[ $stops ]] || fail "task $1 ran on through its interruption"
    echo "task $1 (${cells[$1]}): $2 at step $stops, went on from there to 6,000, same bytes as undisturbed"
}

start_cluster
mapfile -t cells < <(RESULTS='' benchmark/all.sh | sed 's/.*--run-dir benchmark\/results\/\([^ ]*\).*/\1/')
RESULTS=$work/reference JOBS=2 benchmark/all.sh run "${flags[@]}" || fail "the undisturbed runs failed"

job=$(RESULTS=$work/results sbatch --parsable --array=0-3 --mem=1G --output="$work/slurm-%A_%a.out" \
    benchmark/slurm.sbatch "${flags[@]}")
echo "submitted job array $job"
wait_for 300 is_learning 0
wait_for 300 is_learning 1
# As --signal=B:USR1@120 has Slurm do before the time limit. It delivers the signal, reports an error all the same, as
# the task belongs to an array, and would try again.
timeout 2 scancel --batch --signal=USR1 "${job}_1" &
wait_for 60 scontrol requeue "${job}_0"
wait_for 300 is_learning 2
wait_for 300 is_learning 3
sbatch --parsable --partition=high --cpus-per-task=2 --output=/dev/null --wrap='sleep 1' >"$work/urgent"
echo "job $(<"$work/urgent") of higher priority needs both CPUs"
wait_for 900 no_jobs
grep -E 'JobState=' "$work/completed" | sed -E 's/.*(JobId=[0-9]+).*(JobState=[A-Z_]+).*/\1 \2/'
for task in 0 1 2 3; do
    has_restarted "$task" 1 || fail "task $task was never started again"
done
check_cell 0 'requeued'
check_cell 1 'stopped before its time limit'
check_cell 2 'preempted'
check_cell 3 'preempted'
echo "PASSED: every cell finished once"
