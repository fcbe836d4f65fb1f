#pragma once

// libtorch's batch-reduce matrix product (at::native::cpublas::brgemm, bfloat16 in, float32 out), which uses AMX and
// AVX-512 BF16. Python looks up its address in the loaded torch, so no torch header is needed.

#include <cstdint>

namespace fastalign {

// c (m, n) = a (m, k) b (k, n), or += with `add`. b is stored in pairs of rows, as b[k / 2][n][2]. The leading
// dimensions are in elements.
using Brgemm = void (*)(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t lda, std::int64_t ldb,
                        std::int64_t ldc, bool add, const void* a, const void* b, float* c, bool pairs);
using BrgemmRelease = void (*)(bool pairs);

extern Brgemm brgemm_bf16;           // null if this torch has none
extern BrgemmRelease brgemm_release;

}  // namespace fastalign
