#!/bin/bash
# Build, test and time everything that runs on GPUs; one short table at the end.
#   benchmarks/gpu_run.sh build            configure with -DRA_CUDA=ON and build (needs the libraries of README.md)
#   benchmarks/gpu_run.sh pack FILE        what a machine without them needs: programs and the libraries they load
#   benchmarks/gpu_run.sh check            every test that needs a GPU
#   benchmarks/gpu_run.sh sanitize         compute-sanitizer over small cases
#   benchmarks/gpu_run.sh time             one GPU: kernels, layers, the whole model
#   benchmarks/gpu_run.sh rings            2, 4, ... GPUs: transfers, layers over rings
#   benchmarks/gpu_run.sh models           2, 4, ... GPUs: the whole model
#   benchmarks/gpu_run.sh table            what the last three left in OUT
#   benchmarks/gpu_run.sh all              all of these
# BUILD names the build folder (default ./build-gpu) or an unpacked FILE; OUT the results (default ./out), RANKS the
# numbers of GPUs for rings and models (default: powers of two). No network is used. PyTorch, where there is one, is timed beside.
set -eu
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
OUT=${OUT:-out}
BIN=$BUILD/bin
export LD_LIBRARY_PATH=$BIN:${LD_LIBRARY_PATH:-} NCCL_NVLS_ENABLE=0
mkdir -p "$OUT"

devices() # those that may be used, one a line
{
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        echo "${CUDA_VISIBLE_DEVICES//,/$'\n'}"
    else
        nvidia-smi --query-gpu=index --format=csv,noheader
    fi
}

build()
{
    cmake -S . -B "$BUILD" -G Ninja -DRA_CUDA=ON >"$OUT/configure.txt"
    cmake --build "$BUILD" | tee "$OUT/build.txt" | tail -1
    # A matrix product that the assembler had to serialise is a failed build (C7510 to C7519).
    ! grep -E '\(C75[0-9][0-9]\)' "$OUT/build.txt"
}

