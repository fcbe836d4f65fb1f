// AVX-512, and bfloat16 through libtorch's BRGEMM, by AVX-512 BF16 or AMX: see tiles_brgemm-inl.h.
#define FASTALIGN_ISA avx512_bf16
#define FASTALIGN_VECTOR_BYTES 64
#define FASTALIGN_VECTORS 4  // 64 tokens a panel: whole AMX tiles
#define FASTALIGN_BRGEMM
#include "cpu/kernels_for_isa-inl.h"
