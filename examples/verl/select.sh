#!/usr/bin/env bash
# The command of trainer.cropi.command (verl 0.8 and later): score the prompts with a checkpoint, replace the selection.
#
#   select.sh CHECKPOINT STAGE SELECTION BASE_MODEL TRAIN_TRAJECTORIES VALID_TRAJECTORIES...
#
# CROPI_OPTIONS are added to `cropi run`, PYTHON is the interpreter that has verl and cropi.
set -euo pipefail
checkpoint=$1 stage=$2 selection=$3 base=$4 train=$5
shift 5
python=${PYTHON:-python3}
out=$(dirname "$selection")/select-$stage

"$python" -m verl.model_merger merge --backend fsdp --local_dir "$checkpoint" --target_dir "$out/hf"
# shellcheck disable=SC2086
"$python" -m cropi run --model "$out/hf" --behaviour-model "$base" --train "$train" --valid "$@" \
  --stage "$stage" --out "$out" --table 0 --no-progress ${CROPI_OPTIONS:-}
rm -rf "$out/hf"
# Renamed into place: verl may look at any time.
cp "$out/selected.jsonl" "$selection.new"
mv "$selection.new" "$selection"
