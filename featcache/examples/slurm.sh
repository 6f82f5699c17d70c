#!/bin/bash
# A large folder embedded by the jobs of a Slurm cluster, packed, and a classifier trained: bash slurm.sh PHOTOS FEATURES.h5 MODEL
# A job that fails is sent again by the same command; what is finished is not done twice. Settings are variables:
#   PARTS=64 EXTRACT="--backbone base" SBATCH_PARTITION=gpu SBATCH_GPUS=1 bash slurm.sh ...
set -euo pipefail
photos=${1:?PHOTOS} features=${2:?FEATURES.h5} model=${3:?MODEL}

embed=$(sbatch --parsable --job-name=embed --array="1-${PARTS:-16}" --cpus-per-task=4 --requeue \
  --wrap="featcache extract ${photos@Q} -o ${features@Q} --part auto ${EXTRACT:-}")
pack=$(sbatch --parsable --job-name=pack --dependency="afterok:$embed" --wrap="featcache merge ${features@Q}")
sbatch --job-name=fit --dependency="afterok:$pack" --cpus-per-task=4 --wrap="featcache fit-head ${features@Q} -o ${model@Q}"