pack()
{
    stage=$(mktemp -d)
    mkdir "$stage/bin"
    for program in "$BIN"/*_cuda* "$BIN"/test_comm_* "$BIN"/ring_device_perf "$BIN"/model_perf "$BIN"/ringattn; do
        strip -o "$stage/bin/$(basename "$program")" "$program"
    done
    ldd "$BIN/ringattn" "$BIN"/test_model_model_cuda | grep -oE '/[^ ]*lib(cjson|pcre2-8|utf8proc|xxhash|cmocka)\.so[^ ]*' | sort -u |
        xargs -I{} cp -L {} "$stage/bin"
    tar cJf "$1" -C "$stage" bin
    rm -r "$stage"
}

check()
{
    failed=0
    for test in "$BIN"/test_*_cuda "$BIN"/test_comm_*; do
        name=$(basename "$test")
        timeout 300 "$test" >"$OUT/$name.txt" 2>&1 || failed=1
        echo "$name: $(grep -cE '^\[ +OK' "$OUT/$name.txt") passed, $(grep -cE '^\[ +FAILED \] [a-z]' "$OUT/$name.txt") failed," \
            "$(grep -E '^\[ +SKIPPED \] [a-z]' "$OUT/$name.txt" | sort -u | wc -l) skipped"
    done
    timeout 300 "$BIN/softmax_cuda_check" >"$OUT/softmax_check.txt" 2>&1 || failed=1
    tail -1 "$OUT/softmax_check.txt"
    timeout 300 "$BIN/softmax_cuda_check" soak 100 || failed=1
    return $failed
}

sanitized() # name, tool, options, program and arguments: one of several at a time, the GPUs in turn
{
    while [ "$(jobs -rp | wc -l)" -ge $((4 * ${#gpus[@]})) ]; do
        wait -n || true
    done
    name=$1 tool=$2 log=$OUT/sanitize_${1// /_}_$2.txt
    shift 2
    next=$((next + 1))
    {
        code=0
        [[ $name == *ring* || $name == *scan* ]] || export CUDA_VISIBLE_DEVICES=${gpus[next % ${#gpus[@]}]}
        timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" >"$log" 2>&1 || code=$?
        echo "$name, $tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" || echo "no summary") (exit $code)"
        [ $code -eq 0 ] || touch "$OUT/sanitize_failed"
    } &
}

sanitize()
{
    mapfile -t gpus < <(devices)
    next=0
    rm -f "$OUT/sanitize_failed"
    for tool in racecheck memcheck initcheck; do # the slowest first
        tests='*'
        [ $tool != racecheck ] || tests='*_oracle' # every kernel and shape once; more takes many minutes
        sanitized linear $tool "$BIN/test_attention_linear_cuda" "$tests"
        sanitized softmax $tool "$BIN/softmax_cuda_check" small
        sanitized experts $tool "$BIN/test_moe_experts_cuda"
        sanitized "row ops" $tool "$BIN/test_model_layer_ops_cuda"
        sanitized head $tool "$BIN/test_model_head_cuda"
        sanitized router $tool "$BIN/test_moe_router_cuda"
    done
    sanitized softmax synccheck "$BIN/softmax_cuda_check" small
    # NCCL asks for kernels that it was built without and for peer access that is there: calls that fail, not memory.
    sanitized "softmax ring" memcheck --report-api-errors no "$BIN/test_ring_softmax_ring_cuda"
    sanitized "state scan" memcheck --report-api-errors no "$BIN/test_ring_state_scan_cuda"
    sanitized model memcheck "$BIN/model_perf" --device cuda --tokens 4k --iters 1 --warmup 0 --check off
    wait
    [ ! -e "$OUT/sanitize_failed" ]
}

has_torch()
{
    python3 -c 'import torch' 2>/dev/null
}

model() # name, options of model_perf; what cannot be run says why and is passed over
{
    "$BIN/model_perf" --model "configs/models/ring-$1-linear-2.0" --random-weights 1 --device cuda "${@:2}" >"$OUT/last.txt" 2>&1 || true
    [ -s "$OUT/model.txt" ] || grep -m 1 tok_per_s "$OUT/last.txt" >"$OUT/model.txt" || true
    grep 'check failed' "$OUT/last.txt" | tee -a "$OUT/model.txt"
    tail -1 "$OUT/last.txt" | tee -a "$OUT/model.txt"
}

measure()
{
    rm -f "$OUT/model.txt"
    has_torch && python3 benchmarks/softmax_cuda_pairs.py "$BIN/libsoftmax_cuda.so" | tee "$OUT/softmax_pairs.jsonl"
    "$BIN/softmax_cuda_perf" packed | tee "$OUT/softmax_packed.txt"
    "$BIN/linear_cuda_perf" time | tee "$OUT/linear.txt"
    "$BIN/moe_cuda_perf" gemm | tee "$OUT/moe_gemm.txt"
    "$BIN/moe_cuda_perf" layer | tee "$OUT/moe_layer.txt"
    "$BIN/row_ops_cuda_perf" rows | tee "$OUT/row_ops.txt"
    model mini --mode prefill --tokens 128k --iters 3
    model mini --mode score --tokens 128k --iters 3
}

ring() # transport, ranks, cases
{
    "$BIN/ring_device_perf" "$@" | tee -a "$OUT/ring.txt"
}

torch_ring() # ranks, sizes
{
    has_torch || return 0
    torchrun --nproc-per-node "$1" benchmarks/ring_torch.py "${@:2}" 2>/dev/null | grep '"torch ring"' |
        tee -a "$OUT/ring_torch.jsonl" || true
}

several() # the numbers of GPUs to run on
{
    gpus=$(devices | wc -l)
    for ((n = 2; n <= gpus; n *= 2)); do echo $n; done
}

rings()
{
    rm -f "$OUT/comm.txt" "$OUT/ring.txt" "$OUT/ring_torch.jsonl"
    short=(softmax:16384 softmax:32768 softmax:65536 softmax:131072)
    for ranks in ${RANKS:-$(several)}; do
        for transport in peer nccl; do
            "$BIN/comm_cuda_perf" "$ranks" $transport | tee -a "$OUT/comm.txt"
        done
        for _ in 1 2; do # beside each other, as machines drift
            ring peer "$ranks" "${short[@]}"
            torch_ring "$ranks" 32768 131072
        done
        ring nccl "$ranks" "${short[@]}" packs:524288 linear:1048576
        ring peer "$ranks" packs:524288 linear:1048576 softmax:32768:16 softmax:131072:16 softmax:262144 \
            softmax:524288 softmax:1048576
        torch_ring "$ranks" 32768:16 131072:16 262144 524288 1048576
        [ "$ranks" -lt 4 ] || ring peer "$ranks" softmax:2097152 softmax:4194304 packs:4194304
    done
}

models()
{
    for ranks in ${RANKS:-$(several)}; do
        for transport in peer nccl; do
            model mini --mode prefill --tokens 128k --ranks "$ranks" --iters 3 --transport $transport
            model mini --mode score --tokens 128k --ranks "$ranks" --iters 3 --transport $transport
        done
        for mode in prefill score; do
            model mini --mode $mode --tokens 1m --ranks "$ranks" --iters 1 --warmup 0
        done
        model flash --expert-parallel on --mode prefill --tokens 128k --ranks "$ranks" --iters 2
        [ "$ranks" -lt 4 ] || for tokens in 2m 4m; do
            model mini --mode prefill --tokens $tokens --ranks "$ranks" --iters 1 --warmup 0
        done
    done
}

table()
{
    echo "== causal softmax, one GPU: head size, tokens, TFLOP/s, cuDNN's, ratio"
    sed -nE 's/.*"head_dim": ([0-9]+), "tokens": ([0-9]+), "ours": ([0-9.]+), "cudnn": ([0-9.]+), "ratio": ([0-9.]+).*/\1 \2 \3 \4 \5/p' \
        "$OUT/softmax_pairs.jsonl" 2>/dev/null || true
    echo "== linear, 1,048,576 tokens"
    grep -E 'lightning|copy' "$OUT/linear.txt" 2>/dev/null || true
    echo "== rings: case, transport, heads, GPUs, tokens, TFLOP/s a GPU, ratio to one GPU"
    sed -nE 's/^(\w+) +(\w+) +heads ([0-9]+) ranks [0-9]+ gpus ([0-9]+) tokens ([0-9]+) .* ms +([0-9.]+) TFLOP.*ratio ([0-9.]+).*/\1 \2 \3 \4 \5 \6 \7/p' \
        "$OUT/ring.txt" 2>/dev/null || true
    echo "== rings of torch: GPUs, heads, tokens, TFLOP/s a GPU"
    sed -nE 's/.*"gpus": ([0-9]+), "heads": ([0-9]+), "tokens": ([0-9]+).*"tflops_a_gpu": ([0-9.]+).*/\1 \2 \3 \4/p' \
        "$OUT/ring_torch.jsonl" 2>/dev/null || true
    echo "== whole model"
    cat "$OUT/model.txt" 2>/dev/null || true
}

case ${1:-all} in
build) build ;;
pack) pack "${2:?name of the archive}" ;;
check) check ;;
sanitize) sanitize ;;
time)
    measure
    table
    ;;
rings)
    rings
    table
    ;;
models)
    models
    table
    ;;
table) table ;;
all)
    [ -x "$BIN/ringattn" ] || build
    check
    sanitize
    measure
    rings
    models
    table
    ;;
*)
    echo "usage: gpu_run.sh build|pack FILE|check|sanitize|time|rings|models|table|all" >&2
    exit 2
    ;;
esac
