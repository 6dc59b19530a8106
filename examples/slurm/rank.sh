#!/usr/bin/env bash
# One rank, from srun's words to torch.distributed's. It becomes the Python process, so that Slurm's signals reach that one:
#   srun bash examples/slurm/rank.sh tools/train.py CONFIG.yaml
# Without torchrun between them a rank has all the time that Slurm gives a job to save.
set -euo pipefail
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python "$@"
