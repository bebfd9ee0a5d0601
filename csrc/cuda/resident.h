// What a launch of the resident CUDA kernel takes: a network as steps on maps in shared memory, and a batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace eefast::cuda {

constexpr int kThreads = 256;
// 6n+2 layers up to 110 have 109 convolutions, 3 of them projections, and at most 54 exits.
constexpr int kMaxSteps = 192, kMaxChannels = 64, kMaxImageChannels = 8, kMaxClasses = 256, kMaxSide = 32;

// A map of H×W pixels is in a square frame: one pixel of zeros around it, pixels of eight channels in a plane.
// Sides that are known to the compiler make the place of a tap a constant.
constexpr int kFrames[] = {10, 18, 34};
constexpr int frame_of(int side) { return side <= 8 ? 10 : side <= 16 ? 18 : 34; }
constexpr int plane_bytes(int frame) { return frame * frame * 16; }

// The functions of the kernel, each for one shape of convolution; see `run` in resident.cuh.
enum class Action : uint8_t {
  convolution_16,  // 3×3, stride 1, 16 channels in the largest frame, as in stage 1 of the 6n+2 networks
  convolution_32,  // 32 in the next, stage 2
  convolution_64,  // 64 in the smallest, stage 3
  exit,
  convolution,       // 3×3, stride 1, any others
  convolution_down,  // 3×3, stride 2
  projection_down,   // 1×1, stride 2
  affine,            // scale and shift per channel
  stem,              // 3×3 of an image of up to eight channels
};

// Two loads of 16 bytes; offsets into the shared memory in units of 16 bytes.
struct alignas(16) Step {
  Action action;
  uint8_t frame, height, width;  // of the target; of the source where nothing is written
  uint8_t source_frame, source_planes, planes;
  bool relu;
  uint16_t source, target, residual;  // residual: kNone, or a map to be added
  int16_t exit;                       // number of the exit
  uint32_t weight;                    // 16-byte units into the packed weights: bias, then weights
  bool clear;                         // the target is new: zeros around it are still to be written
  bool last;                          // the final exit
};
constexpr uint16_t kNone = 0xffff;
static_assert(sizeof(Step) == 32);

enum class Pixel : int { float32, float16, bfloat16, uint8 };

struct Network {
  const void* packed;        // see eefast/planning/packing.py; 16-byte aligned
  const float* thresholds;   // of the early exits
  int64_t threshold_stride;  // from one exit to the next
  // Whether each image has its own, of which NaN lets it exit, whatever its confidence; from one image to the next.
  bool thresholds_of_each;
  int64_t threshold_image_stride;
  Criterion criterion;
  int classes, steps, map_bytes;
  uint32_t image;  // bytes into the shared memory
  uint8_t image_frame;
  bool bfloat16;  // else float16
  Step step[kMaxSteps];
  const float* rule;  // [exits, kRuleNumbers] with Criterion::carried, else null; contiguous
};

struct Batch {
  const void* images;  // [count, channels, height, width]
  int64_t strides[4];  // in elements
  Pixel pixel;
  int count, channels, height, width;
  const float* normalization;  // null, or scale and shift per channel: [2][channels]
  int* next;                   // the queue
  float* logits;               // [count][classes]
  float* confidence;           // [count]
  int64_t* exits;              // [count]
};

struct Job {
  Network network;
  Batch batch;
};

// After the maps in shared memory.
struct Scratch {
  float sums[kMaxChannels / 8 * 4][8];  // per plane and part of it, eight channels; at most four parts
  float means[kMaxChannels];
  // The last belongs to the confidence. With a rule they are the answer so far, from exit to exit.
  float logits[kMaxClasses + 1];
  int image;
  // With a rule: the number of the exit before, and its class, -1 where a logit is NaN.
  float number;
  int best;
};

inline size_t shared_bytes(const Network& network) { return network.map_bytes + sizeof(Scratch); }

// Queues the kernel on a stream of a device; null, or what went wrong.
const char* launch_resident(const Job& job, int device, void* stream);

}  // namespace eefast::cuda
