#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: the kernel tests in float32, float16 and bfloat16, tensors of more
# than 2**31 elements, the op benchmarks beside the card's limits, and new configuration tables (part "tuning").
#
#   OUT=results bash benchmarks/gpu_round.sh [tests|large|ops|tuning ...]      (default: tests large ops)
#
# Logs and rows go to $OUT (default benchmarks/results). A failing part does not stop the others; the exit status is the
# number of failed parts. PYTHON chooses the interpreter (default python).
set -u
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
out=${OUT:-benchmarks/results}
python=${PYTHON:-python}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests large ops)
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/backends${PYTHONPATH:+:$PYTHONPATH}"
failed=0

step() { # name, then the command; its output is shown and kept
    local name=$1
    shift
    echo "== $name: $*"
    local start=$SECONDS
    "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    echo "== $name: exit $status after $((SECONDS - start)) s"
    [ "$status" -eq 0 ] || failed=$((failed + 1))
}

nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || { echo "gpu_round: nvidia-smi finds no GPU"; exit 100; }
"$python" -c "import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())" ||
    { echo "gpu_round: torch sees no GPU"; exit 100; }

for part in "${parts[@]}"; do
    case $part in
        tests) step tests "$python" -m pytest -q tests/triton --deselect tests/triton/test_cross_compilation.py \
            --ignore tests/triton/test_beyond_int32.py --junitxml "$out/tests.xml" ;;
        large) step large "$python" -m pytest -q tests/triton/test_beyond_int32.py --junitxml "$out/large.xml" ;;
        ops) for dtype in ${DTYPES:-bfloat16}; do
            step "ops_$dtype" "$python" benchmarks/triton_ops.py --dtype "$dtype" --output "$out/triton_ops.jsonl"
        done ;;
        tuning) step tuning "$python" benchmarks/triton_tuning.py --seconds "${TUNE_SECONDS:-480}" --output "$out" ;;
        *) echo "gpu_round: unknown part '$part' (tests, large, ops, tuning)"; failed=$((failed + 1)) ;;
    esac
done
exit "$failed"
