#include "cpu/kernels.h"

#include "cpu/tiles/brgemm.h"

namespace fastalign {

Brgemm brgemm_bf16 = nullptr;
BrgemmRelease brgemm_release = nullptr;

namespace plain { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }

namespace {

bool has_avx2() {
#ifdef FASTALIGN_HAS_AVX2
    // F16C is not tested, because it is older than AVX2 and clang before version 15 does not know its name.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

bool has_avx512() {
#ifdef FASTALIGN_HAS_AVX512
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

// A machine with AMX also has AVX-512 BF16, and BRGEMM chooses between them.
bool has_avx512_bf16() {
#ifdef FASTALIGN_HAS_AVX512_BF16
    return has_avx512() && brgemm_bf16 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

}  // namespace

std::vector<const Kernels*> compiled_kernels() {
    std::vector<const Kernels*> all;
#ifdef FASTALIGN_HAS_AVX512_BF16
    all.push_back(&avx512_bf16::kernels);
#endif
#ifdef FASTALIGN_HAS_AVX512
    all.push_back(&avx512::kernels);
#endif
#ifdef FASTALIGN_HAS_AVX2
    all.push_back(&avx2::kernels);
#endif
    all.push_back(&plain::kernels);
    return all;
}

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;
    for (const Kernels* k : compiled_kernels()) {
        const std::string name = k->name;
        if ((name == "avx512_bf16" && !has_avx512_bf16()) || (name == "avx512" && !has_avx512()) || (name == "avx2" && !has_avx2()))
            continue;
        found.push_back(k);
    }
    return found;
}

}  // namespace fastalign
