#define FASTALIGN_ISA avx2
#define FASTALIGN_VECTOR_BYTES 32
#include "kernels_for_isa.h"
