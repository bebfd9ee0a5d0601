// One worker's work, shared with workers that have none left.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include "cpu/instruction_set.h"

namespace eefast::cpu {

inline void wait_a_little(int64_t tries) {
#ifdef EEFAST_X86
  _mm_pause();
#endif
  // Where threads outnumber cores the one that is waited for may need this one's.
  if (tries % 1024 == 1023) std::this_thread::yield();
}

// The leader splits a phase into items; helpers claim some, one by one. No worker waits for a helper that never comes:
// the leader takes all items that no helper has claimed.
class alignas(64) Team {
 public:
  void open() { open_.store(true, std::memory_order_release); }
  void close() { open_.store(false, std::memory_order_release); }
  bool is_open() const { return open_.load(std::memory_order_acquire); }
  int64_t helpers() const { return helpers_.load(std::memory_order_relaxed); }

  // work(item, worker) for all items in [0, n): the leader from the front, its helpers from the back, so that each
  // finds in its cache what it wrote in the phase before.
  template <class Work, class Worker>
  void share(int64_t n, const Work& work, Worker& leader) {
    call_ = [](const void* context, int64_t item, void* worker) {
      (*static_cast<const Work*>(context))(item, *static_cast<Worker*>(worker));
    };
    context_ = &work;
    for (begin_ = 0; begin_ < n; begin_ += kMost) {
      const int64_t items = std::min(n - begin_, kMost);
      done_.store(0, std::memory_order_relaxed);
      claims_.store(static_cast<uint64_t>(items) << 2 * kBits, std::memory_order_release);
      while (claim(&leader, true)) {
      }
      for (int64_t tries = 0; done_.load(std::memory_order_acquire) < items; ++tries) wait_a_little(tries);
    }
  }

  // Helps until the leader closes.
  void help(void* worker) {
    helpers_.fetch_add(1, std::memory_order_relaxed);
    for (int64_t tries = 0; is_open();) tries = claim(worker, false) ? 0 : tries + 1, wait_a_little(tries);
    helpers_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kBits = 20, kMost = (int64_t{1} << kBits) - 1;

  // A claimed item cannot be outlived: the leader waits for it, so that call_, context_ and begin_ hold until it is
  // done.
  bool claim(void* worker, bool from_front) {
    uint64_t claims = claims_.load(std::memory_order_acquire);
    int64_t items, front, back;
    do {
      items = static_cast<int64_t>(claims >> 2 * kBits);
      front = static_cast<int64_t>(claims >> kBits) & kMost;
      back = static_cast<int64_t>(claims) & kMost;
      if (front + back >= items) return false;
    } while (!claims_.compare_exchange_weak(claims, claims + (from_front ? uint64_t{1} << kBits : 1),
                                            std::memory_order_acq_rel, std::memory_order_acquire));
    call_(context_, begin_ + (from_front ? front : items - 1 - back), worker);
    done_.fetch_add(1, std::memory_order_acq_rel);
    return true;
  }

  // Items of the phase, claimed from the front, claimed from the back.
  std::atomic<uint64_t> claims_{0};
  std::atomic<int64_t> done_{0}, helpers_{0};
  std::atomic<bool> open_{false};
  void (*call_)(const void*, int64_t, void*) = nullptr;
  const void* context_ = nullptr;
  int64_t begin_ = 0;
};

}  // namespace eefast::cpu
