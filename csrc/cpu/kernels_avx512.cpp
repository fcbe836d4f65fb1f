#define FASTALIGN_ISA avx512
#define FASTALIGN_VECTOR_BYTES 64
#include "cpu/kernels_for_isa-inl.h"
