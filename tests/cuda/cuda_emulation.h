// CUDA's execution model on the CPU, so that csrc/cuda/*.cu compile with g++ and run in tests, also under sanitizers.
//
// A CUDA thread is a std::thread; __syncthreads and the warp primitives are C++20 barriers that a thread leaves for
// good when it returns. Blocks run one after the other. Shared memory is static memory, filled with NaNs before each
// block. What ThreadSanitizer sees is what CUDA promises, with one exception: a shuffle or vote here also orders memory
// between the lanes of a warp, which on a GPU only __syncwarp and __syncthreads do. Nothing runs at a GPU's speed or
// with its rounding of approximate functions: __expf here is exp.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("cuda_shared")))

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// Aligned as in CUDA, so that UndefinedBehaviorSanitizer reports a vector access that a GPU would trap on.
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace emulation {

// What a lane hands to the others, and in which exchange: a lane that did not take part is found out.
struct Slot {
    alignas(16) unsigned char value[16];
    unsigned exchange;
};
struct Warp {
    explicit Warp(unsigned lanes) : barrier(lanes) {}
    std::barrier<> barrier;
    Slot slots[2][32] = {};
};
struct Block {
    explicit Block(unsigned threads) : barrier(threads) {
        for (unsigned first = 0; first < threads; first += 32) warps.emplace_back(threads - first < 32 ? threads - first : 32);
    }
    std::barrier<> barrier;
    std::deque<Warp> warps;
};

inline thread_local Block* block = nullptr;
inline thread_local Warp* warp = nullptr;
inline thread_local unsigned lane = 0, exchanges = 0;
inline int device = 0;
// Order of the blocks: a result that depends on it is a race between blocks.
inline bool last_block_first = false;
inline long launches = 0;

// What each lane of this warp passes, by lane. Two sets of slots in turn: one barrier keeps the next write of a fast
// lane from the read of a slow one.
template <typename T>
const Slot* exchange(unsigned mask, T value) {
    static_assert(sizeof(T) <= 16);
    Slot* slots = warp->slots[++exchanges & 1];
    std::memcpy(slots[lane].value, &value, sizeof(T));
    slots[lane].exchange = exchanges;
    warp->barrier.arrive_and_wait();
    for (unsigned from = 0; from < 32; ++from)
        if (mask != ~0u || slots[from].exchange != exchanges) {
            std::fprintf(stderr, "emulation: lane %u takes no part in an exchange of its warp, mask %08x\n", from, mask);
            std::abort();
        }
    return slots;
}
template <typename T>
T shuffle(unsigned mask, T value, unsigned from) {
    std::memcpy(&value, exchange(mask, value)[from].value, sizeof(T));
    return value;
}

extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_cuda_shared[], __stop_cuda_shared[];

// All ones: NaN in every floating type, -1 in every integer. Compiled without sanitizers, for it crosses red zones.
__attribute__((no_sanitize("address", "thread"), optimize("no-tree-loop-distribute-patterns"))) inline void poison_shared() {
    for (volatile unsigned char* p = __start_cuda_shared; p < __stop_cuda_shared; ++p) *p = 0xff;
}

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) { emulation::warp->barrier.arrive_and_wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) { return emulation::shuffle(mask, value, emulation::lane ^ bits); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) { return emulation::shuffle(mask, value, from & 31); }
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    return emulation::shuffle(mask, value, emulation::lane + by < 32 ? emulation::lane + by : emulation::lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const emulation::Slot* slots = emulation::exchange(mask, predicate != 0);
    unsigned votes = 0;
    for (unsigned from = 0; from < 32; ++from) votes |= unsigned(slots[from].value[0]) << from;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <typename T>
T atomicAdd(T* at, T value) { return std::atomic_ref<T>(*at).fetch_add(value); }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
template <typename T>
T __ldcs(const T* at) { return *at; }
template <typename T>
void __stcs(T* at, T value) { *at = value; }

// bfloat16 and float16, rounded to nearest even.
struct __nv_bfloat16 { std::uint16_t bits; };
struct __half { std::uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
inline float __bfloat162float(__nv_bfloat16 a) { return __uint_as_float(unsigned(a.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float a) {
    const unsigned u = __float_as_uint(a);
    if (a != a) return {0x7fff};
    return {std::uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half a) {
    const unsigned sign = unsigned(a.bits & 0x8000) << 16, exponent = a.bits >> 10 & 31, mantissa = a.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    const float size = exponent ? std::ldexp(float(1024 + mantissa), int(exponent) - 25) : std::ldexp(float(mantissa), -24);
    return sign ? -size : size;
}
inline __half __float2half(float a) {
    const std::uint16_t sign = __float_as_uint(a) >> 16 & 0x8000;
    const float size = std::fabs(a);
    if (a != a) return {0x7fff};
    if (size == 0) return {sign};
    if (size >= 65520) return {std::uint16_t(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(size, &exponent);
    const int ulp = (exponent < -13 ? -13 : exponent) - 11;  // of the result: subnormal below 2^-14
    const long units = std::lrint(std::ldexp(size, -ulp));   // nearest even; 1024 ... 2048 of a normal number
    return {std::uint16_t(sign | (units + ((long(ulp) + 24) << 10)))};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }

// Tensor cores. Every lane holds whole operands, and 8 of the 256 sums: which, is as unspecified as in CUDA. Products
// and sums are float32, where a tensor core adds with fewer guard digits.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
namespace precision {
struct tf32;
}
enum layout_t { mem_row_major };
template <typename Element> struct Stored { using type = Element; };
template <> struct Stored<precision::tf32> { using type = float; };

inline float number(float x) { return x; }
inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float number(__half x) { return __half2float(x); }
inline float __float_to_tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000) & ~0x1fffu); }

template <typename Use, int m, int n, int k, typename Element, typename Layout = void>
struct fragment {
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? k : m, columns = std::is_same_v<Use, matrix_a> ? k : n;
    static constexpr int num_elements = std::is_same_v<Use, accumulator> ? m * n / 32 : rows * columns;
    typename Stored<Element>::type x[num_elements];
};

template <typename Use, int m, int n, int k, typename Element, typename Layout, typename T>
void load_matrix_sync(fragment<Use, m, n, k, Element, Layout>& to, const T* from, unsigned pitch) {
    using F = fragment<Use, m, n, k, Element, Layout>;
    if (reinterpret_cast<std::uintptr_t>(from) % 32 || pitch * sizeof(T) % 16) std::abort();
    for (int i = 0; i < F::rows; ++i)
        for (int j = 0; j < F::columns; ++j)
            to.x[i * F::columns + j] = std::is_same_v<Layout, row_major> ? from[i * pitch + j] : from[j * pitch + i];
}
template <int m, int n, int k, typename Element>
void store_matrix_sync(float* to, const fragment<accumulator, m, n, k, Element>& from, unsigned pitch, layout_t) {
    for (int i = 0; i < from.num_elements; ++i) {
        const int at = emulation::lane * from.num_elements + i;
        to[at / n * pitch + at % n] = from.x[i];
    }
}
template <typename Fragment>
void fill_fragment(Fragment& fragment, float value) {
    for (auto& x : fragment.x) x = value;
}
template <int m, int n, int k, typename E, typename A, typename B>
void mma_sync(fragment<accumulator, m, n, k, float>& out, const fragment<matrix_a, m, n, k, E, A>& a,
              const fragment<matrix_b, m, n, k, E, B>& b, const fragment<accumulator, m, n, k, float>& c) {
    for (int i = 0; i < out.num_elements; ++i) {
        const int at = emulation::lane * out.num_elements + i;
        float sum = c.x[i];
        for (int t = 0; t < k; ++t) sum += number(a.x[at / n * k + t]) * number(b.x[t * n + at % n]);
        out.x[i] = sum;
    }
}

}  // namespace nvcuda::wmma

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) return cudaErrorInvalidDevice;
    return emulation::device = device, cudaSuccess;
}

namespace emulation {

template <typename Kernel, typename Arguments>
void run_block(Kernel kernel, const Arguments& arguments, const cudaLaunchConfig_t& config, dim3 index) {
    const dim3 size = config.blockDim;
    const unsigned threads = size.x * size.y * size.z;
    poison_shared();
    Block here(threads);
    std::vector<std::thread> running;
    for (unsigned i = 0; i < threads; ++i)
        running.emplace_back([&, i] {
            threadIdx = {i % size.x, i / size.x % size.y, i / size.x / size.y};
            blockIdx = index, blockDim = size, gridDim = config.gridDim;
            block = &here, warp = &here.warps[i / 32], lane = i % 32, exchanges = 0;
            std::apply(kernel, arguments);
            warp->barrier.arrive_and_drop();
            here.barrier.arrive_and_drop();
        });
    for (auto& thread : running) thread.join();
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    const dim3 grid = config->gridDim, block = config->blockDim;
    const unsigned long threads = 1ul * block.x * block.y * block.z, blocks = 1ul * grid.x * grid.y * grid.z;
    if (!blocks || !threads || threads > 1024 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    ++emulation::launches;
    for (unsigned long i = 0; i < blocks; ++i) {
        const unsigned long at = emulation::last_block_first ? blocks - 1 - i : i;
        emulation::run_block(kernel, values, *config, dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y));
    }
    return cudaSuccess;
}
