#!/bin/sh
# Build, check and time the CUDA kernels with nvcc alone; no network, no CMake.
#   benchmarks/gpu_run.sh build|check|sanitize|time|all
# BUILD names the build folder (default ./build-gpu), OUT the results (default ./out). all builds
# only what is missing in BUILD.
set -eu
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
OUT=${OUT:-out}
NVCC=${NVCC:-nvcc}
FLAGS="-std=c++17 -O3 -lineinfo -I. -gencode arch=compute_90a,code=sm_90a -Xcompiler -fPIC"
mkdir -p "$BUILD" "$OUT"

build()
{
    objects=
    for c in base/log base/status base/dtype attention/softmax_tiles; do
        o=$BUILD/$(basename $c).o
        ${CC:-cc} -std=c11 -D_GNU_SOURCE -O2 -fPIC -I. -c $c.c -o "$o"
        objects="$objects $o"
    done
    # A matrix product that the assembler had to serialise is a failed build (C7510 to C7519).
    $NVCC $FLAGS -Xptxas -v -c attention/softmax_sm90.cu -o "$BUILD/softmax_sm90.o" \
        2>"$BUILD/softmax_sm90.log" || { cat "$BUILD/softmax_sm90.log"; exit 1; }
    if grep -E '\(C75[0-9][0-9]\)' "$BUILD/softmax_sm90.log"; then
        exit 1
    fi
    $NVCC -std=c++17 -O3 -lineinfo -I. -Xcompiler -fPIC -gencode arch=compute_80,code=compute_80 \
        -gencode arch=compute_90,code=sm_90 -c attention/softmax_cuda.cu -o "$BUILD/softmax_cuda.o"
    objects="$objects $BUILD/softmax_sm90.o $BUILD/softmax_cuda.o"
    for program in softmax_cuda_check softmax_cuda_perf ring_cuda_perf; do
        $NVCC $FLAGS -c benchmarks/$program.cu -o "$BUILD/$program.o"
        $NVCC -o "$BUILD/$program" "$BUILD/$program.o" $objects -Xlinker -lpthread
    done
    $NVCC -shared -o "$BUILD/libsoftmax_cuda.so" "$BUILD/softmax_cuda_perf.o" $objects
}

check()
{
    "$BUILD/softmax_cuda_check" >"$OUT/softmax_check.txt" 2>&1 || true
    grep -v '^ok' "$OUT/softmax_check.txt"
    grep -q '^check passed' "$OUT/softmax_check.txt"
    "$BUILD/softmax_cuda_check" soak 100
}

sanitize()
{
    for tool in memcheck racecheck initcheck synccheck; do
        timeout 120 compute-sanitizer --tool $tool --error-exitcode 9 "$BUILD/softmax_cuda_check" small \
            >"$OUT/softmax_$tool.txt" 2>&1 || true
        echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/softmax_$tool.txt")"
    done
}

measure()
{
    if python3 -c 'import torch' 2>/dev/null; then
        python3 benchmarks/softmax_cuda_pairs.py "$BUILD/libsoftmax_cuda.so" |
            tee "$OUT/softmax_pairs.jsonl"
    else
        "$BUILD/softmax_cuda_perf" time | tee "$OUT/softmax_time.txt"
    fi
    "$BUILD/softmax_cuda_perf" packed | tee "$OUT/softmax_packed.txt"
    "$BUILD/softmax_cuda_perf" ring | tee "$OUT/softmax_ring.txt"
    if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then
        "$BUILD/ring_cuda_perf" 16384 32768 65536 131072 524288 | tee "$OUT/ring.txt"
    fi
}

case ${1:-all} in
build) build ;;
check) check ;;
sanitize) sanitize ;;
time) measure ;;
all)
    [ -x "$BUILD/ring_cuda_perf" ] || build
    check
    sanitize
    measure
    ;;
*)
    echo "usage: gpu_run.sh build|check|sanitize|time|all" >&2
    exit 2
    ;;
esac
