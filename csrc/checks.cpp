// The ops' checks of shapes, dtypes and memory.
#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <limits>
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

void check_there(const char* name, const Tensor& tensor) {
  if (!tensor.defined()) fail(name, " is None; expected a tensor");
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  if (layout != aoti_torch_layout_strided()) fail(name, " is sparse or packed; convert it with .to_dense()");
}

void check_dtype(const char* name, const Tensor& tensor, torch::headeronly::ScalarType expected,
                 const char* expected_name) {
  check_there(name, tensor);
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
  if (tensor.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dimensions) {
    if (stride <= reach) {
      fail(name, " has overlapping strides ", brackets(tensor.strides()), "; give it separate memory");
    }
    reach += stride * (size - 1);
  }
}

namespace {

// The memory from a tensor's first element to its last. Its rows may have gaps, in which those of another tensor may
// be.
struct Span {
  const char* name;
  uintptr_t begin, end;
  uintptr_t pitch = 0, row = 0;  // bytes from one row to the next, bytes that a row spans

  // Fails where the storage, which may have been made smaller or freed since, ends before.
  Span(const char* tensor_name, const Tensor& tensor) : name(tensor_name) {
    begin = end = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    if (tensor.numel() == 0) return;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const auto element = static_cast<int64_t>(tensor.element_size());
    int64_t last = 0;
    for (std::size_t d = sizes.size(); d-- > 0;) {
      if (d == 0) row = (last + 1) * element;
      if (sizes[d] > 1) last += (sizes[d] - 1) * strides[d];
      if (d == 0 && sizes[d] > 1) pitch = strides[d] * element;
    }
    if (begin % element != 0) fail(name, " starts at an address that its elements cannot have; call .clone()");
    int64_t stored = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &stored));
    const int64_t needed = (tensor.storage_offset() + last + 1) * element;
    if (needed > stored) {
      fail(name, " needs ", needed, " bytes of its storage, which has ", stored, "; it has been freed or resized");
    }
    end += (last + 1) * element;
  }

  bool meets(const Span& other) const {
    if (std::max(begin, other.begin) >= std::min(end, other.end)) return false;
    if (pitch == 0 || pitch != other.pitch) return true;
    const uintptr_t after =
        begin <= other.begin ? (other.begin - begin) % pitch : (pitch - (begin - other.begin) % pitch) % pitch;
    return after < row || after + other.row > pitch;
  }
};

}  // namespace

void check_stored(const char* name, const Tensor& tensor) { Span(name, tensor); }

void check_apart(Named written, Named read) {
  std::vector<Span> spans;
  spans.reserve(written.size() + read.size());
  for (const Named& list : {written, read}) {
    for (const auto& [name, tensor] : list) {
      if (tensor != nullptr) spans.emplace_back(name, *tensor);
    }
  }
  for (std::size_t i = 0; i < written.size(); ++i) {
    for (std::size_t j = i + 1; j < spans.size(); ++j) {
      if (spans[i].meets(spans[j])) {
        fail(spans[i].name, " shares memory with ", spans[j].name, "; give it separate memory");
      }
    }
  }
}

int64_t sample_elements(const Tensor& tensor) {
  int64_t elements = 1;
  bool many = false;
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) return 0;
    many = many || elements > std::numeric_limits<int64_t>::max() / tensor.size(d);
    if (!many) elements *= tensor.size(d);
  }
  return many ? std::numeric_limits<int64_t>::max() : elements;
}

int64_t map_elements(const Tensor& features) {
  const int64_t elements = features.dim() == 4 ? sample_elements(features) : 0;
  if (elements == 0) {
    fail("features has shape ", shape(features), "; expected [M, C, H, W] with at least one channel and one pixel");
  }
  return elements;
}

Criterion parse_criterion(const std::string& name) {
  if (name == "learned") return Criterion::learned;
  if (name == "max_probability") return Criterion::max_probability;
  if (name == "entropy") return Criterion::entropy;
  if (name == "margin") return Criterion::margin;
  if (name == "carried") return Criterion::carried;
  fail("criterion='", name, "' is unknown; choose one of learned, max_probability, entropy, margin, carried");
}

void check_rule(const std::string& criterion, const Tensor* rule, std::initializer_list<int64_t> expected) {
  if ((criterion == "carried") != (rule != nullptr)) {
    fail("rule is ", rule ? "given" : "None", " with criterion '", criterion,
         "'; give it with 'carried', and only then");
  }
  if (rule == nullptr) return;
  check_dtype("rule", *rule, torch::headeronly::ScalarType::Float, "float32");
  check_stored("rule", *rule);
  check_shape("rule", *rule, expected, "nine numbers for each exit");
}

}  // namespace eefast
