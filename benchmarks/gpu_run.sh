#!/bin/bash
# Build, test and time everything that runs on GPUs; one short table at the end.
#   benchmarks/gpu_run.sh build            configure with -DRA_CUDA=ON and build (needs the libraries of README.md)
#   benchmarks/gpu_run.sh pack FILE        what a machine without them needs: programs and the libraries they load
#   benchmarks/gpu_run.sh check|sanitize|time|all
# BUILD names the build folder (default ./build-gpu) or an unpacked FILE; OUT the results (default ./out). No network
# is used. PyTorch, where there is one, is timed beside the kernels.
set -eu
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
OUT=${OUT:-out}
BIN=$BUILD/bin
MINI="--model configs/models/ring-mini-linear-2.0 --random-weights 1 --device cuda"
export LD_LIBRARY_PATH=$BIN:${LD_LIBRARY_PATH:-} NCCL_NVLS_ENABLE=0
mkdir -p "$OUT"

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

sanitize()
{
    for tool in memcheck racecheck initcheck synccheck; do
        timeout 200 compute-sanitizer --tool $tool --error-exitcode 9 "$BIN/softmax_cuda_check" small \
            >"$OUT/softmax_$tool.txt" 2>&1 || true
        echo "softmax, $tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/softmax_$tool.txt")"
    done
    timeout 300 compute-sanitizer --tool memcheck --error-exitcode 9 "$BIN/model_perf" --device cuda --tokens 4k \
        --iters 1 --warmup 0 --check off >"$OUT/model_memcheck.txt" 2>&1 || true
    echo "model, memcheck: $(grep 'ERROR SUMMARY' "$OUT/model_memcheck.txt")"
}

model() # options of model_perf
{
    # shellcheck disable=SC2086 # MINI is a list of words
    "$BIN/model_perf" $MINI "$@" 2>&1 | tail -1 | tee -a "$OUT/model.txt"
}

measure()
{
    gpus=$(nvidia-smi -L | wc -l)
    if python3 -c 'import torch' 2>/dev/null; then
        python3 benchmarks/softmax_cuda_pairs.py "$BIN/libsoftmax_cuda.so" | tee "$OUT/softmax_pairs.jsonl"
    fi
    "$BIN/softmax_cuda_perf" packed | tee "$OUT/softmax_packed.txt"
    "$BIN/linear_cuda_perf" time | tee "$OUT/linear.txt"
    "$BIN/moe_cuda_perf" gemm | tee "$OUT/moe_gemm.txt"
    "$BIN/moe_cuda_perf" layer | tee "$OUT/moe_layer.txt"
    "$BIN/row_ops_cuda_perf" rows | tee "$OUT/row_ops.txt"
    for ((ranks = 1; ranks <= gpus; ranks *= 2)); do
        model --mode prefill --tokens 128k --ranks $ranks --iters 3
        model --mode score --tokens 128k --ranks $ranks --iters 3
        [ $ranks -eq 1 ] && continue
        for transport in peer nccl; do
            "$BIN/comm_cuda_perf" $ranks $transport >>"$OUT/comm.txt"
            "$BIN/ring_device_perf" $transport $ranks softmax:16384 softmax:32768 softmax:65536 softmax:131072 \
                packs:524288 linear:1048576 | tee -a "$OUT/ring.txt"
        done
        model --mode prefill --tokens 1m --ranks $ranks --iters 1 --warmup 0
    done
}

case ${1:-all} in
build) build ;;
pack) pack "${2:?name of the archive}" ;;
check) check ;;
sanitize) sanitize ;;
time) measure ;;
all)
    [ -x "$BIN/ringattn" ] || build
    check
    sanitize
    measure
    ;;
*)
    echo "usage: gpu_run.sh build|pack FILE|check|sanitize|time|all" >&2
    exit 2
    ;;
esac
