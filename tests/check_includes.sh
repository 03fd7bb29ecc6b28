#!/usr/bin/env bash
# The include rule: which room may include which. Fails on the first wrong #include, names it.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A allowed=(
    [base]="base"
    [comm]="comm base"
    [attention]="attention base"
    [moe]="moe comm base"
    [ring]="ring attention comm base"
    [model]="model ring moe comm base"
    [cli]="cli model ring moe attention comm base"
    [benchmarks]="benchmarks cli model ring moe attention comm base"
    [tests]="tests benchmarks cli model ring moe attention comm base"
)
wrong=0
for room in "${!allowed[@]}"; do
    while IFS=: read -r file line include; do
        target=$(sed -E 's|.*"([a-z]+)/.*|\1|' <<<"$include")
        if ! grep -qw "$target" <<<"${allowed[$room]}"; then
            echo "$file:$line: $room may not include $target: $include"
            wrong=1
        fi
    done < <(grep -rnE '^#include "[a-z]+/' "$room" --include='*.[ch]' --include='*.cu' --include='*.cuh')
    if grep -rnE '^#include "[^/"]+"' "$room" --include='*.[ch]' --include='*.cu' --include='*.cuh'; then
        echo "$room: an include must name its folder"
        wrong=1
    fi
done
duplicates=$(git ls-files 2>/dev/null | grep -E '\.(c|h|cu|cuh)$' | sed 's|.*/||' | sort | uniq -d)
if [ -n "$duplicates" ]; then
    echo "file names must be unique in the tree: $duplicates"
    wrong=1
fi
exit $wrong
