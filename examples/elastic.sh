#!/bin/bash
# Pre-train on one to four machines; start the same line on each: HOST=first-machine examples/elastic.sh --data /imagenet
#
# When a process or a machine is lost, torchrun starts all that are left again, at most ten times, and they go on from the
# last checkpoint, as they do when a machine joins. --batch-size is over all of them: choose one that all numbers divide.
exec torchrun \
    --nnodes="${NODES:-1:4}" \
    --nproc-per-node="${PROCESSES:-8}" \
    --max-restarts=10 \
    --rdzv-id="${RUN:-fastrm}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="${HOST:-localhost}:${PORT:-29500}" \
    -m fastrm.train --checkpoint-minutes 5 "$@"
