#!/usr/bin/env bash
# Train on one host: launch_scripts/single_node.sh RANKS [options of pretrain.py], as megamoe train --ranks RANKS does.
# Evaluate: PROGRAM=tools/evaluate.py launch_scripts/single_node.sh RANKS runs/mine data/mine [options of evaluate.py]
verb=$(basename "${PROGRAM:-train}" .py)
exec python -m megamoe "$verb" --ranks "$@"
