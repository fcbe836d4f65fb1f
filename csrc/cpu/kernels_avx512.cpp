#define FASTALIGN_ISA avx512
#define FASTALIGN_VECTOR_BYTES 64
#include "kernels_for_isa.h"
