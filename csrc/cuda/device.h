// What all kernels use: CUDA's headers (in tests their emulation on the CPU), 16-byte loads and stores, reductions over
// a block, and launches on a given device and stream.
#pragma once

#ifdef FASTALIGN_EMULATE_CUDA
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "launchers.h"

namespace fastalign::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kNegativeInfinity = -INFINITY;
// Far below any logit but finite, so that the difference of two of them is 0 and not NaN.
constexpr float kStart = -1e30f;

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
template <typename T> __device__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half(x); }

// Values per 16-byte access: 4 of float, 8 of bfloat16 and float16.
template <typename T> constexpr int kPack = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void load_pack(const T* at, float (&values)[kPack<T>]) {
    union { uint4 bits; T items[kPack<T>]; } pack;
    pack.bits = *reinterpret_cast<const uint4*>(at);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[i] = to_float(pack.items[i]);
}
template <typename T>
__device__ __forceinline__ void store_pack(T* at, const float (&values)[kPack<T>]) {
    union { uint4 bits; T items[kPack<T>]; } pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.items[i] = from_float<T>(values[i]);
    *reinterpret_cast<uint4*>(at) = pack.bits;
}

// The number of items before the first 16-byte boundary, at most n.
template <typename T>
__device__ __forceinline__ int unaligned_head(const T* row, int n) {
    const int head = static_cast<int>((16 - reinterpret_cast<std::uintptr_t>(row) % 16) % 16 / sizeof(T));
    return head < n ? head : n;
}

// A running maximum, and the sum of exp(z - max) over the values so far.
struct SoftmaxSum {
    float max = kStart, sum = 0.0f;

    template <int count>
    __device__ __forceinline__ void add(const float (&z)[count]) {
        float top = max;
#pragma unroll
        for (int i = 0; i < count; ++i) top = fmaxf(top, z[i]);
        float folded = 0.0f;
#pragma unroll
        for (int i = 0; i < count; ++i) folded += __expf(z[i] - top);
        sum = sum * __expf(max - top) + folded;
        max = top;
    }
};

struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
    __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? a : b; }
};
struct Add {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

// Combines the values of all threads, and returns the result in every thread. The order depends only on the block's
// size. `shared` holds one value per warp. Each call needs another `shared`, because a fast warp may write to it before
// a slow warp has read the values of the last call.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduced(T mine, T neutral, T* shared, Combine combine) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) mine = combine(mine, __shfl_xor_sync(kAllLanes, mine, bits));
    if (lane == 0) shared[warp] = mine;
    __syncthreads();
    T all = lane < blockDim.x / 32 ? shared[lane] : neutral;
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) all = combine(all, __shfl_xor_sync(kAllLanes, all, bits));
    return all;
}

// Makes a device the current one for a launch, and restores the caller's current device afterwards.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) : error_(cudaGetDevice(&before_)) {
        if (error_ == cudaSuccess && device != before_) error_ = cudaSetDevice(device);
    }
    ~DeviceGuard() {
        if (before_ >= 0) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t error() const { return error_; }

private:
    int before_ = -1;
    cudaError_t error_;
};

template <typename... Parameters, typename... Arguments>
int launch(Where where, void (*kernel)(Parameters...), dim3 grid, unsigned threads, Arguments... arguments) {
    DeviceGuard guard(where.device);
    if (guard.error() != cudaSuccess) return guard.error();
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = static_cast<cudaStream_t>(where.stream);
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Calls f(T{}) with the type T that `dtype` names.
template <typename F>
int for_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::f32: return f(float{});
        case DType::bf16: return f(bf16{});
        case DType::f16: return f(fp16{});
    }
    return cudaErrorInvalidValue;
}

}  // namespace fastalign::cuda
