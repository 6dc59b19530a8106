# shellcheck shell=bash
# Sourced by the scripts beside it, not run by itself: what every torchrun here is given.
#
# PROCESSES   ranks on this node; the number of its GPUs when not set (on CPUs it must be set)
#
# torchrun hands signals on to its ranks, which save and end in order; it kills what has not ended after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

launch() {
    exec python -m torch.distributed.run --nproc-per-node "${PROCESSES:-gpu}" "$@"
}
