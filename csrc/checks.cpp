// The ops' checks of shapes, dtypes and memory.
#include "checks.h"

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace eefast {

std::string shape(const Tensor& tensor) { return brackets(tensor.sizes()); }

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected, const char* meaning) {
  const auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
    fail(name, " has shape ", shape(tensor), "; expected ", meaning, " = ", brackets(expected));
  }
}

void check_dtype(const char* name, const Tensor& tensor, torch::headeronly::ScalarType expected,
                 const char* expected_name) {
  if (tensor.scalar_type() != expected) {
    fail(name, " is ", toString(tensor.scalar_type()), "; convert it with .to(torch.", expected_name, ")");
  }
}

void check_device(const char* name, const Tensor& tensor, const char* owner_name, const Tensor& owner) {
  if (!tensor.is_cuda() || tensor.get_device_index() != owner.get_device_index()) {
    fail(name, " is on ", device_name(tensor), "; move it to ", device_name(owner), ", where ", owner_name, " is");
  }
}

// Two elements of a tensor that gets written must not share memory.
void check_written(const char* name, const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dimensions) {
    if (stride <= reach) {
      fail(name, " has overlapping strides ", brackets(tensor.strides()), "; give it memory of its own");
    }
    reach += stride * (size - 1);
  }
}

cpu::Criterion parse_criterion(const std::string& name) {
  if (name == "learned") return cpu::Criterion::learned;
  if (name == "max_probability") return cpu::Criterion::max_probability;
  if (name == "entropy") return cpu::Criterion::entropy;
  if (name == "margin") return cpu::Criterion::margin;
  fail("criterion='", name, "' is unknown; choose one of learned, max_probability, entropy, margin");
}

}  // namespace eefast
