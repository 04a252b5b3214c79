// The functions that GCC calls for an OpenMP parallel region, for ThreadSanitizer, which cannot see
// into libgomp. Threads synchronize only at the start and the end of a region.
#include <thread>
#include <vector>

namespace {

thread_local int team_size = 1;

void run(void (*body)(void*), void* data, unsigned threads) {
    team_size = threads;
    body(data);
    team_size = 1;
}

}  // namespace

extern "C" {

int omp_get_num_threads() { return team_size; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned /* binding */) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, body, data, threads);
    run(body, data, threads);
    for (std::thread& other : others) other.join();
}

}  // extern "C"
