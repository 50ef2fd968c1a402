#!/usr/bin/env bash
# One stage of a curriculum with verl: train a model on a dataset for some steps, and leave it as a Hugging Face folder.
#
#   stage.sh MODEL DATASET STEPS OUT VALIDATION [ROLLOUTS]
#
# An interrupted stage goes on at its last checkpoint. With ROLLOUTS (verl 0.8 and later) the rollouts of the training are
# kept with their tokens and written there as trajectory records. VERL_OPTIONS are added to verl's command line, GPUS is
# their number, PYTHON the interpreter that has verl.
set -euo pipefail
model=$1 dataset=$2 steps=$3 out=$4 validation=$5 rollouts=${6:-}
python=${PYTHON:-python3}
temperature=${TEMPERATURE:-1.0}

keep=()
if [ -n "$rollouts" ]; then
  keep=(skip.rollout_tq.enable=True "skip.rollout_tq.dump_dir=$out/rollouts" "skip.rollout_tq.steps=[$(seq -s, 1 "$steps")]")
fi

# The number of epochs must not end the stage: total_training_steps does.
# shellcheck disable=SC2086
"$python" -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo \
  data.train_files="$dataset" \
  data.val_files="$validation" \
  data.train_batch_size="${BATCH:-128}" \
  data.max_prompt_length="${MAX_PROMPT:-1024}" \
  data.max_response_length="${MAX_RESPONSE:-2048}" \
  actor_rollout_ref.model.path="$model" \
  actor_rollout_ref.actor.ppo_mini_batch_size="${MINI_BATCH:-64}" \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu="${MICRO_BATCH:-8}" \
  actor_rollout_ref.rollout.name="${ENGINE:-vllm}" \
  actor_rollout_ref.rollout.n="${ROLLOUTS_PER_PROMPT:-8}" \
  actor_rollout_ref.rollout.temperature="$temperature" \
  actor_rollout_ref.rollout.calculate_log_probs=True \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu="${MICRO_BATCH:-8}" \
  trainer.n_gpus_per_node="${GPUS:-1}" \
  trainer.total_epochs=100000 \
  trainer.total_training_steps="$steps" \
  trainer.save_freq="${SAVE_EVERY:-$steps}" \
  trainer.default_local_dir="$out/checkpoints" \
  trainer.resume_mode=auto \
  "${keep[@]}" ${VERL_OPTIONS:-}

"$python" -m verl.model_merger merge --backend fsdp \
  --local_dir "$out/checkpoints/global_step_$steps/actor" --target_dir "$out/hf"

if [ -n "$rollouts" ]; then
  find "$out/rollouts" -name tq_batch.pt -print0 \
    | xargs -0 "$python" -m cropi convert --source verl --temperature "$temperature" --out "$rollouts"
fi
