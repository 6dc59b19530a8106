#!/usr/bin/env bash
# All GPUs of one machine, or PROCESSES ranks on its CPUs:
#   bash examples/launch/single_node.sh tools/train.py examples/share4v_7b/pretrain.yaml [dotted.key=value ...]
set -euo pipefail
# shellcheck source=examples/launch/start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
launch --standalone "$@"
