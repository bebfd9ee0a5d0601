// What the ops check of their arguments before any work starts; each check names the argument that does not fit.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "types.h"

namespace eefast {

using torch::stable::Tensor;

// Not STD_TORCH_CHECK, which would put the place in this file before the message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class Sizes>
std::string brackets(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "";
  text << "[";
  for (const int64_t size : sizes) text << std::exchange(separator, ", ") << size;
  return text.str() + "]";
}

std::string shape(const Tensor& tensor);
void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected, const char* meaning);
// Neither None nor sparse.
void check_there(const char* name, const Tensor& tensor);
void check_dtype(const char* name, const Tensor& tensor, torch::headeronly::ScalarType expected,
                 const char* expected_name);
// On the CUDA device of `owner`.
void check_device(const char* name, const Tensor& tensor, const char* owner_name, const Tensor& owner);
// Two elements of a tensor that gets written must not share memory.
void check_written(const char* name, const Tensor& tensor);
// All elements are inside the tensor's storage, which may have been made smaller or freed since.
void check_stored(const char* name, const Tensor& tensor);
// What is written shares no memory with what is read or with what else is written; all is stored. Null: no tensor.
using Named = std::initializer_list<std::pair<const char*, const Tensor*>>;
void check_apart(Named written, Named read);

// Elements of one sample, [M, …]; at most the largest number. Torch bounds only their product with M.
int64_t sample_elements(const Tensor& tensor);
// The same of maps, features [M, C, H, W]; fails for another shape and for samples without elements.
int64_t map_elements(const Tensor& features);

Criterion parse_criterion(const std::string& name);

// A rule of this shape is given where the criterion carries, and only there. Null: no tensor.
void check_rule(const std::string& criterion, const Tensor* rule, std::initializer_list<int64_t> expected);

}  // namespace eefast
