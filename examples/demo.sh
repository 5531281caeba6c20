#!/usr/bin/env bash
# Pretrain a small GPT-2 with LENA on two CPU cores: two ranks, ZeRO-2, n = 32 micro-batches averaged
# per update. Five minutes of CPU time in all, so about three minutes if both cores are free. What it
# leaves in outputs/demo is described in examples/README.md.
#
#   DEMO_QUICK=1   6 updates instead of 240, in less than a minute
#   DEMO_STEPS     another number of updates
#   DEMO_OUTPUT    another output folder than outputs/demo; checkpoints of an earlier demo in it are deleted
#   MASTER_PORT    another port, to run two demos at once
# Further arguments go to pretrain_gpt.py.
set -euo pipefail
cd "$(dirname "$0")/.."

steps=${DEMO_STEPS:-$([[ ${DEMO_QUICK:-0} = 1 ]] && echo 6 || echo 240)}
output=${DEMO_OUTPUT:-outputs/demo}
every=$((steps > 12 ? steps / 12 : steps))

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}     # runs from a clone, installed or not
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1           # one core per rank
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export PYTHONWARNINGS=ignore::FutureWarning

# A run does not start where an earlier one's checkpoints lie; with --resume_from_checkpoint latest it goes on from them.
[[ " $*" == *" --resume"* ]] || rm -rf "$output"/checkpoint-[0-9]*

exec deepspeed --num_gpus 2 --num_nodes 1 --master_port "${MASTER_PORT:-29517}" \
  examples/pretrain_gpt.py \
  --deepspeed examples/ds_lena_zero2.json --use_cpu \
  --model_size tiny --vocab_size 2048 --sequence_length 64 --max_held_out_blocks 512 \
  --per_device_train_batch_size 2 --gradient_accumulation_steps 16 --max_steps "$steps" \
  --learning_rate 1e-3 --weight_decay 0.1 --lr_scheduler_type cosine \
  --logging_steps 3 --eval_steps "$every" --save_steps "$every" --save_total_limit 1 \
  --output_dir "$output" "$@"
