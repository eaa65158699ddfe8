#!/bin/bash
# Trains under SLURM and puts itself into the queue again until the run is finished: sbatch docs/slurm.sh
#SBATCH --job-name=dsa-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dsa-train-%j.log

OUT=${OUT:-runs/v32}
INIT=${INIT:-CHECKPOINT}
TRAIN=(python -m train --distributed --mesh "${MESH:-data=4,expert=8}" --out "$OUT")
FIRST=(--preset deepseek_v32 --init "$INIT" --data "${DATA:-text/*.txt}" --tokenizer "$INIT/tokenizer.json")

trap : TERM # a preemption sends it to this shell too, which then still queues the job again
if [ -e "$OUT/run.json" ]; then
    srun "${TRAIN[@]}" --resume
else
    srun "${TRAIN[@]}" "${FIRST[@]}"
fi
status=$?

case $status in
143 | 75) scontrol requeue "$SLURM_JOB_ID" ;; # it was stopped and saved, or a process of it was lost
*) exit $status ;;                            # it is finished, or it needs a person
esac
