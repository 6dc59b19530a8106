#!/usr/bin/env bash
# Start one rank under srun: maps Slurm's variables to torch.distributed's and replaces the shell by Python (exec), so
# that Slurm's signals reach Python:
#   srun bash examples/slurm/rank.sh tools/train.py CONFIG.yaml
# Without torchrun, a rank has Slurm's whole grace period to save.
set -euo pipefail
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python "$@"
