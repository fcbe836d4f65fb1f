// AVX-512. Products of bfloat16 go to libtorch's BRGEMM, which uses AVX-512 BF16 or AMX (see tiles_brgemm-inl.h).
#define FASTALIGN_ISA avx512_bf16
#define FASTALIGN_VECTOR_BYTES 64
#define FASTALIGN_VECTORS 4  // 64 tokens per panel fill AMX tiles completely
#define FASTALIGN_BRGEMM
#include "cpu/kernels_for_isa-inl.h"
