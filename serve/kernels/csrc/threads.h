// A fixed team of threads that runs one function together and meets at barriers between its parts.
//
// A decode step is a hundred short loops, so handing each to a general pool would cost more than the loops. Here the
// whole step is one function that every thread runs; `Team::barrier` costs about a microsecond. Waiting spins briefly
// and then yields or sleeps, so that replicas which share cores don't burn each other's time.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace halftone {

class Team {
 public:
  explicit Team(int threads) : size_(threads < 1 ? 1 : threads), stretches_(size_) {
    for (int i = 1; i < size_; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Team() {
    stopping_ = true;
    wake();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  // Runs body(thread) on every thread, the caller being thread 0; returns when all are done. One caller at a time.
  void run(const std::function<void(int)>& body) {
    const std::lock_guard<std::mutex> turn(running_);
    body_ = &body;
    for (Stretch& stretch : stretches_)
      for (auto& taken : stretch.taken) taken = 0;
    pending_.store(size_ - 1);
    wake();
    body(0);
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) pause(spins);
  }

  // All threads must call it, in the same order.
  void barrier() {
    if (size_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) pause(spins);
  }

  // Deals [0, count) out: each thread takes chunks from the front of its own stretch, in order, so that it reads memory
  // in one stream; then from the back of another's, so that a thread that lost its core delays nobody for long.
  // `turn` numbers the loops of one run, alike on all threads; consecutive loops are separated by a barrier.
  template <typename Body>
  void deal(int thread, int turn, int64_t count, int64_t chunk, Body&& body) {
    stretches_[thread].taken[(turn + 2) & 3].store(0, std::memory_order_relaxed);
    for (int other = 0; other < size_; ++other) {
      const int owner = (thread + other) % size_;
      const int64_t begin = count * owner / size_, end = count * (owner + 1) / size_;
      std::atomic<uint64_t>& taken = stretches_[owner].taken[turn & 3];
      for (;;) {
        const uint64_t before = taken.fetch_add(other == 0 ? chunk : chunk << 32, std::memory_order_relaxed);
        const int64_t front = begin + static_cast<uint32_t>(before), back = end - static_cast<int64_t>(before >> 32);
        if (front >= back) break;
        if (other == 0) body(front, std::min(front + chunk, back));
        else body(std::max(back - chunk, front), back);
      }
    }
  }

 private:
  static void pause(int spins) {
    if (spins < 4000) _mm_pause();
    else sched_yield();
  }

  void wake() {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }

  void work(int thread) {
    for (uint32_t seen = 0;;) {
      uint32_t now = generation_.load(std::memory_order_acquire);
      for (int spins = 0; now == seen && spins < 4000; ++spins) {
        _mm_pause();
        now = generation_.load(std::memory_order_acquire);
      }
      if (now == seen) {
        generation_.wait(seen, std::memory_order_acquire);
        continue;
      }
      seen = now;
      if (stopping_) return;
      (*body_)(thread);
      pending_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  const int size_;
  std::mutex running_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* body_ = nullptr;
  std::atomic<uint32_t> generation_{0};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<int> pending_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  struct alignas(64) Stretch {
    std::atomic<uint64_t> taken[4] = {};  // by turn: from the front in the low half, from the back in the high one
  };
  std::vector<Stretch> stretches_;
};

}  // namespace halftone
