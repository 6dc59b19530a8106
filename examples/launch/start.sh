# shellcheck shell=bash
# Environment and torchrun options shared by the launch scripts. Sourced by them, not run by itself.
#
# PROCESSES   ranks on this node (default: its number of GPUs; required on CPUs)
#
# torchrun forwards signals to its ranks, which save and exit; it kills ranks that are still alive after
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds.
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
