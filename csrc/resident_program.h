// Reads a network from the tables of eefast::resident_forward, and checks them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "program.h"

namespace eefast {

using torch::stable::Tensor;

// What a network is read from.
struct ResidentSource {
  std::vector<int64_t> steps, maps, groups;
  Tensor packed;
  const float* place;  // of packed when it was read
  std::string criterion;
  int64_t num_classes;
  Precision precision;
  int64_t channels, height, width, num_exits;

  bool operator==(const ResidentSource& other) const {
    return std::tie(steps, maps, groups, place, criterion, num_classes, precision, channels, height, width,
                    num_exits) == std::tie(other.steps, other.maps, other.groups, other.place, other.criterion,
                                           other.num_classes, other.precision, other.channels, other.height,
                                           other.width, other.num_exits) &&
           packed.numel() == other.packed.numel();
  }
};

// The tables' values, checked one by one.
ResidentSource read_tables(const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups,
                           const Tensor& packed, const Tensor& thresholds, const std::string& criterion,
                           int64_t num_classes, Precision precision);

// Of the ops that have no int8.
inline Precision float_precision(bool bfloat16) { return bfloat16 ? Precision::bfloat16 : Precision::float32; }

// The network for images of this size; where weights are in `packed` is not checked yet.
Network read_network(const ResidentSource& source);

// Says which row of `steps` does not fit, and why.
[[noreturn]] void refuse(const ResidentSource& source, int64_t row, const char* what);

}  // namespace eefast
