#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of about ten minutes, the most valuable figures first.
#
#   bash benchmarks/gpu_round.sh wheels .whl        here, with a network: what the GPU machine lacks, into a folder
#   bash benchmarks/gpu_round.sh peers .whl         and kernels in CuTe to compare with, 80 MB: quack, FlashAttention-4
#   OUT=results WHEELS=.whl GIT_COMMIT=$(git describe --always --dirty=+) bash benchmarks/gpu_round.sh [part[:seconds] ...]
#   REHEARSE=1 bash benchmarks/gpu_round.sh         the same on a CPU, at toy sizes, kernels in the interpreter
#
# Needs Python >= 3.11 with torch, Triton, numpy, pytest, pytest-xdist, pluggy and jaxtyping (PYTHON chooses it); neither a
# network nor an installed checkout. Parts, each within its own time limit in seconds (in brackets) and all within BUDGET
# (570):
#
#   prepare   compiles kernels, candidates and peers in the background, so that the parts below find full caches
#   tests     [120] tests/triton in float32, float16 and bfloat16, inside CUDA graphs too, and training as a CUDA graph
#   step      [80]  a training step of a 124 M model
#   step_1b   [80]  a training step of a 1 B model
#   ops       [120] every op but attention beside its peers and the card's limits
#   attention [60]  attention beside SDPA (default, cuDNN, FlashAttention-2), flash-attn where present
#   large     [45]  tensors of more than 2**31 elements
#
# and only where they are named, for a second call while the machine and its caches are there:
#
#   tuning    [60]  the candidates' times, and a table of the winners, $OUT/sm_90.json; it serves once it is copied to
#                   backends/cs336_triton/tables
#   kit       [250] the conformance kit, and its record for the README's grid
#
# The log and JSON rows (card, driver, versions, commit, and the copy bandwidth and matrix rate of the same run) go to
# $OUT (default benchmarks/results). Rows are on disk as soon as their op is done, so a part that is cut short keeps what
# it measured. A failing part does not stop the others; the exit status is the number of failed parts. To keep the
# results, append $OUT/*.jsonl to benchmarks/results. A machine that was just started reads PyTorch from a cold disk: the
# first part takes half a minute longer there.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
root=$PWD

case ${1:-} in
    wheels) wanted=(cyclopts docstring-parser rich-rst docutils msgspec beartype liger-kernel) ;;
    peers) wanted=(nvidia-cutlass-dsl==4.4.2 nvidia-cutlass-dsl-libs-base==4.4.2 quack-kernels==0.3.3 flash-attn-4==4.0.0b5
        apache-tvm-ffi torch-c-dlpack-ext) ;;
    *) wanted=() ;;
