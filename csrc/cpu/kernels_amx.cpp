// AVX-512, and bfloat16 through libtorch's BRGEMM. Not yet run on such a machine: see tiles_brgemm.h.
#define FASTALIGN_ISA amx
#define FASTALIGN_VECTOR_BYTES 64
#define FASTALIGN_VECTORS 4  // 64 tokens a panel: whole AMX tiles
#define FASTALIGN_BRGEMM
#include "kernels_for_isa.h"
