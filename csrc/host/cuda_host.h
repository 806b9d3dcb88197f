// Runs a CUDA kernel's source on the CPU, for tests: the threads of a block are real threads, a
// barrier is a barrier, shared memory is static. Blocks run one after the other. Indexing faults
// and races then show, to the eye and to the sanitizers.
#pragma once

#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

namespace mosaic {

struct Index {
  unsigned x = 0;
};

// A barrier that a thread may leave for good, as threads of a block may return.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    ++waiting_;
    release();
    changed_.wait(lock, [&] { return round_ != round; });
  }

  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --members_;
    release();
  }

 private:
  void release() {
    if (waiting_ == 0 || waiting_ < members_) return;
    waiting_ = 0;
    ++round_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int members_;
  int waiting_ = 0;
  unsigned round_ = 0;
};

inline thread_local Index threadIdx;
inline thread_local Index blockIdx;
inline Barrier* block_barrier = nullptr;

inline void __syncthreads() { block_barrier->wait(); }

using std::sqrt;

template <class Kernel, class Argument>
void launch(const char*, Kernel kernel, unsigned blocks, int threads, int, void*,
            const Argument& argument) {
  for (unsigned block = 0; block < blocks; ++block) {
    Barrier barrier(threads);
    block_barrier = &barrier;
    std::vector<std::thread> team;
    for (int thread = 0; thread < threads; ++thread) {
      team.emplace_back([&, thread] {
        threadIdx.x = static_cast<unsigned>(thread);
        blockIdx.x = block;
        kernel(argument);
        barrier.leave();
      });
    }
    for (std::thread& thread : team) thread.join();
  }
}

}  // namespace mosaic
