#!/usr/bin/env bash
# Launch on several nodes with c10d rendezvous, which assigns the node ranks. Run the same command on each node:
#   NODES=2 MASTER_ADDR=node0 bash examples/launch/multi_node_c10d.sh \
#       tools/train.py examples/share4v_7b/pretrain.yaml [dotted.key=value ...]
#
# MASTER_ADDR   host name or address of the node that hosts the rendezvous store. That node must recognise the name as
#               its own; where it cannot (several networks), set MEET_HERE=true on it and MEET_HERE=false elsewhere
# LOCAL_ADDR    address of this node, if the other nodes cannot reach it by its host name
# RESTARTS      how often torchrun restarts all ranks after a failure of any kind, configuration errors included
#               (default 0)
# RUN           name of the run, equal on all nodes; needed if several runs share MASTER_ADDR and port
set -euo pipefail
: "${NODES:?how many nodes}" "${MASTER_ADDR:?host name or address of the node that hosts the rendezvous}"
# shellcheck source=examples/launch/start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
options=(--nnodes "$NODES" --max-restarts "${RESTARTS:-0}")
options+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${RUN:-share4v}")
[ -z "${MEET_HERE:-}" ] || options+=(--rdzv-conf "is_host=$MEET_HERE")
[ -z "${LOCAL_ADDR:-}" ] || options+=(--local-addr "$LOCAL_ADDR")
launch "${options[@]}" "$@"
