#!/usr/bin/env bash
# Runs the tests, from a fresh clone too: makes .venv when no environment is active, installs what is missing. Arguments go to pytest.
#   bash tests/run.sh              linter, formatter, types (tests/gates.sh), then everything that runs on a CPU
#   bash tests/run.sh -k plan      the tests whose name has "plan" in it
# The tests of the server's page need a Chromium. Where there is none it is installed from the distribution, given apt-get and root; else they fail.
# So is shellcheck, for the launch scripts; without it they are checked less.
# Where pip's default index carries only CUDA builds of torch, the first run downloads some gigabytes; they work on a CPU as well. To get the small
# build instead, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment cpu,serve,dev,dali
prepare_browser
prepare_shellcheck
[ $# -gt 0 ] || bash tests/gates.sh
export OMP_NUM_THREADS=1  # several ranks share the cores of one machine
exec python -m pytest "$@"
