#!/usr/bin/env bash
# Installs what is missing, builds Release with warnings as errors and runs every test.
set -euo pipefail
cd "$(dirname "$0")"

./install_dependencies.sh
cmake -S . -B build-test -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build build-test
ctest --test-dir build-test --output-on-failure "$@"
