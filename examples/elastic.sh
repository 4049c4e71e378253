#!/bin/bash
# Pre-train on one to four machines; start the same line on each: HOST=first-machine examples/elastic.sh --data /imagenet
#
# When a process or a machine is lost, torchrun restarts the remaining ones, at most ten times, and they continue from the
# last checkpoint. The same happens when a machine joins. --batch-size is the total over all processes: choose a number
# that every possible count of processes divides.
exec torchrun \
    --nnodes="${NODES:-1:4}" \
    --nproc-per-node="${PROCESSES:-8}" \
    --max-restarts=10 \
    --rdzv-id="${RUN:-fastrm}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="${HOST:-localhost}:${PORT:-29500}" \
    -m fastrm.train --checkpoint-minutes 5 "$@"
