// Not yet run on a machine with AVX-512: compiled, and the same source is tested at the widths of plain and avx2.
#define FASTALIGN_ISA avx512
#define FASTALIGN_VECTOR_BYTES 64
#include "kernels_for_isa.h"
