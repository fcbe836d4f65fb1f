#!/bin/sh
# Builds and runs check.cpp under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
set -eu
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=c++17 -O1 -g -ffp-contract=fast -Wall -Wextra -I. -pthread"
sources="check/check.cpp check/heads.cpp check/kernels_emulated.cpp cpu/kernels.cpp cpu/kernels_plain.cpp"
for sanitizer in address,undefined thread; do
    echo "== -fsanitize=$sanitizer"
    objects=""
    for source in $sources; do
        object="$out/$(basename "$source" .cpp).o"
        ${CXX:-c++} $flags -fsanitize="$sanitizer" -fno-sanitize-recover=all -c "$source" -o "$object"
        objects="$objects $object"
    done
    if [ "$(uname -m)" = x86_64 ]; then  # the machine's own vectors too
        ${CXX:-c++} $flags -mavx2 -mfma -mf16c -fsanitize="$sanitizer" -fno-sanitize-recover=all \
            -c cpu/kernels_avx2.cpp -o "$out/avx2.o"
        ${CXX:-c++} $flags -DFASTALIGN_HAS_AVX2 -fsanitize="$sanitizer" -fno-sanitize-recover=all \
            -c cpu/kernels.cpp -o "$out/kernels.o"
        objects="$objects $out/avx2.o"
    fi
    ${CXX:-c++} $flags -fsanitize="$sanitizer" $objects -o "$out/check"
    "$out/check"
done
