#!/usr/bin/env bash
# Launch on several nodes with static node ranks. Run on each node with its own NODE_RANK (0: the node at MASTER_ADDR):
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/launch/multi_node_static.sh \
#       tools/train.py examples/share4v_7b/pretrain.yaml [dotted.key=value ...]
# When a node fails, the others exit too; run the command again on all of them.
set -euo pipefail
: "${NODES:?how many nodes}" "${NODE_RANK:?the number of this node, from 0}"
: "${MASTER_ADDR:?an address of node 0 that every node reaches}"
# shellcheck source=examples/launch/start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
launch --nnodes "$NODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" "$@"
