#!/usr/bin/env bash
# Runs the tests, from a fresh clone too: makes .venv when no environment is active and installs what is missing.
# Arguments go to pytest.
#   bash tests/run.sh              linter, formatter, types (tests/gates.sh), then all tests but the full layout matrix
#   bash tests/run.sh -m matrix    the full layout matrix
#   bash tests/run.sh -k plan      the tests whose name has "plan" in it
# The tests of the server's page need a Chromium. As root on a Debian system it is installed, elsewhere a message says
# what to install and those tests fail. Likewise shellcheck, without which the launch scripts are checked less. Where
# pip's default index carries only CUDA builds of torch, the first run downloads some gigabytes; they work on a CPU as
# well. For the small build, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment cpu,serve,dev,dali
prepare_browser
prepare_shellcheck
if [ $# = 0 ]; then
    bash tests/gates.sh
    set -- -n 2 --dist loadfile --durations=20
fi
export OMP_NUM_THREADS=1  # several ranks share the cores of one machine
exec python -m pytest "$@"
