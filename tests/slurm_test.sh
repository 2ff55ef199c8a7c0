#!/usr/bin/env bash
# Runs benchmark/slurm.sbatch on a real Slurm: a cluster of this machine alone, in a temporary folder.
#
# Two short runs reach their time limit and are preempted, and must end with the bytes of undisturbed runs.
# Takes some minutes. Needs Slurm and munge (Debian: slurm-wlm, munge); PYTHON is as for a sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PATH=$PATH:/usr/sbin ALGORITHMS="ddpg sac" ENVS=InvertedPendulum-v4 SEEDS=1
export TOTAL_TIMESTEPS=${TOTAL_TIMESTEPS:-30000} # on a fast machine more, for the runs must last for a minute
flags=(--learning-starts 100 --batch-size 32 --hidden-dim 16 --eval-frequency 10000)
work=$(mktemp -d)
export SLURM_CONF=$work/slurm.conf

clean_up() {
    if scancel --user="$(id -un)"; then
        wait_for no_job_is_left
    fi
    # shellcheck disable=SC2046 # several words
    kill $(jobs -p) || true
    wait
    rm -rf "$work"
}
trap clean_up EXIT

wait_for() {
    for _ in {1..600}; do
        if "$@" >/dev/null 2>&1; then
            return
        fi
        sleep 1
    done
    echo "FAILED: waited ten minutes for $*" >&2
    tail -n 20 "$work"/*.log "$work"/*.out >&2
    exit 1
}
nodes_are_idle() { sinfo --noheader --format=%t | grep idle; }
no_job_is_left() { squeue --noheader >"$work/queue" && [[ ! -s $work/queue ]]; }
both_reached_their_limit() { grep "restart 1:" "$work/task_1.out" && grep "restart 1:" "$work/task_2.out"; }
both_go_on() { [[ $(find "$work/results" -name episodes.csv -newer "$work/task_1.out" | wc -l) == 2 ]]; }

cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$work/munge.socket,cred_expire=5
StateSaveLocation=$work
SlurmdSpoolDir=$work
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=2
END
(umask 077 && head -c 1024 /dev/urandom >"$work/munge.key")
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" \
    --pid-file="$work/munge.pid" --seed-file="$work/munge.seed" --log-file="$work/munged.log" 2>/dev/null &
wait_for munge --no-input --socket="$work/munge.socket"
slurmctld -D -L "$work/slurmctld.log" 2>/dev/null &
slurmd -D -L "$work/slurmd.log" 2>/dev/null &
wait_for nodes_are_idle

RESULTS=$work/reference JOBS=2 benchmark/all.sh run "${flags[@]}"
job=$(RESULTS=$work/results sbatch --parsable --array=1-2 --mem=1G --time=1 --signal=TERM@20 \
    --output="$work/task_%a.out" benchmark/slurm.sbatch "${flags[@]}")
wait_for both_reached_their_limit
scontrol update JobId="$job" TimeLimit=60
wait_for both_go_on
sleep 3
sbatch --partition=high --cpus-per-task=2 --output=/dev/null --wrap="sleep 1" # needs the whole machine
wait_for no_job_is_left

cat "$work"/task_*.out
grep "preempted JobId" "$work/slurmctld.log"
for algorithm in $ALGORITHMS; do
    for name in episodes evaluations losses; do
        cmp "$work"/{results,reference}/"$algorithm/$ENVS/seed1/$name.csv"
    done
done
echo "PASSED: the same bytes as undisturbed runs"