esac
if [ ${#wanted[@]} -gt 0 ]; then
    # Pure Python, or built for CPython 3.12 on x86-64.
    exec "$python" -m pip download --no-deps --only-binary=:all: --python-version "${WHEELS_PYTHON:-3.12}" \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "${2:-.whl}" "${wanted[@]}"
fi

out=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd)
budget=${BUDGET:-570}
rehearse=${REHEARSE:-}
all=(prepare tests step step_1b ops attention large)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
site=$(mktemp -d)
trap 'rm -rf "$site"; [ -z "${preparing:-}" ] || kill -- -"$preparing" 2>/dev/null' EXIT
failed=0

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl ||
        { echo "gpu_round: the wheels in $WHEELS can't be installed"; exit 100; }
fi
# Entry points are how backends and the pytest plugin are found; a checkout that is not installed has none.
"$python" - "$site" <<'METADATA' || exit 100
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
folder = pathlib.Path(sys.argv[1], f"cs336_registry-{project['version']}.dist-info")
folder.mkdir()
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
lines = []
for group, points in project["entry-points"].items():
    lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
(folder / "entry_points.txt").write_text("\n".join(lines))
METADATA
# CuTe's wheel names its folder in a .pth file, which is read in folders of the interpreter's own alone.
export PYTHONPATH="$root:$root/backends:$site:$site/nvidia_cutlass_dsl/python_packages${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4

if [ -n "$rehearse" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    budget=7200 slower=10
    device=cpu dtype=bfloat16 toy=--rehearse workers=(-p no:xdist) small=rehearsal large=rehearsal several=1
    tests=(tests/triton/test_silu.py tests/triton/test_cuda_graphs.py)
else
    unset TRITON_INTERPRET
    slower=1
    device=cuda dtype=bfloat16 toy="" workers=(-n 12) small=gpt2_124m large=1b several=6
    tests=(tests/triton tests/pipeline/test_training.py::test_a_cuda_graph_trains_as_well)
    nvidia-smi >> "$out/round.log" 2>&1 || { echo "gpu_round: nvidia-smi finds no GPU"; exit 100; }
    "$python" -c "import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())" ||
        { echo "gpu_round: torch sees no GPU"; exit 100; }
    "$python" -c "from cs336_registry.machine import detect; assert detect().cuda_devices" ||
        { echo "gpu_round: the registry sees no GPU, so the tests would run in the interpreter"; exit 100; }
fi
# PyTorch's AdamW keeps its moments in the parameters' dtype: the optimizer is the same for all.
compiled=torch,adamw=triton+compile
liger=torch,adamw=triton,rmsnorm=liger,swiglu=liger,cross_entropy=liger
backends=(triton+graph triton "$compiled" "$compiled+graph" "$liger")
together=(triton+graph triton+compile "$compiled" "$liger") # of the large model an H200 holds four at the same time
if [ -n "$rehearse" ]; then backends=(triton torch,adamw=triton) together=(triton); fi

pytest=("$python" -m pytest -v --tb=short -p no:cacheprovider -W default)

part() { # name, limit in seconds unless the caller gave one, then the command; its output is shown and kept
    local name=$1 limit=$((${seconds:-$2} * slower)) left=$((budget - SECONDS)) start=$SECONDS
    shift 2
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -le 5 ]; then
        echo "== $name: not run, $SECONDS of $budget seconds are over"
        failed=$((failed + 1))
        return
    fi
    echo "== $name (at most $limit s): $*" | tee -a "$out/round.log"
    # Interrupted rather than terminated: pytest then still says what failed.
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/round.log"
    local status=${PIPESTATUS[0]}
    echo "== $name: exit $status after $((SECONDS - start)) s" | tee -a "$out/round.log"
    [ "$status" -eq 0 ] || failed=$((failed + 1))
}

ops() { "$python" benchmarks/triton_ops.py --output "$out/triton_ops.jsonl" --rounds 9 $toy "$@"; }
tuning() { "$python" benchmarks/triton_tuning.py --output "$out" $toy "$@"; }
step() { "$python" benchmarks/training_step.py --device "$device" --dtype "$dtype" --out "$out/training_step.jsonl" "$@"; }
export -f ops tuning step
alone() { nice timeout 150 bash -c "$1"; } # what takes the GPU must have ended before anything is timed
prepare() {
    if [ -n "$rehearse" ]; then
        ops --prepare --only silu --backends triton
    else
        nice "$python" benchmarks/triton_tuning.py --compile 90 --processes "$several" --dtypes bfloat16 &
        alone 'ops --prepare --only rmsnorm swiglu rope' & local first=$!
        alone 'ops --prepare --only softmax cross_entropy silu embedding' & local second=$!
        alone 'ops --prepare --only attention --backends triton "sdpa_*" "flash_*"' & local third=$!
        alone "step --rounds 0 --size $small --batch 16 --backends $compiled triton" & local fourth=$!
        alone "step --rounds 0 --size $large --batch 8 --backends $compiled triton+compile" & local fifth=$!
        wait $first $second $third $fourth $fifth
        touch "$site/gpu_is_free"
        wait
    fi
}
await_gpu() { # until nothing else runs on it
    while [ -n "${preparing:-}" ] && [ -z "$rehearse" ] && [ ! -e "$site/gpu_is_free" ]; do
        kill -0 "$preparing" 2>/dev/null || break
        sleep 1
    done
}
export -f alone prepare
export python out toy device dtype rehearse several site small large compiled

for wanted in "${parts[@]}"; do
    name=${wanted%%:*} seconds=${wanted#"$name"} seconds=${seconds#:}
    case $name in tuning | ops | attention | step | step_1b) await_gpu ;; esac
    case $name in
        prepare)
            set -m
            bash -c prepare > "$out/prepare.log" 2>&1 &
            preparing=$!
            set +m
            [ -z "$rehearse" ] || wait "$preparing" || failed=$((failed + 1)) ;;
        tests)
            part tests 120 "${pytest[@]}" "${workers[@]}" "${tests[@]}" \
                --ignore tests/triton/test_cross_compilation.py --ignore tests/triton/test_beyond_int32.py ;;
        tuning)
            part tuning 60 bash -c 'tuning --seconds 52 --dtypes bfloat16' ;;
        ops)
            # Compiled, the reference holds 8192 x 128256 logits in float32 several times: half a second a call.
            part ops 120 bash -c 'ops --only linear_cross adamw --backends triton torch liger triton_separate torch_fused
                failed=$?; ops --skip attention linear_cross_entropy adamw && exit $failed' ;;
        attention) part attention 60 bash -c 'ops --only attention --backends triton "sdpa_*" "flash_*"' ;;
        step)
            part step 80 bash -c 'step --size "$small" --batch 16 --rounds 5 --backends "$@"' - "${backends[@]}" ;;
        step_1b)
            part step_1b 80 bash -c 'step --size "$large" --batch 8 --rounds 3 --backends "$@"' - "${together[@]}" ;;
        large) part large 45 "${pytest[@]}" tests/triton/test_beyond_int32.py ;;
        kit)
            part kit 250 "${pytest[@]}" "${workers[@]}" --pyargs cs336_registry.conformance --cs336-backend=triton \
                --cs336-json "$out/triton_kit.json" ;;
        *) echo "gpu_round: unknown part '$name' (${all[*]} tuning kit)"
            failed=$((failed + 1)) ;;
    esac
done
echo "== $failed parts failed; results in $out:"
ls "$out"
exit "$failed"
