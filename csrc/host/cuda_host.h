// Runs a CUDA kernel's source on the CPU, for tests: the threads of a block are real threads, a
// barrier is a barrier, shared memory is static, or for dynamic shared memory an allocation of
// exactly the size asked for. Blocks run one after the other. Indexing faults and races then
// show, to the eye and to the sanitizers.
#pragma once

#include <array>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <memory>
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

  Barrier() = default;

  // The barrier of a team is told at each wait how many its members are.
  void wait(int members) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      members_ = members;
    }
    wait();
  }

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
  int members_ = 0;
  int waiting_ = 0;
  unsigned round_ = 0;
};

struct Block {
  Block(int threads, std::size_t shared_bytes)
      : barrier(threads), shared(std::make_unique<unsigned char[]>(shared_bytes)) {}

  Barrier barrier;
  std::array<Barrier, 16> teams;
  std::unique_ptr<unsigned char[]> shared;
};

inline thread_local Index threadIdx;
inline thread_local Index blockIdx;
inline Block* current_block = nullptr;
inline std::size_t host_shared_limit = 99 * 1024;  // of the smaller chips; the tests change it

inline void __syncthreads() { current_block->barrier.wait(); }

inline void team_sync(int team, int size) { current_block->teams[team].wait(size); }

inline std::size_t shared_limit(const char*, int) { return host_shared_limit; }

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(current_block->shared.get());
}

using std::sqrt;

template <class Kernel, class Argument>
void launch(const char*, Kernel kernel, unsigned blocks, int threads, int, void*,
            const Argument& argument, std::size_t shared_bytes = 0) {
  for (unsigned index = 0; index < blocks; ++index) {
    Block block(threads, shared_bytes);
    current_block = &block;
    std::vector<std::thread> team;
    for (int thread = 0; thread < threads; ++thread) {
      team.emplace_back([&, thread] {
        threadIdx.x = static_cast<unsigned>(thread);
        blockIdx.x = index;
        kernel(argument);
        block.barrier.leave();
      });
    }
    for (std::thread& thread : team) thread.join();
  }
}

}  // namespace mosaic
