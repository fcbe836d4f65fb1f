#define FASTALIGN_ISA plain
#define FASTALIGN_VECTOR_BYTES 16
#include "cpu/kernels_for_isa-inl.h"
