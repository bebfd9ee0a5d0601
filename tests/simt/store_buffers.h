// A thread's store → when others see it: its block from the next barrier on, other blocks only after a fence.
//
// Kernels store through plain pointers. So the memory shows what the running fiber sees, and what has changed in it
// when the next one takes its place are that fiber's stores. They reach
//   * the threads of its block at the barrier that ends the wait of all;
//   * the device when the thread, or one that a barrier has shown them to, executes __threadfence(); or at the end.
// A block sees the device as it was at its own last fence: loads may be that old. Atomics act on the device at once.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

namespace simt {

struct Range {
  void* begin;
  size_t bytes;
};

class StoreBuffers {
 public:
  StoreBuffers(const std::vector<Range>& ranges, size_t blocks, size_t threads) : ranges_(ranges), threads_(threads) {
    for (const Range& range : ranges_) {
      const char* const begin = static_cast<const char*>(range.begin);
      device_.insert(device_.end(), begin, begin + range.bytes);
    }
    shown_ = device_;
    blocks_.resize(blocks, {device_, {}});
  }

  // The thread that has run leaves: its stores are noted.
  void leave(size_t thread) {
    size_t place = 0;
    for (const Range& range : ranges_) {
      const char* const begin = static_cast<const char*>(range.begin);
      if (std::memcmp(begin, &shown_[place], range.bytes) != 0)
        for (size_t i = 0; i < range.bytes; ++i)
          if (begin[i] != shown_[place + i]) threads_[thread].push_back({place + i, shown_[place + i] = begin[i]});
      place += range.bytes;
    }
  }

  // A thread of a block runs from here on: the memory is as it sees it.
  void enter(size_t block, size_t thread) {
    shown_ = blocks_[block].seen;
    apply(threads_[thread], shown_);
    show(shown_);
  }

  // All threads first … first + count - 1, which have left, have arrived at a barrier of their block.
  void meet(size_t block, size_t first, size_t count) {
    Block& here = blocks_[block];
    for (size_t thread = first; thread < first + count; ++thread) {
      apply(threads_[thread], here.seen);
      here.unfenced.insert(here.unfenced.end(), threads_[thread].begin(), threads_[thread].end());
      threads_[thread].clear();
    }
  }

  void fence(size_t block, size_t thread) {
    leave(thread);
    Block& here = blocks_[block];
    apply(here.unfenced, device_);
    apply(threads_[thread], device_);
    here.unfenced.clear();
    threads_[thread].clear();
    here.seen = device_;
    enter(block, thread);
  }

  // `target` += value on the device, which sees what the thread has stored there; the old number.
  template <class T>
  T add(size_t block, size_t thread, T* target, T value) {
    size_t place = 0;
    const Range* range = ranges_.data();
    for (; range < ranges_.data() + ranges_.size(); place += range++->bytes) {
      const auto offset = reinterpret_cast<char*>(target) - static_cast<char*>(range->begin);
      if (offset < 0 || static_cast<size_t>(offset) >= range->bytes) continue;
      place += offset;
      leave(thread);
      for (std::vector<Store>* stores : {&blocks_[block].unfenced, &threads_[thread]}) {
        std::vector<Store> others;
        for (const Store& store : *stores) {
          if (store.place >= place && store.place < place + sizeof(T))
            device_[store.place] = store.value;
          else
            others.push_back(store);
        }
        stores->swap(others);
      }
      T old;
      std::memcpy(&old, &device_[place], sizeof old);
      const T sum = old + value;
      std::memcpy(&device_[place], &sum, sizeof sum);
      std::memcpy(&blocks_[block].seen[place], &sum, sizeof sum);
      enter(block, thread);
      return old;
    }
    const T old = *target;
    *target += value;
    return old;
  }

  // The launch is over: every store reaches the memory. thread: the one that ran last.
  void end(size_t thread) {
    leave(thread);
    for (const Block& block : blocks_) apply(block.unfenced, device_);
    for (const std::vector<Store>& stores : threads_) apply(stores, device_);
    show(device_);
  }

 private:
  struct Store {
    size_t place;
    char value;
  };
  struct Block {
    std::vector<char> seen;
    std::vector<Store> unfenced;
  };

  static void apply(const std::vector<Store>& stores, std::vector<char>& memory) {
    for (const Store& store : stores) memory[store.place] = store.value;
  }

  void show(const std::vector<char>& memory) {
    size_t place = 0;
    for (const Range& range : ranges_) {
      std::memcpy(range.begin, &memory[place], range.bytes);
      place += range.bytes;
    }
  }

  std::vector<Range> ranges_;
  std::vector<char> device_, shown_;
  std::vector<Block> blocks_;
  std::vector<std::vector<Store>> threads_;
};

}  // namespace simt
