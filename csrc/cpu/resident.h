// The resident engine: a network as steps on small maps, a batch as raw pointers → answers.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"

namespace eefast::cpu {

struct Batch {
  // [samples, channels, height, width] float32 or, in int8, maybe uint8; strides in elements, any values. Features that
  // a load reads are uint8 in int8.
  const void* images;
  bool bytes;
  // In int8 [2, channels]: images · multiplier + shift are codes. Bytes are codes already.
  const float* scaling;
  int64_t samples;
  int64_t strides[4];
  // Of the early exits, or for each sample those of all of them; then NaN lets the sample exit, whatever its
  // confidence.
  const float* thresholds;
  bool thresholds_of_each;
  // Null, or kRuleNumbers numbers of every exit; then logits and confidence hold the answer so far between exits.
  const float* rule;
  float* logits;
  float* confidence;
  int64_t* exits;
  // Processor seconds spent in each section, or null; only with one thread.
  double* seconds;
  // Null, or where the store writes: [samples, height, width, stored_channels] float32 or, in int8, uint8. Samples fill
  // it from the front in the order in which they get there; the exit of such a sample is num_exits + its row.
  void* features = nullptr;
  int64_t stored_channels = 0;
  // Whether samples that go on after an exit have its answer in logits and confidence, too.
  bool every_answer = false;
};

// Runs work(i) for all i in [0, n), as far as possible at the same time.
using Parallel = void (*)(int64_t n, void (*work)(int64_t i, void* context), void* context);

// Answers the batch with `threads` workers. The answer of a sample depends on nothing but the sample.
void resident_forward(const Network& network, const Batch& batch, int64_t threads, Parallel parallel);

// Room for the maps of one sample in one section.
struct Slot {
  int64_t sample;
  char* maps;
};

// Runs single steps on the calling thread, for callers that choose between any two of them which samples go on.
class Carrier {
 public:
  // batch: where thresholds and answers of the samples are. slots: made for each section.
  Carrier(const Network& network, const Batch& batch, int64_t slots);
  ~Carrier();
  // Any carrier of the network may use them while this one is there.
  std::vector<Slot>& slots(int64_t section);
  // An image, strides of [C, H, W] → a slot of the first section. False where a NaN in it answers it: no step follows.
  bool load(const void* image, bool bytes, const std::array<int64_t, 3>& strides, Slot* to);
  // From a slot of the section before.
  void enter(int64_t section, Slot* from, Slot* to);
  // A step of a section's body. An exit writes its number into `exits` of those that exit and takes them out of `live`.
  void run(const Step& step, std::vector<Slot*>& live);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace eefast::cpu
