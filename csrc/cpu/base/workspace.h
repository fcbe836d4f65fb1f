#pragma once

// Scratch memory of one call: one aligned block, on huge pages if the system grants them. They help because the second
// product reads columns of the weight, where each step is on a new page.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastalign {

// Python sets this, because huge pages do not make every machine faster.
inline bool huge_pages = true;

inline void prefer_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (!huge_pages) return;
    const std::size_t page = 2u << 20;
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
    const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

class Workspace {
public:
    explicit Workspace(std::size_t bytes) {
        const std::size_t align = bytes >= (2u << 20) ? (2u << 20) : 64;
        size_ = (bytes + align - 1) / align * align;
        data_ = static_cast<char*>(std::aligned_alloc(align, size_ ? size_ : align));
        if (!data_) throw std::bad_alloc();
        prefer_huge_pages(data_, size_);
    }
    ~Workspace() { std::free(data_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    char* data() const { return data_; }

private:
    char* data_;
    std::size_t size_;
};

// Cuts arrays off a block. Each begins on a new cache line. With a null block it only adds up the bytes needed.
class Carver {
public:
    explicit Carver(char* block) : block_(block) {}
    template <typename T>
    T* take(std::int64_t count) {
        char* at = block_ ? block_ + used_ : nullptr;
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(at);
    }
    std::size_t used() const { return used_; }

private:
    char* block_;
    std::size_t used_ = 0;
};

}  // namespace fastalign
