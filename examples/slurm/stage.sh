#!/usr/bin/env bash
# What pretrain.sbatch and finetune.sbatch do in their allocation: examine the nodes, train, and queue the job again while its run is not done.
#   bash examples/slurm/stage.sh STAGE RECIPE [dotted.key=value ...]
#
# Exit code 75: saved and ended in order, because of preemption (SIGTERM), the time limit, or SIGUSR1 before it; 138 and 143: one of these signals came
# before training had begun. The job is queued again, and goes on.
# Exit code 2: the configuration, the data or a node cannot be used; it would be so again. Anything else is a fault: queued again, unless the job
# failed within its first MIN_MINUTES, as it would for ever.
set -euo pipefail
stage="$1" recipe="${2:?which recipe: share4v_7b, share4v_13b, llava15_7b}"
config="examples/$recipe/$stage.yaml"
shift 2
if [ ! -f "$config" ]; then
    echo "error: there is no $config here, in $(pwd); submit from the root of the checkout, with the name of a folder of examples/" >&2
    exit 2
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes[0]}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# The others may end by themselves, with a code that says why, before the last of them are ended.
on_every_gpu() {
    srun --kill-on-bad-exit=0 --wait=60 bash examples/slurm/rank.sh "$@"
}
code=0
on_every_gpu tools/doctor.py env "$config" "$@" && on_every_gpu tools/train.py "$config" "$@" || code=$?
echo "job $SLURM_JOB_ID, started $((${SLURM_RESTART_COUNT:-0} + 1)) times: ended with exit code $code after $((SECONDS / 60)) minutes" >&2
requeue() {
    exec scontrol requeue "$SLURM_JOB_ID"
}
case "$code" in
    0 | 2) ;;
    75 | 138 | 143) requeue ;;
    *) [ "$SECONDS" -lt $((60 * ${MIN_MINUTES:-10})) ] || requeue ;;
esac
exit "$code"
