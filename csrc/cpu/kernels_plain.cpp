#define FASTALIGN_ISA plain
#define FASTALIGN_VECTOR_BYTES 16
#include "kernels_for_isa.h"
