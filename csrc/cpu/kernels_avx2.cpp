#define FASTALIGN_ISA avx2
#define FASTALIGN_VECTOR_BYTES 32
#include "cpu/kernels_for_isa-inl.h"
