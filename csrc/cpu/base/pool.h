#pragma once

// Threads. In Python the work runs in torch's own pool, reached through its stable C function `torch_parallel_for`,
// whose address Python looks up: a second OpenMP runtime would fight the first, and no torch header is needed.
// Without it (the sanitizer driver), std::thread.

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastalign {

using RangeFunction = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = std::int32_t (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, RangeFunction, void*);

struct Pool {
    int workers = 1;
    ParallelFor parallel_for = nullptr;

    // Calls f(worker) for worker = 0 .. workers - 1, at the same time where the pool allows it, else one by one.
    template <typename F>
    void run(const F& f) const {
        if (workers == 1) return f(0);
        if (parallel_for) {
            auto range = [](std::int64_t begin, std::int64_t end, void* context) {
                for (std::int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(static_cast<int>(i));
            };
            parallel_for(0, workers, 1, range, const_cast<F*>(&f));
            return;
        }
        std::vector<std::thread> threads;
        for (int i = 1; i < workers; ++i) threads.emplace_back([&f, i] { f(i); });
        f(0);
        for (auto& t : threads) t.join();
    }
};

// Deals out items in order, and lets each lane (a block of rows) take its results in the order of the vocabulary
// whoever computed them. An item only ever waits for items dealt before it, which are done or being done by another
// worker; so it cannot deadlock, not even when the pool runs the workers one by one.
class OrderedItems {
public:
    OrderedItems(std::int64_t items, std::int64_t lanes) : items_(items), turns_(lanes) {}

    bool next(std::int64_t& item) { return (item = dealt_.fetch_add(1, std::memory_order_relaxed)) < items_; }
    void wait(std::int64_t lane, std::int64_t turn) const {
        while (turns_[lane].load(std::memory_order_acquire) != turn) std::this_thread::yield();
    }
    void done(std::int64_t lane, std::int64_t turn) { turns_[lane].store(turn + 1, std::memory_order_release); }

private:
    const std::int64_t items_;
    std::atomic<std::int64_t> dealt_{0};
    std::vector<std::atomic<std::int64_t>> turns_;
};

}  // namespace fastalign
