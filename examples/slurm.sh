#!/bin/bash
# Pre-train on two machines of eight GPUs under SLURM; sbatch examples/slurm.sh --data /imagenet --out runs/imagenet
#
# Five minutes before its time limit, or when it is preempted, the job saves and is requeued. The same command then
# continues from the checkpoint, also on another number of machines: --batch-size is the total over all processes.
#SBATCH --job-name=fastrm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

again=
trap 'again=yes; kill -TERM "$step"' TERM

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:${PORT:-29500}" \
    -m fastrm.train "$@" &
step=$!
wait "$step"
status=$?
if [ -n "$again" ]; then # the first wait ended with the signal, and the run saves
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
