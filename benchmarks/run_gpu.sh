#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of less than nine minutes on one 80 GB card. Each part has a time
# of its own, is skipped when it was done before, and leaves files in OUT; a second start goes on with what is missing.
#
#   bash benchmarks/run_gpu.sh                                    # a CUDA device
#   bash benchmarks/run_gpu.sh --rehearse                         # the same on the CPU with small sizes, for a test
#   PARENT=you/model TRAIN=prose.txt TEST=other.txt bash benchmarks/run_gpu.sh     # and ten steps of a real model
set -uo pipefail
cd "$(dirname "$0")/.."

DEVICE=cuda
PATIENCE=1
[[ "${1:-}" == --rehearse ]] && DEVICE=cpu PATIENCE=10
OUT=${OUT:-gpu-work}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD:$PWD/trainer:$PWD/tests:$PWD/benchmarks FLEXTRON_TEST_DEVICE=$DEVICE TOKENIZERS_PARALLELISM=false
failed=0

# part NAME SECONDS COMMAND...: run it unless it was done; its output goes into OUT/NAME.log, its last line into OUT/NAME.json.
part() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  if [[ -e "$OUT/$name.done" ]]; then
    echo "$name: done before"
  elif timeout "$((limit * PATIENCE))" "$@" >"$OUT/$name.log" 2>&1; then
    tail -n 1 "$OUT/$name.log" | grep '^{' >"$OUT/$name.json" || rm -f "$OUT/$name.json"
    touch "$OUT/$name.done"
    echo "$name: done in $((SECONDS - begin)) s"
  else
    failed=1
    echo "$name: failed or longer than its $limit s, see $OUT/$name.log"
    tail -n 3 "$OUT/$name.log"
  fi
}

if [[ $DEVICE == cuda ]]; then
  native=(--shapes 80M,1B --dtypes bfloat16 --rounds 30)
  training=(--dtypes bfloat16 --batch 8 --sequence 1024 --rounds 20 --vocabularies 32000,128000 --loss-tokens 8192 --loss-hidden 2048)
  tokens=(--dtypes bfloat16 --rounds 15)
  memory=()
else
  native=(--shapes trivial --dtypes float32 --rounds 2)
  training=(--rounds 1 --batch 1 --sequence 64 --memory-sequence 128 --vocabularies 1000 --loss-tokens 64 --loss-rounds 1)
  tokens=(--dtypes float32 --rounds 1 --tokens 64)
  memory=(--sizes 12M --settings plain self)
fi
part correctness 240 $PYTHON -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py
part native 150 $PYTHON benchmarks/bench_native.py --device $DEVICE "${native[@]}" --no-save
part training 90 $PYTHON benchmarks/bench_training.py --device $DEVICE "${training[@]}" --no-save
part tokens 60 $PYTHON benchmarks/bench_tokens.py --device $DEVICE "${tokens[@]}" --no-save
part memory 60 $PYTHON benchmarks/bench_memory.py --device $DEVICE "${memory[@]}" --no-save
if [[ -n "${PARENT:-}" ]]; then
  part real 300 $PYTHON benchmarks/bench_real.py "$PARENT" --train "${TRAIN:?a text file}" --test "${TEST:?another one}" --device $DEVICE \
    --work "$OUT/real-work" --name gpu --lines "repaired slices" elastic singles control --tokens 40960 --rates 3e-4
fi
exit $failed
