// The BRGEMM path on any machine: SSE or NEON vectors, and whatever product `brgemm_bf16` points to.
#define FASTALIGN_ISA emulated
#define FASTALIGN_VECTOR_BYTES 16
#define FASTALIGN_VECTORS 4
#define FASTALIGN_BRGEMM
#include "cpu/kernels_for_isa-inl.h"
