#!/bin/sh
# Build, check and time the CUDA kernels with nvcc alone; no network, no CMake.
#   benchmarks/gpu_run.sh build|check|pairs|all      results under $OUT (default ./out)
# BUILD names the build folder (default ./build-gpu); what is already built there is used as it is.
set -eu
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build-gpu}
OUT=${OUT:-out}
NVCC=${NVCC:-nvcc}
FLAGS="-std=c++17 -O3 -I. -gencode arch=compute_90a,code=sm_90a -Xcompiler -fPIC ${EXTRA:-}"
mkdir -p "$BUILD" "$OUT"

build()
{
    for c in base/log base/status base/dtype attention/softmax_tiles; do
        ${CC:-cc} -std=c11 -D_GNU_SOURCE -O2 -fPIC -I. -c $c.c -o "$BUILD/$(basename $c).o"
    done
    # A matrix product that the assembler had to serialise is a failed build (C7510 to C7519).
    $NVCC $FLAGS -Xptxas -v -c attention/softmax_sm90.cu -o "$BUILD/softmax_sm90.o" \
        2>"$BUILD/softmax_sm90.log"
    if grep -E 'C75[0-9][0-9]|serializ' "$BUILD/softmax_sm90.log"; then
        exit 1
    fi
    $NVCC $FLAGS -c benchmarks/softmax_cuda_perf.cu -o "$BUILD/softmax_cuda_perf.o"
    $NVCC -o "$BUILD/softmax_cuda_perf" "$BUILD"/*.o
    $NVCC -shared -o "$BUILD/libsoftmax_cuda.so" "$BUILD"/*.o
}

check()
{
    "$BUILD/softmax_cuda_perf" check | tee "$OUT/softmax_check.txt" | grep -v '^ok' || true
    grep -q '^check passed' "$OUT/softmax_check.txt"
}

pairs()
{
    python3 benchmarks/softmax_cuda_pairs.py "$BUILD/libsoftmax_cuda.so" "$@" |
        tee "$OUT/softmax_pairs.jsonl"
}

step=${1:-all}
[ $# -gt 0 ] && shift
case $step in
build) build ;;
check) check ;;
pairs) pairs "$@" ;;
all)
    [ -x "$BUILD/softmax_cuda_perf" ] || build
    check
    pairs
    ;;
*) echo "usage: gpu_run.sh build|check|pairs|all" >&2; exit 2 ;;
esac
