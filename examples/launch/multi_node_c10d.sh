#!/usr/bin/env bash
# Several nodes that number themselves. The same command on each of them:
#   NODES=2 MASTER_ADDR=node0 bash examples/launch/multi_node_c10d.sh tools/train.py examples/share4v_7b/pretrain.yaml [dotted.key=value ...]
#
# MASTER_ADDR   the node where they meet; it knows itself by this name. Where it cannot (several networks), set MEET_HERE=true there, false elsewhere
# LOCAL_ADDR    this node's address, where the others do not reach it by its host name
# RESTARTS      how often torchrun starts all ranks again when one has failed, for whatever reason, a mistake in the configuration too; 0 when not set
# RUN           a name of this run, equal on all nodes, where several meet at the same port
set -euo pipefail
: "${NODES:?how many nodes}" "${MASTER_ADDR:?host name or address of the node where all meet}"
# shellcheck source=examples/launch/start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
options=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${RUN:-share4v}" --max-restarts "${RESTARTS:-0}")
[ -z "${MEET_HERE:-}" ] || options+=(--rdzv-conf "is_host=$MEET_HERE")
[ -z "${LOCAL_ADDR:-}" ] || options+=(--local-addr "$LOCAL_ADDR")
launch "${options[@]}" "$@"
