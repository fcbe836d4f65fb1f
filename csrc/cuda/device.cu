// What bindings_cuda.cpp needs from the CUDA runtime.

#include "device.h"

namespace fastalign::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#ifdef FASTALIGN_EMULATE_CUDA
long launches() { return emulation::launches; }
void last_block_first(bool reversed) { emulation::last_block_first = reversed; }
#endif

}  // namespace fastalign::cuda
