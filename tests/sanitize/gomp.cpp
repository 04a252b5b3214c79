// OpenMP for ThreadSanitizer, which cannot see into libgomp: the entry points that GCC calls for
// the kernels, made of what it understands. Threads start, meet and end where OpenMP says so and
// nowhere else: chunks are handed out by relaxed atomics, since an order that these imposed would
// hide races between the chunks.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// A region between whose ends threads share out loops and single blocks.
struct Team {
    static constexpr unsigned CONSTRUCTS = 256;

    explicit Team(unsigned size) : size(size) {}

    void barrier() {
        std::unique_lock<std::mutex> lock(mutex);
        const unsigned before = generation;
        if (++arrived == size) {
            arrived = 0;
            ++generation;
            all_here.notify_all();
        } else {
            all_here.wait(lock, [&] { return generation != before; });
        }
    }

    const unsigned size;
    std::atomic<long> handed_out[CONSTRUCTS] = {};  // of each loop or single block

private:
    std::mutex mutex;
    std::condition_variable all_here;
    unsigned arrived = 0, generation = 0;
};

// What one thread of a team knows of the loop that it is in.
struct Member {
    Team* team;
    int number;
    unsigned constructs = 0;
    long first = 0, last = 0, step = 0, chunk = 0;

    std::atomic<long>& handed_out() { return team->handed_out[constructs - 1]; }

    void begin_construct() {
        if (++constructs > Team::CONSTRUCTS) abort();
    }
};

thread_local Member* self = nullptr;

void run(void (*body)(void*), void* data, Member member) {
    Member* const outside = self;
    self = &member;
    body(data);
    self = outside;
}

bool next(long* begin, long* end) {
    const long count = (self->last - self->first + self->step - 1) / self->step;
    const long at = self->handed_out().fetch_add(self->chunk, std::memory_order_relaxed);
    if (at >= count) return false;
    *begin = self->first + at * self->step;
    *end = self->first + std::min(at + self->chunk, count) * self->step;
    // Every chunk may be anybody's: without this, one thread would often take them all.
    std::this_thread::yield();
    return true;
}

bool start(long first, long last, long step, long chunk, long* begin, long* end) {
    if (step <= 0) abort();
    self->begin_construct();
    self->first = first;
    self->last = last;
    self->step = step;
    self->chunk = chunk;
    return next(begin, end);
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return self ? self->number : 0; }
int omp_get_num_threads() { return self ? self->team->size : 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned /* binding */) {
    Team team(threads);
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i)
        others.emplace_back(run, body, data, Member{&team, int(i)});
    run(body, data, {&team, 0});
    for (std::thread& other : others) other.join();
}

void GOMP_barrier() { self->team->barrier(); }

bool GOMP_single_start() {
    self->begin_construct();
    return self->handed_out().exchange(1, std::memory_order_relaxed) == 0;
}

bool GOMP_loop_dynamic_start(long first, long last, long step, long chunk, long* begin,
                             long* end) {
    return start(first, last, step, chunk, begin, end);
}
bool GOMP_loop_dynamic_next(long* begin, long* end) { return next(begin, end); }
bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk,
                                          long* begin, long* end) {
    return start(first, last, step, chunk, begin, end);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) { return next(begin, end); }
void GOMP_loop_end() { self->team->barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
