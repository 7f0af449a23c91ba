#!/usr/bin/env bash
# Every component on this machine's CPU, float32, at sizes that the textbook manages in seconds; rows are appended to $out.
# Usage: benchmarks/cpu_round.sh [tensors|more_tensors|compiled|models|text] ... (all by default), on an otherwise idle machine.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${out:-benchmarks/results/components_cpu.jsonl}
python=${python:-.venv/bin/python}
failed=0

# bench COMPONENT WORKLOAD BACKEND...
bench() {
    local component=$1 workload=$2 options=()
    shift 2
    for backend in "$@"; do options+=(--backends "$backend"); done
    "$python" -m cs336_registry.cli bench "$component" --workload "$workload" --device cpu --rounds "${rounds:-7}" \
        --out "$out" "${options[@]}" || failed=1
}

tensors() {
    bench rmsnorm 8192x768 reference torch
    bench softmax 8192x1024 reference torch
    bench attention b2_h12_kv12_s1024_d64_causal reference torch
    bench cross_entropy 4096x10000 reference torch
    bench swiglu 8192x2048 reference torch
    bench rope b4_h12_kv12_s1024_d64 reference torch
}

more_tensors() {
    bench embedding 16384_of_50257x768 reference torch
    bench add_rmsnorm 8192x768 reference torch
    bench silu 8192x2048 reference torch
    bench linear 8192x768x2048 reference torch
    bench linear_cross_entropy 512x256x1000 reference torch
    bench gradient_clipping 36x512x512 reference torch
    bench adamw 36x512x512 reference torch
}

# torch.compile over the reference: minutes of compiling, since the gate has many shapes.
compiled() {
    for work in "rmsnorm 8192x768" "softmax 8192x1024" "cross_entropy 4096x10000" "swiglu 8192x2048" \
        "rope b4_h12_kv12_s1024_d64" "add_rmsnorm 8192x768" "silu 8192x2048"; do
        # shellcheck disable=SC2086
        bench $work reference compiled
    done
}

models() {
    bench get_batch 512x1024_of_10000000 reference torch
    bench multihead_self_attention b4_s256_d512_h16 reference torch
    bench transformer_block b4_s256_d512_h16_f1344 reference torch
    bench transformer_lm b2_s256_v10000_l4_d512 reference torch
    bench lr_cosine_schedule one_call reference torch
    bench save_checkpoint small_to_disk reference torch
    bench load_checkpoint small_from_disk reference torch
    bench generate 1x32x1000 reference torch
}

text() {
    bench tokenizer prose_20k_words reference heap_bpe numba_bpe tiktoken hf_tokenizers gigatoken
    bench bpe_trainer prose_20k_words_500 reference heap_bpe numba_bpe
    bench pretoken_counter prose_1000k_words reference heap_bpe numba_bpe
}

for group in "${@:-tensors more_tensors compiled models text}"; do
    for name in $group; do "$name"; done
done
exit $failed
