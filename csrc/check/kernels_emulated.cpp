// The BRGEMM kernels for any machine, with SSE or NEON vectors. `brgemm_bf16` may point to any product.
#define FASTALIGN_ISA emulated
#define FASTALIGN_VECTOR_BYTES 16
#define FASTALIGN_VECTORS 4
#define FASTALIGN_BRGEMM
#include "cpu/kernels_for_isa-inl.h"
