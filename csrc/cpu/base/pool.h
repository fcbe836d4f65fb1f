#pragma once

// Threads. In Python the work runs in torch's thread pool, because a second OpenMP runtime would compete with torch's
// for the cores. The pool is reached through the stable C function `torch_parallel_for`. Python looks up its address,
// so no torch header is needed. Without that address (in the sanitizer driver) the work runs in std::thread.

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

    // Calls f(worker) for worker = 0 .. workers - 1, in parallel if the pool allows it, else one after another.
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

// Hands out items to the workers in order. `wait` and `done` make each lane (a block of rows) receive its results in
// the order of the vocabulary, whichever worker computed them, so sums have one order for any number of threads.
//
// This cannot deadlock, even if the pool runs the workers one after another: an item waits only for items that were
// handed out before it, and those are finished or being computed by another worker.
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
