#!/usr/bin/env bash
# Body of pretrain.sbatch and finetune.sbatch: check the nodes, train, and requeue the job until the run is complete.
#   bash examples/slurm/stage.sh STAGE RECIPE [dotted.key=value ...]
#
# Exit code 75: the run saved and stopped on preemption (SIGTERM), the time limit, or SIGUSR1 before it. 138 and 143:
# one of these signals came before training started. The job is requeued and resumes.
# Exit code 2: configuration, data or a node is unusable; not requeued, since it would fail again.
# Any other code is a fault: requeued, unless the job failed within its first MIN_MINUTES and so would fail repeatedly.
set -euo pipefail
stage="$1" recipe="${2:?which recipe: share4v_7b, share4v_13b, llava15_7b}"
config="examples/$recipe/$stage.yaml"
shift 2
if [ ! -f "$config" ]; then
    echo "error: $config not found in $(pwd); submit from the root of the checkout, with a folder name of examples/" >&2
    exit 2
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes[0]}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# After one rank fails, the others have 60 s to exit with their own exit codes before srun kills them.
on_every_gpu() {
    srun --kill-on-bad-exit=0 --wait=60 bash examples/slurm/rank.sh "$@"
}
code=0
on_every_gpu tools/doctor.py env "$config" "$@" && on_every_gpu tools/train.py "$config" "$@" || code=$?
starts=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "job $SLURM_JOB_ID, started $starts times: ended with exit code $code after $((SECONDS / 60)) minutes" >&2
requeue() {
    exec scontrol requeue "$SLURM_JOB_ID"
}
case "$code" in
    0 | 2) ;;
    75 | 138 | 143) requeue ;;
    *) [ "$SECONDS" -lt $((60 * ${MIN_MINUTES:-10})) ] || requeue ;;
esac
exit "$code"
