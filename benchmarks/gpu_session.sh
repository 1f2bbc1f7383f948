#!/usr/bin/env bash
# Ten minutes with a GPU, most telling first: does it build, does the PTX do what the emulator does, are accesses in
# bounds, are results right, how fast, and what bounds the kernels. Every step has its own limit, so that a slow one
# does not cost the others.
#
#     PYTHON=python3 benchmarks/gpu_session.sh FOLDER        FOLDER/log gets all that is printed
#
# A GEMV below three quarters of the copy bandwidth: with issue_active above 85% it is bound by instructions; with that and
# dram low by latency (wna16.GEMV_BLOCKS, STAGES of wna16_gemv.cuh). benchmarks/tune_kernels.py tries the constants.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${1:-build/gpu}
mkdir -p "$OUT"
exec > >(tee "$OUT/log") 2>&1
export PYTHONPATH=.:tests PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 QUANTOOL_CACHE=${QUANTOOL_CACHE:-$PWD/build/cache}
TESTS=tests/kernels
PYTEST="$PYTHON -m pytest -q -m gpu -W default -p no:cacheprovider --maxfail=12 --tb=short --durations=3"

step() {
  echo "=== $1 at ${SECONDS}s"
  shift
  timeout "$@"
  echo "--- exit $? at ${SECONDS}s"
}

cat > "$OUT/linears.py" <<'PY'
from tiled_linears import assert_close, make
from quantool.kernels.wna16 import linear_tiles

for bits in (4, 8):
    for tokens in (1, 8, 20, 128):
        case = make(tokens, 272, 2112, 32, bits=bits, sym=False, device="cuda")
        assert_close(linear_tiles(*case.arguments), case)
print("fine")
PY

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv,noheader
step build 90 "$PYTHON" -c "from quantool.kernels import status; print(status())"
step ptx 45 $PYTEST $TESTS/test_device.py
step memcheck 60 compute-sanitizer --error-exitcode 9 "$PYTHON" "$OUT/linears.py"
step wna16 90 $PYTEST $TESTS/test_gpu_wna16.py -k "not sanitizer and not compiled"
step operators 50 $PYTEST $TESTS/test_gpu_ops.py
step bench 130 "$PYTHON" benchmarks/kernels.py --only w4a16 bf16 int4pack --minutes 1.8
step encoders 40 $PYTEST $TESTS/test_gpu_gptq.py $TESTS/test_gpu_ggml.py $TESTS/test_gpu_nf4.py
step model 60 $PYTEST $TESTS/test_gpu_model.py -k "logits or graph or moved"
METRICS=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
METRICS+=,smsp__issue_active.avg.pct_of_peak_sustained_active,l1tex__data_bank_conflicts_pipe_lsu.sum
step counters 35 ncu --clock-control none -k regex:wna16_ge -c 6 --metrics $METRICS "$PYTHON" "$OUT/linears.py"
