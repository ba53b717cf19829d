#!/usr/bin/env bash
# A whole real run: Llama-3.2-1B made elastic on one 80 GB GPU. Everything is a variable, so that the same script with
# small settings runs on a CPU (tests/test_examples.py does that).
#
#   TEXT=HuggingFaceFW/fineweb-edu bash examples/llama_1b.sh        # give it a part of a data set that fits your disk
#
# What to expect (estimates, this run was not made): 4000 steps of 131,072 tokens are 0.52 billion tokens. A token costs
# 2 operations for each parameter and forward pass, and 4 for a backward pass: the teacher 2 x 1.24e9, a sandwich of the
# rows 1, 0.75 or 0.5, and 0.25 about 8 x (1.24 + 0.84 + 0.49)e9 with recomputed activations, together 2.3e10, so 1.2e19 for
# the run. An H100 at 35 to 40 % of its 989 TFLOP/s does that in 8 to 10 hours. Memory: see the line that `--plan` prints.
set -euo pipefail

PARENT=${PARENT:-meta-llama/Llama-3.2-1B}
TEXT=${TEXT:?set TEXT to a folder, a file or a data set id}
HELD_OUT=${HELD_OUT:-$TEXT}
OUT=${OUT:-llama-1b-flextron}
STEPS=${STEPS:-4000}
ROUTER_STEPS=${ROUTER_STEPS:-400}
LENGTH=${LENGTH:-2048}
BATCH=${BATCH:-4}
ACCUMULATION=${ACCUMULATION:-16}
SAMPLES=${SAMPLES:-1024}
SAVE=${SAVE:-500}
CONVERT=${CONVERT:---preset llama-3.2-1b}
MORE=${MORE:---bf16 --activation_checkpointing}
FLEXTRON=${FLEXTRON:-flextron}
LAUNCH=${LAUNCH:-$FLEXTRON} # several GPUs: accelerate launch --config_file examples/accelerate/ddp.yaml -m flextron_trainer

# Rank and permute: some minutes. The scores are kept, so other sizes later are quick.
$FLEXTRON convert "$PARENT" "$OUT/elastic" --calibration "$TEXT" --max-samples "$SAMPLES" --sequence-length "$LENGTH" $CONVERT

TRAIN="$OUT/elastic $TEXT --teacher $PARENT --sequence-length $LENGTH --output_dir $OUT/run --max_steps $STEPS
  --per_device_train_batch_size $BATCH --gradient_accumulation_steps $ACCUMULATION --per_device_eval_batch_size $BATCH
  --learning_rate 1e-4 --warmup_steps 60 --save_steps $SAVE --save_total_limit 2 --logging_steps 10 $MORE"

$FLEXTRON train $TRAIN --plan # does it fit?

# Stopped in the middle? The same command goes on from the last complete checkpoint.
RESUME=$(compgen -G "$OUT/run/checkpoint-*" >/dev/null && echo --resume || true)
$LAUNCH train $TRAIN $RESUME

# Routers: other sizes in every layer, for the same budgets.
$FLEXTRON train "$OUT/run" "$TEXT" --stage router --router_method "${METHOD:-surrogate}" --router_budgets 0.75 0.5 --sequence-length "$LENGTH" \
  --output_dir "$OUT/routed" --max_steps "$ROUTER_STEPS" --per_device_train_batch_size "$BATCH" --save_strategy no $MORE

$FLEXTRON evaluate "$OUT/routed" "$HELD_OUT" --sequence-length "$LENGTH" --batch-size "$BATCH" --write --plot "$OUT/frontier.png"
$FLEXTRON export "$OUT/run" "$OUT/half" --dense --budget 0.5
# flextron push "$OUT/routed" you/flextron-llama-3.2-1b
