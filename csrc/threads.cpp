// The threads that kernels share their work among: compiled once, for whatever processor.
//
// OpenMP would end every loop with a barrier of all threads, those included that found nothing left
// to do: on a machine that others use, one of them is often just then not running, and a step of
// 3 ms waits for it for 20. Here a loop ends when its work is done. Idle threads sleep.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastllm {

namespace {

struct Job {
    void (*body)(void*, int64_t);
    void* context;
    int64_t count;
    int wanted;  // threads that may still join
    std::atomic<int64_t> next = 0;
    std::atomic<int> helpers = 0;  // at work on it, besides the one that brought it

    void run() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            body(context, i);
    }
};

// Whether `done()` came true within `time`.
template <typename Done>
bool spin(std::chrono::microseconds time, Done done) {
    const auto start = std::chrono::steady_clock::now();
    for (int tries = 1; !done(); ++tries)
        if (tries % 64 == 0 && std::chrono::steady_clock::now() - start > time) return false;
    return true;
}

class Pool {
public:
    void run(Job& job) {
        {
            const std::lock_guard lock(mutex_);
            add_workers(job.wanted);
            jobs_.push_back(&job);
            news_.fetch_add(1, std::memory_order_release);
            if (asleep_ > 0) wake_.notify_all();
        }
        job.run();
        std::unique_lock lock(mutex_);
        jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));  // nobody joins any more
        const auto finished = [&] { return job.helpers.load(std::memory_order_acquire) == 0; };
        if (finished()) return;
        lock.unlock();
        if (spin(std::chrono::microseconds(100), finished)) return;
        lock.lock();
        finished_.wait(lock, finished);
    }

private:
    std::mutex mutex_;
    std::condition_variable wake_, finished_;
    std::vector<Job*> jobs_;
    std::atomic<uint64_t> news_ = 0;
    int workers_ = 0, asleep_ = 0;

    void add_workers(int count) {
        try {
            for (; workers_ < count; ++workers_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {  // the system gives no more: those there will do
        }
    }

    Job* open_job() {
        for (Job* job : jobs_)
            if (job->wanted > 0) return job;
        return nullptr;
    }

    void work() {
        for (uint64_t seen = 0;;) {
            // Between two kernels there is often only a little Python.
            spin(std::chrono::microseconds(1000),
                 [&] { return news_.load(std::memory_order_acquire) != seen; });
            std::unique_lock lock(mutex_);
            ++asleep_;
            wake_.wait(lock, [&] { return open_job(); });
            --asleep_;
            Job* job = open_job();
            --job->wanted;
            job->helpers.fetch_add(1, std::memory_order_relaxed);
            seen = news_.load(std::memory_order_relaxed);
            lock.unlock();
            job->run();
            lock.lock();
            if (job->helpers.fetch_sub(1, std::memory_order_release) == 1) finished_.notify_all();
        }
    }
};

// Never destroyed: its threads may outlive main.
Pool* pool = new Pool;

// A forked process has only the thread that forked.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void run_shared(int64_t count, int threads, void (*body)(void*, int64_t), void* context) {
    if (threads > 1 && count > 1) {
        Job job = {body, context, count, static_cast<int>(std::min<int64_t>(threads, count)) - 1};
        pool->run(job);
    } else {
        for (int64_t i = 0; i < count; ++i) body(context, i);
    }
}

}  // namespace fastllm
