#pragma once

// libtorch's batch-reduce matrix product (at::native::cpublas::brgemm, bfloat16 in, float32 out), which reaches AMX and
// AVX-512 BF16. Python looks up its address in the torch that runs; no torch header is needed.

#include <cstdint>

namespace fastalign {

// c (m, n) = or += a (m, k) b (k, n); b in pairs of rows: b[k / 2][n][2]. Leading dimensions in elements.
using Brgemm = void (*)(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t lda, std::int64_t ldb,
                        std::int64_t ldc, bool add, const void* a, const void* b, float* c, bool pairs);
using BrgemmRelease = void (*)(bool pairs);

extern Brgemm brgemm_bf16;           // null: not there
extern BrgemmRelease brgemm_release;

}  // namespace fastalign
